"""The timestep and label embedder of a DiT, evaluated once instead of once per block.

diffusers' ``DiTTransformer2DModel`` keeps a copy of it in every block and evaluates each, and the
first once more for the output layer. Where the copies are equal, so are their results.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from diffusers import DiTTransformer2DModel
from torch import Tensor, nn

from dive_fast.models.dit.model import embedders_are_equal

__all__ = ["DiTTransformer2DModel", "embedders", "embedders_are_equal", "with_shared_embedder"]


class _Once(nn.Module):
    """Stands for all the copies during one forward, whose arguments are the same everywhere."""

    def __init__(self, embedder: nn.Module) -> None:
        super().__init__()
        self.embedder = embedder
        self.results: dict[Any, Tensor] = {}

    def forward(self, timestep, class_labels, hidden_dtype=None) -> Tensor:
        if hidden_dtype not in self.results:
            self.results[hidden_dtype] = self.embedder(
                timestep, class_labels, hidden_dtype=hidden_dtype
            )
        return self.results[hidden_dtype]


def embedders(transformer: DiTTransformer2DModel) -> Iterator[nn.Module]:
    """The copies, one per block."""
    return (block.norm1.emb for block in transformer.transformer_blocks)


def with_shared_embedder(transformer: DiTTransformer2DModel) -> DiTTransformer2DModel:
    """A twin for one forward that evaluates the first block's embedder and no other.

    The twin holds the same weights; the network itself is not changed.
    """
    once = _Once(transformer.transformer_blocks[0].norm1.emb)
    blocks = [
        _twin(block, norm1=_twin(block.norm1, emb=once)) for block in transformer.transformer_blocks
    ]
    return _twin(transformer, transformer_blocks=nn.ModuleList(blocks))


def _twin(module: nn.Module, **parts: nn.Module) -> nn.Module:
    """A shallow copy with some parts exchanged."""
    twin = copy.copy(module)
    twin._modules = {**module._modules, **parts}
    return twin
