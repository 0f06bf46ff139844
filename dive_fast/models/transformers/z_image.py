"""The family "z-image": Z-Image (arXiv 2511.22699), a rectified flow told 1 - sigma."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dive_fast.errors import ModelError
from dive_fast.models.transformers.base import TextTransformer, load_transformer

LENGTH = 512  # tokens of a prompt, at most: the pipeline's default
PATCH = 2  # the network's default, which its pipeline takes


class ZImage(TextTransformer):
    """A condition is the prompt's tokens, followed by zeros, and the mask that tells them apart.

    The network takes lists of prompts of any length, and gives x0 - eps.
    """

    family = "z-image"
    pipeline_class = "ZImagePipeline"
    network_class = "ZImageTransformer2DModel"
    constants = ("mask",)

    @staticmethod
    def encode_prompts(
        pipeline: Any, prompts: list[str], device: torch.device
    ) -> dict[str, Tensor]:
        found, _ = pipeline.encode_prompt(
            prompts, device, do_classifier_free_guidance=False, max_sequence_length=LENGTH
        )
        sequence = found[0].new_zeros(len(found), LENGTH, found[0].shape[1])
        mask = sequence.new_zeros(len(found), LENGTH)
        for i, tokens in enumerate(found):
            sequence[i, : len(tokens)], mask[i, : len(tokens)] = tokens, 1
        return {"sequence": sequence, "mask": mask}

    @classmethod
    def check_network(cls, network: nn.Module, directory: Path) -> None:
        patches = [*zip(network.all_patch_size, network.all_f_patch_size, strict=True)]
        if (PATCH, 1) not in patches:
            raise ModelError(
                f"expected a network in {directory} with patches of {PATCH} x {PATCH} pixels of "
                f"one frame, got {patches}."
            )

    @classmethod
    def latents(cls, network: nn.Module) -> tuple[int, int, int]:
        side = 128  # the pipeline's 1024 pixels
        return (network.config.in_channels, side, side)

    @classmethod
    def sides(cls, network: nn.Module) -> range:
        return range(PATCH, min(network.config.axes_lens[1:]) * PATCH + 1, PATCH)

    @classmethod
    def widths(cls, network: nn.Module) -> dict[str, int]:
        return {"sequence": network.config.cap_feat_dim}

    def run(self, x_t: Tensor, t: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        lengths = (parts["mask"] > 0).sum(dim=1).tolist()
        found = self.network(
            list(x_t.unsqueeze(2)),  # one frame
            1 - self.sigma(t),
            [row[:n] for row, n in zip(parts["sequence"], lengths, strict=True)],
        ).sample
        return -torch.stack(found).squeeze(2)

    def image_tokens(self, layer: str, found: Tensor, condition: Tensor) -> Tensor:
        """Before the prompt's, and before what fills them up to a multiple of 32."""
        if not layer.startswith(("noise_refiner.", "layers.")):
            return found
        return found[:, : self.n_tokens(PATCH)]


def load(directory: Path, **asked: Any) -> ZImage:
    """See ``load_transformer``."""
    return load_transformer(ZImage, directory, **asked)
