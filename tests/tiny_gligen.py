"""Small GLIGEN checkpoints of the real classes, as ``save_pretrained`` writes them.

Random weights, with gates open and scaled so that the layout moves the loss: answers mean nothing,
but they differ.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import DDPMScheduler, StableDiffusionGLIGENPipeline, UNet2DConditionModel
from tiny_sd import make_text_encoder, make_unet, make_vae, save_pipeline, write_tokenizer
from transformers import CLIPTokenizer


def make_gated_unet(**changes: object) -> UNet2DConditionModel:
    unet = make_unet(12, **({"attention_type": "gated"} | changes))
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "alpha" in name:
                parameter.fill_(0.8)
            elif "null" in name:
                parameter.normal_()
            elif parameter.ndim == 2 and ("fuser.attn" in name or "position_net" in name):
                parameter.mul_(4)
            elif parameter.ndim == 2 and "fuser.linear" in name:
                parameter.mul_(20)
    return unet.requires_grad_(False)


def make_pipeline(
    folder: Path, *, seed: int = 0, text_width: int = 12, **changes: object
) -> StableDiffusionGLIGENPipeline:
    """The tokenizer's files go to ``folder``; changes are of the UNet."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = CLIPTokenizer.from_pretrained(write_tokenizer(folder / "tokenizer"))
        return StableDiffusionGLIGENPipeline(
            make_vae(),
            make_text_encoder(tokenizer, width=text_width),
            tokenizer,
            make_gated_unet(**changes),
            DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


def write_gligen(directory: Path, **options: object) -> Path:
    """Images of 16 x 16, latents of 8 x 8."""
    return save_pipeline(make_pipeline(directory, **options), directory)
