"""Images to latents, for every family that has an ``AutoencoderKL`` or a ``VQModel``."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, VQModel

ENCODE_BATCH = 16
AUTOENCODERS = {"AutoencoderKL": AutoencoderKL, "VQModel": VQModel}

Autoencoder = AutoencoderKL | VQModel


def latent_channels(vae: Autoencoder) -> int:
    """C of the latents."""
    if isinstance(vae, VQModel) and vae.config.vq_embed_dim is not None:
        return vae.config.vq_embed_dim
    return vae.config.latent_channels


def encode_latents(vae: Autoencoder, images: torch.Tensor, device: torch.device) -> torch.Tensor:
    """x0 = (posterior mean - shift) x scaling factor, float32 [B, C, h, w].

    Of a ``VQModel`` the latents before quantisation stand for the posterior mean.

    Args:
        images: [B, channels, size, size] in [-1, 1].
    """
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    parts = []
    with torch.inference_mode():
        for chunk in images.split(ENCODE_BATCH):
            encoded = vae.encode(chunk.float().to(device))
            mean = encoded.latents if isinstance(vae, VQModel) else encoded.latent_dist.mean
            parts.append((mean - shift) * vae.config.scaling_factor)
    # Cloned outside inference mode: x0 meets autograd later.
    return torch.cat(parts).clone()


def image_shape(
    latent_shape: tuple[int, int, int], vae: Autoencoder | None
) -> tuple[int, int, int]:
    """(channels, size, size) of the images behind latents [C, h, w]; the same without a VAE."""
    if vae is None:
        return latent_shape
    halvings = len(vae.config.block_out_channels) - 1
    return (vae.config.in_channels, *(side * 2**halvings for side in latent_shape[1:]))
