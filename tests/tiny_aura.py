"""A small AuraFlow: of the text-to-image transformers the one with the fewest parts."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler
from flow_families import make_vae
from pipelines import make_t5, make_t5_tokenizer, save


def write_aura(directory: Path, dtype: torch.dtype = torch.float32) -> Path:
    """With a text encoder in this precision."""
    return save(lambda: _make(dtype), directory)


def _make(dtype: torch.dtype) -> AuraFlowPipeline:
    tokenizer = make_t5_tokenizer()
    network = AuraFlowTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_mmdit_layers=1,
        num_single_dit_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, caption_projection_dim=16, pos_embed_max_size=64,
    )  # fmt: skip
    return AuraFlowPipeline(
        tokenizer=tokenizer,
        text_encoder=make_t5(tokenizer).to(dtype),
        vae=make_vae(shift=None),
        transformer=network.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
