"""Transformers that read a prompt's sequence under the mask of its tokens."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from dive_fast.models.base import check_sizes
from dive_fast.models.transformers.base import MOST_SIDE, TextTransformer


class MaskedTransformer(TextTransformer):
    """A condition is a sequence and the mask of its tokens; see ``TextTransformer``."""

    constants = ("mask",)

    @classmethod
    def check_network(cls, network: nn.Module, directory: Path) -> None:
        check_sizes(network, f"transformer in {directory}")

    @classmethod
    def sides(cls, network: nn.Module) -> range:
        patch = network.config.patch_size
        return range(patch, MOST_SIDE + 1, patch)

    @classmethod
    def widths(cls, network: nn.Module) -> dict[str, int]:
        return {"sequence": network.config.caption_channels}


def masked(sequence: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """The parts of conditions; 0 where the network does not look.

    What a text encoder makes of padding is many times as much as a prompt, differs from prompt to
    prompt, and would decide which class is nearest. Attention without any token is even, so there
    all of it is seen.

    Args:
        sequence: float [N, L, width].
        mask: int [N, L], 1 for a token and 0 for padding.
    """
    seen = (mask > 0) | (mask == 0).all(dim=1, keepdim=True)
    return {"sequence": sequence * seen.unsqueeze(-1), "mask": mask}


def tokens(mask: Tensor) -> Tensor:
    """The mask as the tokenizer gives it, int64: of a mean, every token that one of them has."""
    return (mask > 0).to(torch.int64)
