"""A condition of several parts as one flat row of floats, and back.

A search optimises one row per answer. What a network takes beside a sequence (a pooled vector, the
mask of its padding) is part of that row; what is no embedding is constant: it gets no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dive_fast.errors import ModelError


@dataclass(frozen=True)
class ConditionParts:
    """The parts of a condition, in the order of the row.

    Attributes:
        shapes: of each part of one condition, by name.
        constants: parts that are not optimised, such as masks of 0 and 1. Of a mean of several
            rows a mask is above 0 wherever one of them has a token.
    """

    shapes: Mapping[str, tuple[int, ...]]
    constants: Collection[str] = ()

    @classmethod
    def of(cls, parts: Mapping[str, Tensor], constants: Collection[str] = ()) -> ConditionParts:
        """Those of a batch of conditions, each part [N, ...]."""
        return cls({name: tuple(part.shape[1:]) for name, part in parts.items()}, constants)

    @property
    def dim(self) -> int:
        """D, the length of the row."""
        return sum(map(math.prod, self.shapes.values()))

    def pack(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Parts [N, ...] to rows [N, D], float32.

        Raises:
            ModelError: other parts, or parts of another shape.
        """
        found = {name: tuple(part.shape[1:]) for name, part in parts.items()}
        if found != dict(self.shapes):
            raise ModelError(
                f"expected the parts of a condition to have the shapes {dict(self.shapes)}, "
                f"got {found}."
            )
        return torch.cat([parts[name].flatten(1).float() for name in self.shapes], dim=1)

    def unpack(self, rows: Tensor) -> dict[str, Tensor]:
        """Rows [N, D] to parts [N, ...]; differentiable but for the constants.

        Raises:
            ModelError: rows of another width.
        """
        if rows.ndim != 2 or rows.shape[1] != self.dim:
            raise ModelError(f"expected conditions [N, {self.dim}], got {list(rows.shape)}.")
        sizes = [math.prod(shape) for shape in self.shapes.values()]
        parts = {}
        for (name, shape), part in zip(self.shapes.items(), rows.split(sizes, dim=1), strict=True):
            part = part.unflatten(1, shape) if shape else part[:, 0]
            parts[name] = part.detach() if name in self.constants else part
        return parts
