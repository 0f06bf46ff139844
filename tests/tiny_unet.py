"""Tiny UNets of the real class in the layouts of the published checkpoints, random weights."""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel

_SMALL = {"sample_size": 8, "in_channels": 4, "out_channels": 4, "norm_num_groups": 8}
_ATTN_DOWN, _DOWN = "CrossAttnDownBlock2D", "DownBlock2D"
_ATTN_UP, _UP = "CrossAttnUpBlock2D", "UpBlock2D"

LAYOUTS = {
    "sd1": {
        **_SMALL,
        "block_out_channels": (16, 32),
        "layers_per_block": 2,
        "down_block_types": (_ATTN_DOWN, _DOWN),
        "up_block_types": (_UP, _ATTN_UP),
        "cross_attention_dim": 24,
        "attention_head_dim": 4,
    },
    # One number of heads per level, linear projections, as SD 2.x.
    "sd2": {
        **_SMALL,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "down_block_types": (_ATTN_DOWN, _DOWN),
        "up_block_types": (_UP, _ATTN_UP),
        "cross_attention_dim": 20,
        "attention_head_dim": (2, 4),
        "use_linear_projection": True,
    },
    "sdxl": {
        **_SMALL,
        "block_out_channels": (16, 32, 32),
        "layers_per_block": 1,
        "down_block_types": (_DOWN, _ATTN_DOWN, _ATTN_DOWN),
        "up_block_types": (_ATTN_UP, _ATTN_UP, _UP),
        "transformer_layers_per_block": (1, 1, 2),
        "cross_attention_dim": 24,
        "attention_head_dim": (2, 4, 4),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 12,
    },
    # Latent diffusion, attention at every level.
    "ldm": {
        **_SMALL,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (16, 16, 32),
        "layers_per_block": 1,
        "down_block_types": (_ATTN_DOWN,) * 3,
        "up_block_types": (_ATTN_UP,) * 3,
        "cross_attention_dim": 16,
        "attention_head_dim": 8,
    },
    # Latent diffusion, layout to image: the highest resolutions have no attention.
    "ldm_layout": {
        **_SMALL,
        "block_out_channels": (16, 16, 32),
        "layers_per_block": 2,
        "down_block_types": (_DOWN, _DOWN, _ATTN_DOWN),
        "up_block_types": (_ATTN_UP, _UP, _UP),
        "cross_attention_dim": 16,
        "attention_head_dim": 8,
        "center_input_sample": True,
        "time_embedding_act_fn": "silu",
    },
    # Distilled Stable Diffusion: no mid block, two transformer blocks each.
    "no_mid": {
        **_SMALL,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "down_block_types": (_ATTN_DOWN, _ATTN_DOWN),
        "mid_block_type": None,
        "up_block_types": (_ATTN_UP, _ATTN_UP),
        "transformer_layers_per_block": 2,
        "cross_attention_dim": 24,
        "attention_head_dim": 4,
    },
}


def make_unet(layout: str = "sd1", seed: int = 0, **changes) -> UNet2DConditionModel:
    """A frozen UNet whose prediction depends on its condition."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(**{**LAYOUTS[layout], **changes})
        for name, parameter in unet.named_parameters():
            if "attn2.to_v" in name or "add_embedding" in name:
                parameter.data *= 4
    return unet.requires_grad_(False).eval()


def make_inputs(
    unet: UNet2DConditionModel, rows: int = 3, size: int = 8, tokens: int = 5, seed: int = 0
) -> dict:
    """Arguments of its forward, of as many rows, all different."""
    generator = torch.Generator().manual_seed(seed)
    config = unet.config
    inputs = {
        "sample": torch.randn(rows, config.in_channels, size, size, generator=generator),
        "timestep": torch.randint(0, 1000, (rows,), generator=generator),
        "encoder_hidden_states": torch.randn(
            rows, tokens, config.cross_attention_dim, generator=generator
        ),
    }
    if config.addition_embed_type == "text_time":
        inputs["added_cond_kwargs"] = {
            "text_embeds": torch.randn(rows, 12, generator=generator),
            "time_ids": torch.randint(0, 64, (rows, 6), generator=generator),
        }
    return inputs
