"""Enumeration: every condition on the same probes (Diffusion Classifier, arXiv 2303.16203)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from dive_fast.core.probes import ProbeList
from dive_fast.core.requests import Losses, Search
from dive_fast.errors import DiveFastError
from dive_fast.strategies.base import DefaultProbes, Ledger, Task


@dataclass(frozen=True)
class Enumerate(DefaultProbes):
    """L(y; x0) of every y over all K probes; the lowest wins. Costs C x K evaluations."""

    name: ClassVar[str] = "enumerate"
    loss: str = "l2"

    def search(self, task: Task) -> Search:
        classes, probes = torch.arange(len(task.vocabulary)), torch.arange(len(task.probes))
        losses = yield Losses(classes, probes)
        ledger = Ledger(len(classes), len(probes))
        ledger.add(classes, probes, losses)
        return ledger.answer(int(ledger.means().argmin()), losses=losses)


@dataclass(frozen=True)
class AdaptiveEnumerate:
    """The published adaptive enumeration: after each stage only the best classes go on.

    Stage n takes its timesteps evenly from the list of the largest stage, without those already
    evaluated. The noise index counts evaluated timesteps, ``n_trials`` noises each.

    Attributes:
        n_samples: timesteps per class when a stage ends.
        to_keep: classes kept when it ends; the last is 1.
        n_trials: noises per timestep.
        loss: "l2", "l1" or "huber".
    """

    name: ClassVar[str] = "diffusion-classifier"
    n_samples: tuple[int, ...] = (50, 500)
    to_keep: tuple[int, ...] = (5, 1)
    n_trials: int = 1
    loss: str = "l2"

    def __post_init__(self) -> None:
        samples, keep = tuple(self.n_samples), tuple(self.to_keep)
        if len(samples) != len(keep) or not samples or min(*samples, *keep, self.n_trials) < 1:
            raise DiveFastError(
                "n_samples and to_keep must have as many entries as there are stages and, like "
                f"n_trials, hold numbers of at least 1, got {samples}, {keep} and {self.n_trials}."
            )
        if keep[-1] != 1:
            raise DiveFastError(f"to_keep must end with 1, got {keep}.")

    def probes(
        self, k: int | None, n_timesteps: int, shape: tuple[int, ...], seed: int
    ) -> ProbeList:
        """The probes in the order in which the stages reach them, noises drawn from ``seed``.

        To use a noise table of your own, replace ``noise`` of this list.
        """
        largest = max(self.n_samples)
        if k not in (None, largest):
            raise DiveFastError(
                f"the stages {self.n_samples} take {largest} probes, got {k}: change n_samples."
            )
        if largest > n_timesteps:
            raise DiveFastError(f"a stage may take at most {n_timesteps} timesteps, got {largest}.")
        step = n_timesteps // largest
        positions = torch.tensor([p for stage in self._stages() for p in stage])
        timesteps = (step // 2 + step * positions).repeat_interleave(self.n_trials)
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn((largest * self.n_trials, *shape), generator=generator)
        return ProbeList(timesteps, noise)

    def search(self, task: Task) -> Search:
        c, needed = len(task.vocabulary), self.n_trials * sum(map(len, self._stages()))
        if len(task.probes) != needed:
            raise DiveFastError(
                f"the stages {self.n_samples} take {needed} probes, got {len(task.probes)}."
            )
        ledger, remaining = Ledger(c, len(task.probes)), torch.arange(c)
        start, kept = 0, []
        for stage, keep in zip(self._stages(), self.to_keep, strict=True):
            probes = torch.arange(start, start + len(stage) * self.n_trials)
            start += len(probes)
            if len(probes) > 0:
                losses = yield Losses(remaining, probes)
                ledger.add(remaining, probes, losses)
            means = ledger.means()[remaining]
            remaining = remaining[torch.topk(-means, k=min(keep, len(remaining))).indices]
            kept.append(remaining.tolist())
        return ledger.answer(int(remaining[0]), losses=ledger.losses, kept=kept)

    def _stages(self) -> list[list[int]]:
        """What every stage evaluates anew, as positions in the largest stage's timesteps."""
        largest, seen, stages = max(self.n_samples), set(), []
        for n in self.n_samples:
            positions = range(largest)[largest // n // 2 :: largest // n][:n]
            stages.append([p for p in positions if p not in seen])
            seen.update(positions)
        return stages
