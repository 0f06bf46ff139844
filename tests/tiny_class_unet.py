"""Small class-conditional UNets of diffusers in directories, as pipelines save them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMPipeline, UNet2DConditionModel, UNet2DModel
from tiny import read_json, write_json

CLASSES, SIZE = 4, 8
WIDTH = 32  # of the time embedding, and so of a class vector


def make_unet(**config: Any) -> UNet2DModel:
    """Of RGB 8 x 8; 8 and 16 channels wide."""
    given = {
        "sample_size": SIZE, "in_channels": 3, "out_channels": 3, "layers_per_block": 1,
        "block_out_channels": (8, 16), "norm_num_groups": 4, "attention_head_dim": 8,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"), "num_class_embeds": CLASSES,
    }  # fmt: skip
    return loud(UNet2DModel(**given | config))


def make_conditional(**config: Any) -> UNet2DConditionModel:
    """Without cross-attention, unless the configuration has it."""
    given = {
        "sample_size": SIZE, "in_channels": 3, "out_channels": 3, "layers_per_block": 1,
        "block_out_channels": (8, 16), "norm_num_groups": 4, "attention_head_dim": 8,
        "cross_attention_dim": 6, "mid_block_type": "UNetMidBlock2D",
        "down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2,
    }  # fmt: skip
    return loud(UNet2DConditionModel(**given | config))


def loud(unet: Any) -> Any:
    """So that the class moves the output by as much as the image does."""
    with torch.no_grad():
        for name, weight in unet.named_parameters():
            if "time_emb_proj" in name or "class_embedding.linear" in name or "attn2" in name:
                weight.mul_(4)
    return unet.eval()


def write(pipeline: DDPMPipeline, directory: Path, index: Any = None, **extra: Any) -> Path:
    """Saves it, with more entries in ``model_index.json``, and ``dive_fast.json``."""
    pipeline.save_pretrained(directory)
    path = directory / "model_index.json"
    write_json(path, read_json(path) | (index or {}))
    if extra:
        write_json(directory / "dive_fast.json", extra)
    return directory
