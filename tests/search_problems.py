"""Made-up images for a search: what each class loses on each probe, and what a gradient says."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dive_fast.core.probes import ProbeList, low_discrepancy_probes
from dive_fast.core.requests import Answer, Features, Losses, LossesAndGradients, Request
from dive_fast.core.vocabulary import Vocabulary
from dive_fast.strategies import Task

GRADIENTS = ("informative", "useless", "backwards")


@dataclass(frozen=True)
class Problem:
    """One image of C classes on K probes in units of ``unit``.

    Attributes:
        losses: float32 [C, K].
        gradients: float32 [units of K, C], of the mean loss of every unit; rows are unit vectors.
        base: float32 [K], l at the mean of the rows.
    """

    losses: torch.Tensor
    gradients: torch.Tensor
    base: torch.Tensor
    unit: int = 2

    @property
    def best(self) -> int:
        return int(self.losses.double().mean(dim=1).argmin())

    def task(self, **others) -> Task:
        c, k = self.losses.shape
        rows = Vocabulary(torch.eye(c), [str(i) for i in range(c)])
        return Task(rows, probe_list(k, self.unit), **others)


def probe_list(k: int, unit: int = 2) -> ProbeList:
    return low_discrepancy_probes(k, 1000, (1, 1, 1), antithetic=unit == 2)


def random_problem(
    c: int, k: int, generator: torch.Generator, gradient: str = "informative", unit: int = 2
) -> Problem:
    """Class effects of size 1, noise of which a part cancels in pairs, a common part of 3."""

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    units = -(-k // unit)
    mean = randn(c, 1)
    even = randn(c, units, unit)
    of_units = even.mean(dim=2)
    # What pairs lose: odd in eps.
    odd = 0.5 * randn(c, units, 1) * torch.tensor([1.0, -1.0])[:unit]
    noise = (odd + even).flatten(1)[:, :k]
    common = 3 * randn(1, k)
    losses = mean + noise + common
    said = {
        "informative": mean + of_units + 0.3 * randn(c, 1) + 0.2 * randn(c, units),
        "useless": randn(c, 1) + randn(c, units),
        "backwards": -mean - of_units,
    }[gradient]
    return Problem(losses, said.T.contiguous(), common[0], unit)


def drive(
    strategy, problem: Problem, scores: torch.Tensor | None = None, **others
) -> tuple[Answer, int, list[Request]]:
    """One search from memory: its answer, its evaluations, what it asked for.

    ``scores`` are what a head's layer gives, the features themselves.
    """
    search, reply = strategy.search(problem.task(**others)), None
    requests, evaluations = [], 0
    while True:
        try:
            request = search.send(reply)
        except StopIteration as stop:
            return stop.value, evaluations, requests
        requests.append(request)
        ids = request.probe_ids
        evaluations += request.passes * len(request.conditions) * len(ids)
        if isinstance(request, Losses):
            reply = problem.losses[request.conditions][:, ids]
        elif isinstance(request, Features):
            reply = scores[None, None]
        else:
            assert request.per == problem.unit
            units = torch.unique(ids // problem.unit)
            reply = LossesAndGradients(problem.base[ids][None], problem.gradients[units][:, None])
