"""Published latent-diffusion layout-to-image checkpoints to a model directory.

The checkpoint is a state dict: `model.diffusion_model.*` (the openai UNet), `model_ema.*` (its
moving average, preferred), `cond_stage_model.transformer.*` (the layout encoder of x-transformers)
and `first_stage_model.*` (a VQ autoencoder). Sizes are read from the shapes of the weights.
Source: latent diffusion (arXiv 2112.10752).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel, VQModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)
from torch import Tensor, nn

from dive_fast.core.distinct import told_apart
from dive_fast.core.layouts import LayoutFormat
from dive_fast.core.projection import SLOTS_PER_OBJECT
from dive_fast.core.schedule import make_betas
from dive_fast.errors import DiveFastError, ModelError
from dive_fast.models.layout_to_image.convert_read import (
    EMA,
    ENCODER,
    FIRST_STAGE,
    UNET,
    encoder_config,
    read_checkpoint,
    unet_config,
    vae_config,
)
from dive_fast.models.layout_to_image.encoder import LayoutEncoder
from dive_fast.models.layout_to_image.unet import HEAD_CHANNELS, LayoutToImageModel

PUBLISHED_BETAS = (0.0015, 0.0205)
LATENT_SIZE = 64

Parts = tuple[UNet2DConditionModel, LayoutEncoder, VQModel, DDPMScheduler]


def convert_layout_checkpoint(
    checkpoint: str | Path,
    names: Sequence[str] | None = None,
    *,
    latent_size: int = LATENT_SIZE,
    head_channels: int = HEAD_CHANNELS,
) -> LayoutToImageModel:
    """Reads a checkpoint file; ``save_pretrained`` of the result writes the directory.

    Args:
        checkpoint: a pickled file (read with ``weights_only=True``) or safetensors.
        names: of the classes, in the order of their tokens; equal ones are told apart by their
            rows. Checkpoints do not hold them; without, every token but the last may be a class,
            "class 0", "class 1", ...
        latent_size: the side of the latents, which checkpoints do not hold.
        head_channels: of the UNet's attention heads, which checkpoints do not hold.

    Raises:
        ModelError: the file is missing, cannot be read, or holds another architecture.
    """
    path = Path(checkpoint)
    state = read_checkpoint(path)
    try:
        unet, encoder, vae, scheduler = convert_state_dict(
            state, names, latent_size=latent_size, head_channels=head_channels
        )
    except ModelError as error:
        raise ModelError(f"{path} cannot be converted: {error}") from error
    except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
        # diffusers' converters take the published names and shapes for granted.
        raise ModelError(
            f"expected a whole latent-diffusion layout-to-image model in {path}, got another one "
            f"({type(error).__name__}: {error})."
        ) from error
    for module in (unet, encoder, vae):
        for name, weight in module.named_parameters():
            if not torch.isfinite(weight).all():
                raise ModelError(f"the weights in {path} are not finite: {name} holds NaN or inf.")
    return LayoutToImageModel(unet, encoder, scheduler, vae)


def convert_state_dict(
    state: Mapping[str, Tensor],
    names: Sequence[str] | None = None,
    *,
    latent_size: int = LATENT_SIZE,
    head_channels: int = HEAD_CHANNELS,
) -> Parts:
    """The parts of a state dict, frozen, in float32, on the device of its tensors.

    Raises:
        ModelError: another architecture.
    """
    parts = {prefix: _below(state, prefix) for prefix in (UNET, ENCODER, FIRST_STAGE)}
    for prefix, part in parts.items():
        if not part:
            raise ModelError(
                f"expected the state dict of a latent-diffusion layout-to-image model with "
                f"{prefix}*, got {len(state)} other entries ({next(iter(state), 'none')})."
            )
    unet = _convert_unet(state, parts[UNET], latent_size, head_channels)
    encoder = _convert_encoder(parts[ENCODER], names)
    scale = float(state["scale_factor"]) if "scale_factor" in state else 1.0
    if not 0 < scale < math.inf:
        raise ModelError(f"expected a scale_factor above 0, got {scale}.")
    vae = _convert_vae(parts[FIRST_STAGE], scale, latent_size)
    scheduler = _scheduler(state.get("betas"))
    _check_alpha_bar(state.get("alphas_cumprod"), scheduler)
    return unet, encoder, vae, scheduler


def _below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def _convert_unet(
    state: Mapping[str, Tensor], part: dict[str, Tensor], latent_size: int, head_channels: int
) -> UNet2DConditionModel:
    config = unet_config(part, latent_size, head_channels)
    if any(key.startswith(EMA) for key in state):
        part = {key: _averaged(state, key) for key in part}
    converted = convert_ldm_unet_checkpoint({UNET + k: v for k, v in part.items()}, config)
    used = {id(tensor) for tensor in converted.values()}
    unused = [key for key, tensor in part.items() if id(tensor) not in used]
    if unused:
        raise ModelError(
            f"expected the UNet of a latent-diffusion layout-to-image model, got one that also "
            f"has {UNET}{unused[0]}."
        )
    return _filled(UNet2DConditionModel, config, converted)


def _averaged(state: Mapping[str, Tensor], key: str) -> Tensor:
    """The moving average of a UNet weight; its name is the weight's without dots."""
    name = EMA + key.replace(".", "")
    if name not in state:
        raise ModelError(f"expected a moving average of every UNet weight, found no {name}.")
    return state[name]


def _convert_encoder(part: dict[str, Tensor], names: Sequence[str] | None) -> LayoutEncoder:
    config = encoder_config(part)
    size, slots = config["vocabulary_size"], config["n_slots"]
    max_objects, rest = divmod(slots, SLOTS_PER_OBJECT)
    if max_objects < 1 or rest == 1:
        raise ModelError(
            f"expected a layout encoder of triples and perhaps two crop tokens, got {slots} slots."
        )
    names = [f"class {i}" for i in range(size - 1)] if names is None else names
    try:
        names = told_apart(names)
        layout = LayoutFormat.latent_diffusion(names, max_objects, size, crop=rest == 2)
    except DiveFastError as error:
        raise ModelError(f"the checkpoint's layouts cannot be used: {error}") from error
    renamed = {
        "token_embedding.weight": part["token_emb.weight"],
        "position_embedding.weight": part["pos_emb.emb.weight"],
        **{f"norm.{x}": part[f"norm.{x}"] for x in ("weight", "bias") if f"norm.{x}" in part},
    }
    for key, weight in part.items():
        if key.startswith("attn_layers.layers."):
            renamed[_encoder_key(key)] = weight
    return _filled(LayoutEncoder, {**config, "layout": layout.to_dict()}, renamed)


def _encoder_key(key: str) -> str:
    """x-transformers alternates attention and feed-forward, each after its norm."""
    number, part, rest = key.removeprefix("attn_layers.layers.").split(".", 2)
    block, is_feed_forward = divmod(int(number), 2)
    if part == "0":
        return f"blocks.{block}.norm{is_feed_forward + 1}.{rest}"
    if not is_feed_forward:
        return f"blocks.{block}.attention.{rest}"
    rest = rest.replace("net.0.0.", "0.").replace("net.2.", "2.")
    return f"blocks.{block}.feed_forward.{rest}"


def _convert_vae(part: dict[str, Tensor], scale: float, latent_size: int) -> VQModel:
    config = vae_config(part, scale, latent_size)
    converted = convert_ldm_vae_checkpoint({FIRST_STAGE + k: v for k, v in part.items()}, config)
    converted["quantize.embedding.weight"] = part["quantize.embedding.weight"]
    return _filled(VQModel, config, converted)


def _filled(model_class: type, config: dict, state: dict[str, Tensor]) -> nn.Module:
    """The model of that configuration with exactly these weights."""
    try:
        with torch.device("meta"):  # no random weights that are then overwritten
            model = model_class(**config)
    except (ValueError, RuntimeError) as error:
        raise ModelError(
            f"the checkpoint's sizes make no {model_class.__name__}: {error}"
        ) from error
    expected = model.state_dict()
    for name in sorted(expected.keys() | state.keys()):
        want, got = (list(d[name].shape) if name in d else "none" for d in (expected, state))
        if want != got:
            raise ModelError(
                f"expected the checkpoint's {model_class.__name__} to have {name} of shape {want}, "
                f"got {got}."
            )
    model.load_state_dict({k: v.float() for k, v in state.items()}, assign=True)
    return model.eval().requires_grad_(False)


def _scheduler(betas: Tensor | None) -> DDPMScheduler:
    """Of the training: the checkpoint's betas, or the published ones."""
    start, end = PUBLISHED_BETAS
    if betas is None or betas.is_meta:
        return DDPMScheduler(beta_schedule="scaled_linear", beta_start=start, beta_end=end)
    betas = betas.double().cpu()
    inside = (betas > 0) & (betas <= 1)  # the last may be 1: a zero terminal SNR
    if betas.dim() != 1 or len(betas) == 0 or not inside.all() or (betas[:-1] == 1).any():
        raise ModelError(
            "expected the checkpoint's betas to be a list of numbers between 0 and 1, of which "
            "only the last may be 1."
        )
    if len(betas) == 1000 and torch.allclose(betas, make_betas("scaled_linear", 1000, start, end)):
        return DDPMScheduler(beta_schedule="scaled_linear", beta_start=start, beta_end=end)
    return DDPMScheduler(num_train_timesteps=len(betas), trained_betas=betas.tolist())


def _check_alpha_bar(stated: Tensor | None, scheduler: DDPMScheduler) -> None:
    """That the checkpoint's own product of its betas, where it has one, is that of the scheduler.

    Raises:
        ModelError: the training changed it otherwise.
    """
    if stated is None or stated.is_meta:
        return
    made = scheduler.alphas_cumprod.double()
    if stated.shape != made.shape or not torch.allclose(
        stated.double().cpu(), made, rtol=1e-3, atol=1e-5
    ):
        raise ModelError(
            "expected the checkpoint's alphas_cumprod to be the product of 1 - betas, got others."
        )
