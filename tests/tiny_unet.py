"""A small text-conditional UNet of diffusers' own class: answers mean nothing, but they differ."""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel

CHANNELS, SIZE, LENGTH, WIDTH = 4, 8, 3, 16


def make_unet(seed: int = 0, **config) -> UNet2DConditionModel:
    """Latents of 4 x 8 x 8, conditions of 3 tokens of 16."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            **{
                "sample_size": SIZE,
                "in_channels": CHANNELS,
                "out_channels": CHANNELS,
                "block_out_channels": (8, 16),
                "layers_per_block": 1,
                "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
                "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
                "cross_attention_dim": WIDTH,
                "attention_head_dim": 4,
                "norm_num_groups": 4,
                **config,
            }
        )
        for name, parameter in unet.named_parameters():
            if ".attn2." in name and name.endswith("weight"):
                # Large enough that the condition, which enters here, moves the loss.
                torch.nn.init.normal_(parameter, std=0.5)
    return unet.eval().requires_grad_(False)


def make_text(n_prompts: int, seed: int = 1) -> torch.Tensor:
    """[P, L, D]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n_prompts, LENGTH, WIDTH, generator=generator)
