"""A small PixArt: a text-to-image transformer whose condition has a mask of the prompt."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
)
from pipelines import make_t5, make_t5_tokenizer, save
from tiny_sd import make_vae


def make_network(sample_size: int = 8, patch_size: int = 2) -> PixArtTransformer2DModel:
    """Weights scaled so that the prompt moves the result."""
    network = PixArtTransformer2DModel(
        sample_size=sample_size, patch_size=patch_size, in_channels=4, out_channels=8,
        num_layers=2, num_attention_heads=2, attention_head_dim=12, cross_attention_dim=24,
        caption_channels=16,
    ).eval()  # fmt: skip
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "attn2" in name and parameter.ndim == 2:
                parameter.mul_(3)
    return network


def make_pixart(kind: type, **network: int):
    tokenizer = make_t5_tokenizer()
    return kind(
        tokenizer=tokenizer,
        text_encoder=make_t5(tokenizer),
        vae=make_vae(),
        transformer=make_network(**network),
        scheduler=DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02),
    )


def write_pixart(directory: Path) -> Path:
    """PixArt-alpha."""
    return save(lambda: make_pixart(PixArtAlphaPipeline), directory)
