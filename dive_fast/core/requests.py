"""What a strategy asks for, and what it gives in the end.

A strategy is a generator for one image: it yields requests, the engine answers them.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch


@dataclass(frozen=True)
class Losses:
    """Asks for the losses of conditions on probes; answered by float32 [n, k] on the CPU.

    Attributes:
        conditions: float32 [n, D], embeddings.
        probe_ids: int64 [k], rows of the probe list.
        classes: int64 [n], the row of the vocabulary that each condition is, so that the engine may
            compute once what depends on the class alone; None for relaxed embeddings.
    """

    conditions: torch.Tensor
    probe_ids: torch.Tensor
    classes: torch.Tensor | None = None


@dataclass(frozen=True)
class Gradients:
    """Asks for losses and for each embedding's gradient of its mean loss over the probes.

    Answered by ``LossesAndGradients``. Attributes as in ``Losses``.
    """

    conditions: torch.Tensor
    probe_ids: torch.Tensor
    classes: torch.Tensor | None = None


@dataclass(frozen=True)
class ErrorMaps:
    """Asks where conditions are wrong: the loss before its mean over the pixels.

    Answered by float32 [n, h, w] on the CPU, the mean over the probes; its mean over the pixels is
    the mean loss. Attributes as in ``Losses``.
    """

    conditions: torch.Tensor
    probe_ids: torch.Tensor
    classes: torch.Tensor | None = None


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


Request = Losses | Gradients | ErrorMaps
Search = Generator[Request, Any, Answer]
