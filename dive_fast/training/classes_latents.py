"""Pictures in the latents of an autoencoder, encoded once.

    x0 = scale z,  scale = 1 / sqrt(mean of z^2 over the training pictures)

so that x0 is as large as the noise, whatever the autoencoder's own configuration states.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from dive_fast.data.images import from_bytes
from dive_fast.errors import ModelError, shown
from dive_fast.models import taef2
from dive_fast.models.autoencoder import (
    AUTOENCODERS,
    ENCODE_BATCH,
    KL_OR_TINY,
    Autoencoder,
    encode_latents,
    image_shape,
)
from dive_fast.models.files.checkpoint import load_component
from dive_fast.models.files.hub import find_part
from dive_fast.models.files.reading import read_json
from dive_fast.training.augmentation import Augmentation

CPU = torch.device("cpu")


def load_autoencoder(source: str | Path) -> Autoencoder:
    """An autoencoder whose latents a DiT can learn: its own scaling is taken off.

    Args:
        source: its folder, with ``config.json`` and weights, or with TAEF2's weights as
            ``taef2.SETS`` has them; a model directory with a folder ``vae`` of the first kind; or a
            hub id of any of them.

    Raises:
        ModelError: there is none, it is of another class than those of ``KL_OR_TINY``, it is
            damaged, or it takes no pictures of 1 or 3 channels.
    """
    folder = find_part(str(source), "vae", taef2.FILES)
    vae = _load(folder)
    if vae.config.in_channels not in (1, 3):
        raise ModelError(
            f"expected an autoencoder of pictures of 1 or 3 channels in {folder}, got "
            f"{vae.config.in_channels}."
        )
    set_scale(vae, 1.0)
    return vae


def _load(folder: Path) -> Autoencoder:
    if not (folder / "config.json").is_file():
        return taef2.load_taef2(folder)
    config = read_json(folder / "config.json")
    name = config.get("_class_name")
    if name not in KL_OR_TINY:
        raise ModelError(f"expected a {' or '.join(KL_OR_TINY)} in {folder}, got {shown(name)}.")
    return load_component(AUTOENCODERS[name], folder, allow_pickle=False)


def set_scale(vae: Autoencoder, scale: float) -> None:
    """x0 = scale z from now on, and where the autoencoder is saved."""
    others = {key: None for key in ("latents_mean", "latents_std") if key in vae.config}
    shift = {"shift_factor": 0.0} if "shift_factor" in vae.config else {}
    vae.register_to_config(scaling_factor=scale, **shift, **others)


def latent_side(vae: Autoencoder, size: int) -> int:
    """The side of the latents of pictures of so many pixels.

    Raises:
        ModelError: the pictures have no whole number of latents.
    """
    factor = image_shape((1, 1, 1), vae)[1]
    if size % factor:
        raise ModelError(
            f"expected a size that the autoencoder's {factor} pixels a latent divide, got {size}."
        )
    return size // factor


def encode_copies(
    vae: Autoencoder,
    pixels: Tensor,
    augmentation: Augmentation,
    copies: int,
    seed: int,
    progress: bool,
) -> Tensor:
    """x0 of pictures as they are, and of augmented copies; sets the autoencoder's scale.

    Args:
        vae: of scale 1.
        pixels: uint8 [N, c, size, size].
        copies: augmented ones of every picture, each with other draws.

    Returns:
        float16 [1 + copies, N, C, h, w].
    """
    made = []
    with tqdm(total=(1 + copies) * len(pixels), disable=not progress, desc="encode") as bar:
        for copy in range(1 + copies):
            generator = torch.Generator().manual_seed(seed + copy)
            parts = []
            for chunk in pixels.split(ENCODE_BATCH):
                x = from_bytes(chunk)
                x = augmentation(x, generator) if copy else x
                parts.append(encode_latents(vae, x, CPU).half())
                bar.update(len(chunk))
            made.append(torch.cat(parts))
    # Of the pictures as they are: copies may be darker.
    scale = 1 / made[0].float().square().mean().sqrt().item()
    set_scale(vae, scale)
    return torch.stack(made).float().mul(scale).half()


def decoded(vae: Autoencoder, x0: Tensor) -> Tensor:
    """Pictures float32 [B, c, size, size] in [-1, 1] of latents."""
    with torch.inference_mode():
        return vae.decode(x0 / vae.config.scaling_factor).sample.clamp(-1, 1)
