"""The race: classes leave as soon as paired statistics say that they cannot win."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from dive_fast.core.requests import Search
from dive_fast.errors import DiveFastError
from dive_fast.strategies.base import DefaultProbes, Task
from dive_fast.strategies.elimination import Contest, PairedTest


@dataclass(frozen=True)
class Race(DefaultProbes):
    """Successive elimination on common probes, by confidence or by fixed stages.

    By confidence: after every ``round_probes`` probes, from ``min_probes`` on, each class is
    compared with the leader (lowest mean) by the one-sided paired t-test of ``PairedTest`` at level
    error / (looks (C - 1)). The class that enumeration over the same probes would answer leaves
    wrongly with probability at most ``error``: at each look only a test against one of the C - 1
    others can drop it (union bound over looks and rivals).

    By stages ``((samples, keep), ...)``: when ``samples`` probes are measured, the best ``keep``
    classes go on, without any guarantee (Diffusion Classifier, arXiv 2303.16203).

    Attributes:
        error: bound on the probability of dropping the best class.
        min_probes: probes before the first look.
        round_probes: probes between looks.
        stages: fixed stages instead; samples rise, keep falls and ends with 1.
        loss: "l2", "l1" or "huber".
    """

    name: ClassVar[str] = "race"
    error: float = 0.01
    min_probes: int = 20
    round_probes: int = 10
    stages: tuple[tuple[int, int], ...] | None = None
    loss: str = "l2"

    def __post_init__(self) -> None:
        if not 0 < self.error < 1:
            raise DiveFastError(f"error must lie between 0 and 1, got {self.error}.")
        for key, least in (("min_probes", 2), ("round_probes", 1)):
            if getattr(self, key) < least:
                raise DiveFastError(f"{key} must be at least {least}, got {getattr(self, key)}.")
        if self.stages is not None:
            object.__setattr__(self, "stages", _checked_stages(self.stages))

    def search(self, task: Task) -> Search:
        c, k = len(task.vocabulary), len(task.probes)
        if self.stages is None:
            looks = looks_every(self.min_probes, self.round_probes, k, task.probes.unit)
            keep = [None] * len(looks)
        else:
            looks, keep = zip(*self.stages, strict=True)
            if looks[-1] > k:
                raise DiveFastError(f"the stages take {looks[-1]} probes, got a list of {k}.")
        test = PairedTest(self.error / (len(looks) * max(c - 1, 1)), k, task.probes.unit)
        contest = Contest(task, looks, test)
        contest.enter(torch.arange(c))
        for n in keep:
            yield from contest.advance(n)
            if contest.decided():
                break
        return contest.answer()


def looks_every(first: int, step: int, k: int, unit: int = 1) -> tuple[int, ...]:
    """The numbers of probes at which a race looks: first, first + step, ... and k at last.

    Each is made up to whole units.
    """
    looks = sorted({-(-n // unit) * unit for n in range(first, k, step)})
    return (*(n for n in looks if n < k), k)


def _checked_stages(stages) -> tuple[tuple[int, int], ...]:
    message = (
        "stages must be pairs (samples, keep) with rising samples and falling keep that ends "
        f"with 1, got {stages!r}."
    )
    try:
        pairs = tuple((int(samples), int(keep)) for samples, keep in stages)
    except (TypeError, ValueError) as error:
        raise DiveFastError(message) from error
    samples, keep = [p[0] for p in pairs], [p[1] for p in pairs]
    if (
        not pairs
        or samples[0] < 1
        or keep[-1] != 1
        or any(b <= a for a, b in zip(samples, samples[1:], strict=False))
        or any(b >= a for a, b in zip(keep, keep[1:], strict=False))
    ):
        raise DiveFastError(message)
    return pairs
