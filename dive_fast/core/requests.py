"""What a strategy asks for, and what it gives in the end.

A strategy is a generator for one image: it yields requests, the engine answers them.
"""

from __future__ import annotations

from collections.abc import Generator, Hashable
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, ClassVar, NamedTuple

import torch

from dive_fast.errors import DiveFastError, shown

POOLS = ("mean", "attention", None)


@dataclass(frozen=True)
class Request:
    """Names conditions and probes: every pair of the two is one row of the network's input.

    Attributes:
        conditions: int64 [n], rows of the vocabulary, or float32 [n, D], relaxed embeddings. What
            depends on the class alone is computed once for all requests that name it.
        probe_ids: int64 [k], rows of the probe list.
    """

    conditions: torch.Tensor
    probe_ids: torch.Tensor
    passes: ClassVar[int] = 1  # of the network on a row: a forward, and a backward

    @property
    def relaxed(self) -> bool:
        return self.conditions.is_floating_point()

    @property
    def group(self) -> tuple[Hashable, ...]:
        """Its kind, and what else rows must have in common to be one batch."""
        return (type(self),)


class Losses(Request):
    """Asks for the losses of conditions on probes; answered by float32 [n, k] on the CPU."""


class Gradients(Request):
    """Asks for losses and for each embedding's gradient of its mean loss over the probes.

    Answered by ``LossesAndGradients``.
    """

    passes = 2


class ErrorMaps(Request):
    """Asks where conditions are wrong: the loss before its mean over the pixels.

    Answered by float32 [n, h, w] on the CPU, the mean over the probes; its mean over the pixels is
    the mean loss.
    """


@dataclass(frozen=True)
class Features(Request):
    """Asks what a block of the network makes of x_t, t and the conditions.

    Answered by float32 on the CPU: [n, k, D] with a pool; without one [n, k, D, h, w] of a block of
    feature maps, [n, k, N, D] of a block of N tokens. A row counts as one evaluation, although the
    network stops behind the block.

    Attributes:
        layer: a name or an index of ``models.layers.layer_names``, or another module of the
            network in dots.
        pool: over the positions z_i: "mean"; "attention", sum_i softmax_i(z_i . m / sqrt(D)) z_i
            with their mean m; None for none.

    Raises:
        DiveFastError: a layer that is neither text nor whole number, or another pool.
    """

    layer: str | int
    pool: str | None = "mean"

    def __post_init__(self) -> None:
        if isinstance(self.layer, Integral) and not isinstance(self.layer, bool):
            object.__setattr__(self, "layer", int(self.layer))
        elif not isinstance(self.layer, str):
            raise DiveFastError(
                f"expected a layer by its name or its index, got {shown(self.layer)}."
            )
        if not isinstance(self.pool, str | None) or self.pool not in POOLS:
            raise DiveFastError(
                f"expected a pool of 'mean', 'attention' or None, got {shown(self.pool)}."
            )

    @property
    def group(self) -> tuple[Hashable, ...]:
        """Of other layers and pools the rows have other shapes."""
        return (type(self), self.layer, self.pool)


class LossesAndGradients(NamedTuple):
    """losses float32 [n, k]; gradients float32 [n, D] of ``losses.mean(dim=1)``; on the CPU.

    ``exact`` is False where activations of an earlier condition were reused (cache level
    "encoder"): good enough for a direction, not for a comparison of classes.
    """

    losses: torch.Tensor
    gradients: torch.Tensor
    exact: bool = True


@dataclass(frozen=True)
class Answer:
    """What a strategy found for one image.

    Attributes:
        index: the best class.
        losses: float32 [C], mean loss of each class, comparable between classes, NaN where it was
            not measured.
        n_probes: int64 [C], on how many probes.
        trace: what the strategy saw on its way.
        bound: float32 [C] for classes that were given up before all was measured: with the
            strategy's confidence, ``losses[c] - losses[index]`` is at least this. NaN elsewhere.
    """

    index: int
    losses: torch.Tensor
    n_probes: torch.Tensor
    trace: dict[str, Any] = field(default_factory=dict)
    bound: torch.Tensor | None = None


Search = Generator[Request, Any, Answer]
