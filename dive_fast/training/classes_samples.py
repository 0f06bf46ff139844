"""Pictures that a model draws while it learns, for who watches."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import DiTTransformer2DModel
from PIL import Image

from dive_fast.core.convention import Convention
from dive_fast.core.files import replacing
from dive_fast.errors import RunError
from dive_fast.models.autoencoder import Autoencoder
from dive_fast.models.dit.model import DiT
from dive_fast.predict.sampling import sample
from dive_fast.training.classes_latents import decoded

FOLDER = "samples"
CLASSES, OF_EACH = 12, 6  # rows and columns of the picture
STEPS = 25


def draw_samples(
    transformer: DiTTransformer2DModel,
    convention: Convention,
    names: tuple[str, ...],
    vae: Autoencoder | None,
    out: Path,
    step: int,
) -> None:
    """Writes ``out/samples/STEP.png``: a row for each of the first classes.

    Raises:
        RunError: it cannot be written.
    """
    # A DiT takes the embedders out of its network.
    copy = type(transformer).from_config(transformer.config)
    copy.load_state_dict(transformer.state_dict())
    model = DiT(
        copy.eval().requires_grad_(False), vae, convention.schedule, names, convention=convention
    )
    rows = torch.arange(min(CLASSES, len(names))).repeat_interleave(OF_EACH)
    x0 = sample(model, rows, steps=STEPS)
    pictures = x0.clamp(-1, 1) if vae is None else decoded(vae, x0)
    path = out / FOLDER / f"{step:06d}.png"
    try:
        path.parent.mkdir(exist_ok=True)
        with replacing(path) as file:
            sheet(pictures, OF_EACH).save(file, format="PNG")
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror or error}.") from error


def sheet(pictures: torch.Tensor, columns: int) -> Image.Image:
    """One picture of many, float32 [N, c, h, w] in [-1, 1], N a multiple of ``columns``."""
    pixels = ((pictures + 1) * 127.5).round().to(torch.uint8)
    grid = pixels.unflatten(0, (-1, columns)).permute(0, 3, 1, 4, 2)  # rows, h, columns, w, c
    whole = grid.flatten(2, 3).flatten(0, 1).contiguous().numpy()
    return Image.fromarray(whole[..., 0] if whole.shape[-1] == 1 else whole)
