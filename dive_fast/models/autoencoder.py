"""Images to latents, for every family that has one of ``AUTOENCODERS``."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderDC, AutoencoderKL, VQModel

ENCODE_BATCH = 16
AUTOENCODERS = {
    "AutoencoderKL": AutoencoderKL,
    "AutoencoderDC": AutoencoderDC,
    "VQModel": VQModel,
}

Autoencoder = AutoencoderKL | AutoencoderDC | VQModel


def latent_channels(vae: Autoencoder) -> int:
    """C of the latents."""
    if isinstance(vae, VQModel) and vae.config.vq_embed_dim is not None:
        return vae.config.vq_embed_dim
    return vae.config.latent_channels


def encode_latents(vae: Autoencoder, images: torch.Tensor, device: torch.device) -> torch.Tensor:
    """x0 = (posterior mean - shift) x scaling factor, float32 [B, C, h, w].

    Of a ``VQModel`` the latents before quantisation stand for the posterior mean, of an
    ``AutoencoderDC`` its only latents.

    Args:
        images: [B, channels, size, size] in [-1, 1].
    """
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    parts = []
    with torch.inference_mode():
        for chunk in images.split(ENCODE_BATCH):
            encoded = vae.encode(chunk.float().to(device))
            mean = _posterior_mean(vae, encoded)
            parts.append((mean - shift) * vae.config.scaling_factor)
    # Cloned outside inference mode: x0 meets autograd later.
    return torch.cat(parts).clone()


def _posterior_mean(vae: Autoencoder, encoded: Any) -> torch.Tensor:
    if isinstance(vae, VQModel):
        return encoded.latents
    return encoded.latent if isinstance(vae, AutoencoderDC) else encoded.latent_dist.mean


def image_shape(
    latent_shape: tuple[int, int, int], vae: Autoencoder | None
) -> tuple[int, int, int]:
    """(channels, size, size) of the images behind latents [C, h, w]; the same without a VAE."""
    if vae is None:
        return latent_shape
    deep = isinstance(vae, AutoencoderDC)
    widths = vae.config.encoder_block_out_channels if deep else vae.config.block_out_channels
    halvings = len(widths) - 1
    return (vae.config.in_channels, *(side * 2**halvings for side in latent_shape[1:]))
