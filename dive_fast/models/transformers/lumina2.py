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

LENGTH = 256  # tokens of a prompt, at most: the pipeline's default


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
            prompts, False, device=device, max_sequence_length=LENGTH
        )
        return masked(sequence, mask)

    @classmethod
    def widths(cls, network: nn.Module) -> dict[str, int]:
        return {"sequence": network.config.cap_feat_dim}

    @classmethod
    def check_network(cls, network: nn.Module, directory: Path) -> None:
        super().check_network(network, directory)
        places = network.config.axes_lens[0]
        if places <= LENGTH:  # the image's own place comes after the tokens
            raise ModelError(
                f"expected axes_lens of the transformer in {directory} that begin above the "
                f"{LENGTH} tokens of a prompt, got {places}."
            )

    @classmethod
    def sides(cls, network: nn.Module) -> range:
        patch = network.config.patch_size
        return range(patch, min(network.config.axes_lens[1:]) * patch + 1, patch)

    def run(self, x_t: Tensor, t: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        return -self.network(
            hidden_states=x_t,
            timestep=1 - self.sigma(t),
            encoder_hidden_states=parts["sequence"],
            encoder_attention_mask=tokens(parts["mask"]),
        ).sample

    def image_tokens(self, layer: str, found: Tensor, condition: Tensor) -> Tensor:
        """Behind the prompt's own tokens, however many a row has."""
        if not layer.startswith("layers."):
            return found
        seen = tokens(self.text.parts.unpack(condition)["mask"]).sum(dim=1)
        place = torch.arange(self.n_tokens(self.network.config.patch_size), device=found.device)
        index = (seen[:, None] + place)[:, :, None]
        return found.gather(1, index.expand(-1, -1, found.shape[2]))


def load(directory: Path, **asked: Any) -> Lumina2:
    """See ``load_transformer``."""
    return load_transformer(Lumina2, directory, **asked)
