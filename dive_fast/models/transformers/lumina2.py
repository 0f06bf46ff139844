"""The family "lumina-2": Lumina-Image 2.0 (arXiv 2503.21758), a rectified flow told backwards."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dive_fast.errors import ModelError
from dive_fast.models.transformers.base import load_transformer
from dive_fast.models.transformers.gemma import GemmaTransformer
from dive_fast.models.transformers.masked import masked, tokens


class Lumina2(GemmaTransformer):
    """A condition is Gemma's last layer but one behind a system prompt, 256 tokens, and its mask.

    The network's time runs from noise to image, and so does its prediction x0 - eps.
    """

    family = "lumina-2"
    pipeline_class = "Lumina2Pipeline"
    network_class = "Lumina2Transformer2DModel"

    @staticmethod
    def encode_prompts(
        pipeline: Any, prompts: list[str], device: torch.device
    ) -> dict[str, Tensor]:
        sequence, mask, _, _ = pipeline.encode_prompt(
            prompts, do_classifier_free_guidance=False, device=device
        )
        return masked(sequence, mask)

    @classmethod
    def text_width(cls, network: nn.Module) -> int:
        return network.config.cap_feat_dim

    @classmethod
    def check_length(cls, network: nn.Module, length: int) -> None:
        # The image's own place comes after the tokens.
        if length >= network.config.axes_lens[0]:
            raise ModelError(
                f"expected a transformer whose axes_lens begin above the {length} tokens of a "
                f"prompt, got {network.config.axes_lens[0]}."
            )

    @classmethod
    def check_network(cls, network: nn.Module, directory: Path) -> None:
        super().check_network(network, directory)
        patches = network.config.sample_size // network.config.patch_size
        if patches > min(network.config.axes_lens[1:]):
            raise ModelError(
                f"expected axes_lens of at least {patches} patches a side of the transformer in "
                f"{directory}, got {list(network.config.axes_lens)}."
            )

    def run(self, x_t: Tensor, t: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        return -self.network(
            hidden_states=x_t,
            timestep=1 - self.sigma(t),
            encoder_hidden_states=parts["sequence"],
            encoder_attention_mask=tokens(parts["mask"]),
        ).sample


def load(directory: Path, **asked: Any) -> Lumina2:
    """See ``load_transformer``."""
    return load_transformer(Lumina2, directory, **asked)
