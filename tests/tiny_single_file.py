"""Small Stable Diffusion checkpoints in one file, as the original code writes them."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)
from ldm_reference import FIRST, UNET, Sizes, unet_shapes, vae_shapes
from safetensors.torch import save_file
from torch import Tensor, nn

SIZES = Sizes(
    channels=8, mult=(1, 2), attention=(1,), resnets=1, depth=1, context=12, latent=4,
    vae_channels=8, vae_mult=(1, 1), vae_resnets=2,
)  # fmt: skip


def write_single_file(directory: Path, file: Path, dtype: torch.dtype = torch.float32) -> Path:
    """The weights of a Stable Diffusion 1.x directory under their original names."""
    pipeline = StableDiffusionPipeline.from_pretrained(directory)
    state = {f"{UNET}.{k}": v for k, v in original_unet(pipeline.unet).items()}
    state |= {f"{FIRST}.{k}": v for k, v in original_vae(pipeline.vae).items()}
    for key, value in pipeline.text_encoder.state_dict().items():
        name = f"text_model.{key.removeprefix('text_model.')}"
        state[f"cond_stage_model.transformer.{name}"] = value
    return save(state, file, dtype)


def save(state: dict[str, Tensor], file: Path, dtype: torch.dtype = torch.float32) -> Path:
    state = {key: value.detach().to(dtype).contiguous().clone() for key, value in state.items()}
    # What every such file has beside: a schedule, and averages that are not read.
    state["alphas_cumprod"] = torch.linspace(1, 0, 1000)
    state["model_ema.decay"] = torch.tensor(0.9999)
    save_file(state, file)
    return file


def original_unet(unet: nn.Module) -> dict[str, Tensor]:
    names = list(unet_shapes(SIZES))
    asked = {f"{UNET}.{name}": torch.tensor([i]) for i, name in enumerate(names)}
    found = convert_ldm_unet_checkpoint(asked, unet.config)
    return {names[int(found[key])]: value for key, value in unet.state_dict().items()}


def original_vae(vae: nn.Module) -> dict[str, Tensor]:
    names = [name for name in vae_shapes(SIZES) if not name.startswith("quantize")]
    asked = {f"{FIRST}.{name}": torch.tensor([i]) for i, name in enumerate(names)}
    found = convert_ldm_vae_checkpoint(asked, vae.config)
    state = {names[int(found[key])]: value for key, value in vae.state_dict().items()}
    # Attention of 1 x 1 convolutions.
    attention = (".q.weight", ".k.weight", ".v.weight", ".proj_out.weight")
    return {
        name: value[:, :, None, None] if name.endswith(attention) and value.ndim == 2 else value
        for name, value in state.items()
    }


def write_configurations(directory: Path, to: Path) -> Path:
    """What the hub has beside the weights, and nothing of these."""
    for path in directory.rglob("*"):
        if path.suffix in (".json", ".txt"):
            copy = to / path.relative_to(directory)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    return to
