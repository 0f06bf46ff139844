"""The family "stable-diffusion-3": SD3 and SD3.5 (arXiv 2403.03206), a rectified flow."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dive_fast.models.transformers.base import TextTransformer, load_transformer


class StableDiffusion3(TextTransformer):
    """A condition is CLIP's and T5's sequence and CLIP's pooled vector."""

    family = "stable-diffusion-3"
    pipeline_class = "StableDiffusion3Pipeline"
    network_class = "SD3Transformer2DModel"
    optional = ("tokenizer_3", "text_encoder_3")

    @staticmethod
    def encode_prompts(
        pipeline: Any, prompts: list[str], device: torch.device
    ) -> dict[str, Tensor]:
        sequence, _, pooled, _ = pipeline.encode_prompt(
            prompts, None, None, device=device, do_classifier_free_guidance=False
        )
        return {"sequence": sequence, "pooled": pooled}

    @classmethod
    def sides(cls, network: nn.Module) -> range:
        patch = network.config.patch_size
        return range(patch, network.config.pos_embed_max_size * patch + 1, patch)

    @classmethod
    def widths(cls, network: nn.Module) -> dict[str, int]:
        return {
            "sequence": network.config.joint_attention_dim,
            "pooled": network.config.pooled_projection_dim,
        }

    def run(self, x_t: Tensor, t: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        return self.network(
            x_t,
            timestep=self.sigma(t) * len(self.schedule),
            encoder_hidden_states=parts["sequence"],
            pooled_projections=parts["pooled"],
        ).sample


def load(directory: Path, **asked: Any) -> StableDiffusion3:
    """See ``load_transformer``."""
    return load_transformer(StableDiffusion3, directory, **asked)
