"""Pictures to latents, for every family that has an ``AutoencoderKL``."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL

from dive_fast.errors import ModelError
from dive_fast.models.checkpoint import load_component

ENCODE_BATCH = 16


def load_vae(directory: Path, channels: int, allow_pickle: bool) -> AutoencoderKL:
    """The ``vae`` of a model directory whose network takes latents of that many channels.

    Raises:
        ModelError: it is missing, broken, or does not fit the network.
    """
    vae = load_component(AutoencoderKL, directory / "vae", allow_pickle)
    if not isinstance(vae.config.scaling_factor, int | float):
        raise ModelError(
            f"scaling_factor of the VAE in {directory} must be a number, "
            f"got {vae.config.scaling_factor!r}."
        )
    if vae.config.latent_channels != channels:
        raise ModelError(
            f"the network in {directory} takes {channels} channels, "
            f"but its VAE gives {vae.config.latent_channels}."
        )
    return vae


def encode_latents(vae: AutoencoderKL, images: torch.Tensor, device: torch.device) -> torch.Tensor:
    """x0 = (posterior mean - shift) x scaling factor, float32 [B, C, h, w].

    Args:
        images: [B, channels, size, size] in [-1, 1].
    """
    shift = vae.config.shift_factor or 0.0
    parts = []
    with torch.inference_mode():
        for chunk in images.split(ENCODE_BATCH):
            mean = vae.encode(chunk.float().to(device)).latent_dist.mean
            parts.append((mean - shift) * vae.config.scaling_factor)
    # Cloned outside inference mode: x0 meets autograd later.
    return torch.cat(parts).clone()


def image_shape(
    latent_shape: tuple[int, int, int], vae: AutoencoderKL | None
) -> tuple[int, int, int]:
    """(channels, size, size) of the pictures behind latents [C, h, w]; the same without a VAE."""
    if vae is None:
        return latent_shape
    halvings = len(vae.config.block_out_channels) - 1
    return (vae.config.in_channels, *(side * 2**halvings for side in latent_shape[1:]))
