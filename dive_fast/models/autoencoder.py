"""Images to latents, for every family that has one of ``AUTOENCODERS``.

A VAE's configuration states what its latents are normalised by:

    x0 = (posterior mean - shift_factor) x scaling_factor
    x0 = (posterior mean - latents_mean) x scaling_factor / latents_std      per channel
"""

from __future__ import annotations

import inspect
import re
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny, VQModel

from dive_fast.core.numbers import is_number
from dive_fast.errors import ModelError, shown
from dive_fast.models.tiny_autoencoder import AutoencoderTAEF2

ENCODE_BATCH = 16
AUTOENCODERS = {
    "AutoencoderKL": AutoencoderKL,
    "AutoencoderTiny": AutoencoderTiny,
    "AutoencoderTAEF2": AutoencoderTAEF2,
    "AutoencoderDC": AutoencoderDC,
    "VQModel": VQModel,
}

# Pipelines that are published with the first run with the second, too: a distilled one (TAESD).
KL_OR_TINY = ("AutoencoderKL", "AutoencoderTiny", "AutoencoderTAEF2")

Autoencoder = AutoencoderKL | AutoencoderTiny | AutoencoderTAEF2 | AutoencoderDC | VQModel

# What diffusers' pipelines do not apply, although a VAE may state it: read from their sources.
_ALL = ("shift_factor", "latents_mean", "latents_std")
_NOT_APPLIED = {
    "DiTPipeline": _ALL,
    "LDMPipeline": _ALL,
    "StableDiffusionPipeline": _ALL,
    "StableDiffusionImg2ImgPipeline": _ALL,
    "StableDiffusionGLIGENPipeline": _ALL,
    "StableDiffusionXLPipeline": ("shift_factor",),
    "StableDiffusionXLImg2ImgPipeline": ("shift_factor",),
}
# How a key is called that would normalise latents in a way that nobody here knows.
_NORMALISES = re.compile(r"scal|shift|mean|std|bias|latent|normali[sz]", re.IGNORECASE)


class Normalisation(NamedTuple):
    """x0 = (posterior mean - shift) x scale / std."""

    shift: torch.Tensor  # float32 [1, C or 1, 1, 1]
    scale: float
    std: torch.Tensor  # float32 [1, C or 1, 1, 1]


def latent_channels(vae: Autoencoder) -> int:
    """C of the latents."""
    if isinstance(vae, VQModel) and vae.config.vq_embed_dim is not None:
        return vae.config.vq_embed_dim
    return vae.config.latent_channels


def normalisation(vae: Autoencoder, pipeline: str | None = None) -> Normalisation:
    """What the VAE's configuration states.

    Args:
        pipeline: the class of the pipeline that the VAE is a part of, where it is known; what that
            pipeline does not apply is refused, because the network was trained without it.

    Raises:
        ModelError: not a number, out of range, contradictory, or a key that is not known.
    """
    config = vae.config
    stated = {key: config.get(key) for key in _ALL}
    stated = {key: value for key, value in stated.items() if value is not None}
    for key in stated:
        if key in _NOT_APPLIED.get(pipeline, ()) and stated[key] != 0:
            raise ModelError(
                f"the VAE states {key}, which a {pipeline} does not apply: expected none."
            )
    known = inspect.signature(type(vae).__init__).parameters.keys() | set(_ALL)
    for key, value in config.items():
        if key not in known and key[:1] != "_" and value is not None and _NORMALISES.search(key):
            raise ModelError(f"the VAE states {key}, which is not known: {shown(value)}.")
    scale = config.get("scaling_factor")
    if not _is_float32(scale) or not torch.tensor(scale, dtype=torch.float32) > 0:
        raise ModelError(f"scaling_factor of the VAE must be a number above 0, got {shown(scale)}.")
    shift = stated.get("shift_factor", 0.0)
    if not _is_float32(shift):
        raise ModelError(f"shift_factor of the VAE must be a number, got {shown(shift)}.")
    if ("latents_mean" in stated) != ("latents_std" in stated):
        raise ModelError("expected both latents_mean and latents_std of the VAE, got one of them.")
    if "latents_mean" not in stated:
        return Normalisation(_per_channel([shift]), scale, torch.ones(1, 1, 1, 1))
    if shift != 0:
        raise ModelError("expected shift_factor or latents_mean of the VAE, got both.")
    mean, std = (_read(key, stated[key], latent_channels(vae)) for key in _ALL[1:])
    if not (std > 0).all():
        raise ModelError(f"latents_std of the VAE must be above 0, got {shown(std.tolist())}.")
    return Normalisation(_per_channel(mean), scale, _per_channel(std))


def _read(key: str, values: Any, channels: int) -> torch.Tensor:
    """float32 [C]."""
    listed = values if isinstance(values, list | tuple) else []
    if len(listed) != channels or not all(map(_is_float32, listed)):
        raise ModelError(
            f"{key} of the VAE must be {channels} numbers, one per channel of its latents, "
            f"got {shown(values)}."
        )
    return torch.tensor(listed, dtype=torch.float32)


def _is_float32(value: Any) -> bool:
    return is_number(value) and abs(value) <= torch.finfo(torch.float32).max


def _per_channel(values: Any) -> torch.Tensor:
    return torch.as_tensor(values, dtype=torch.float32).view(1, -1, 1, 1)


def encode_latents(vae: Autoencoder, images: torch.Tensor, device: torch.device) -> torch.Tensor:
    """x0 as the top of this file has it, float32 [B, C, h, w].

    Of a ``VQModel`` the latents before quantisation stand for the posterior mean, of an
    ``AutoencoderDC``, an ``AutoencoderTiny`` or an ``AutoencoderTAEF2`` its only latents.

    Args:
        images: [B, channels, size, size] in [-1, 1].

    Raises:
        ModelError: see ``normalisation``.
    """
    shift, scale, std = normalisation(vae)
    shift, std = shift.to(device), std.to(device)
    parts = []
    with torch.inference_mode():
        for chunk in images.split(ENCODE_BATCH):
            encoded = vae.encode(chunk.float().to(device))
            parts.append((_posterior_mean(vae, encoded) - shift) * scale / std)
    # Cloned outside inference mode: x0 meets autograd later.
    return torch.cat(parts).clone()


def _posterior_mean(vae: Autoencoder, encoded: Any) -> torch.Tensor:
    if isinstance(vae, VQModel | AutoencoderTiny | AutoencoderTAEF2):
        return encoded.latents
    return encoded.latent if isinstance(vae, AutoencoderDC) else encoded.latent_dist.mean


def image_shape(
    latent_shape: tuple[int, int, int], vae: Autoencoder | None
) -> tuple[int, int, int]:
    """(channels, size, size) of the images behind latents [C, h, w]; the same without a VAE."""
    if vae is None:
        return latent_shape
    # Those two have a decoder of its own shape.
    apart = isinstance(vae, AutoencoderDC | AutoencoderTiny)
    widths = vae.config.encoder_block_out_channels if apart else vae.config.block_out_channels
    halvings = len(widths) - 1
    return (vae.config.in_channels, *(side * 2**halvings for side in latent_shape[1:]))
