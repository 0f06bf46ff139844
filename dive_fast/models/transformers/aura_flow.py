"""The family "aura-flow": AuraFlow (fal), a rectified flow."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dive_fast.models.base import check_sizes
from dive_fast.models.transformers.base import TextTransformer, load_transformer


class AuraFlow(TextTransformer):
    """A condition is T5's sequence and the mask of its tokens: the network gets zeros elsewhere."""

    family = "aura-flow"
    pipeline_class = "AuraFlowPipeline"
    network_class = "AuraFlowTransformer2DModel"
    constants = ("mask",)

    @staticmethod
    def encode_prompts(
        pipeline: Any, prompts: list[str], device: torch.device
    ) -> dict[str, Tensor]:
        sequence, mask, _, _ = pipeline.encode_prompt(
            prompts, do_classifier_free_guidance=False, device=device
        )
        # The pipeline gives the mask once for each of the sequence's channels.
        return {"sequence": sequence, "mask": mask.view(sequence.shape)[..., 0]}

    @classmethod
    def check_network(cls, network: nn.Module, directory: Path) -> None:
        check_sizes(network, f"transformer in {directory}")

    @classmethod
    def sides(cls, network: nn.Module) -> range:
        patch, positions = network.config.patch_size, network.config.pos_embed_max_size
        return range(patch, math.isqrt(positions) * patch + 1, patch)

    @classmethod
    def widths(cls, network: nn.Module) -> dict[str, int]:
        return {"sequence": network.config.joint_attention_dim}

    def run(self, x_t: Tensor, t: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        return self.network(
            x_t,
            encoder_hidden_states=parts["sequence"] * (parts["mask"] > 0).unsqueeze(-1),
            timestep=self.sigma(t),
        ).sample

    def image_tokens(self, layer: str, found: Tensor, condition: Tensor) -> Tensor:
        """Behind the prompt's in the single blocks."""
        if not layer.startswith("single_transformer_blocks."):
            return found
        return found[:, -self.n_tokens(self.network.config.patch_size) :]


def load(directory: Path, **asked: Any) -> AuraFlow:
    """See ``load_transformer``."""
    return load_transformer(AuraFlow, directory, **asked)
