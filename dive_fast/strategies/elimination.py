"""Successive elimination: the paired test that a race runs, and the race itself on common probes.

Sources: Diffusion Classifier (arXiv 2303.16203, adaptive stages); arXiv 2303.15233 (paired t-tests
with p = 2e-3 after at least 20 probes). The correction for looking repeatedly and the one for a
finite list of probes are ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from scipy.special import stdtrit

from dive_fast.core.requests import Answer, Losses
from dive_fast.strategies.base import Ledger, Task


@dataclass(frozen=True)
class PairedTest:
    """One-sided paired t-test of d_k = l_c,k - l_b,k on the first n of K probes.

        c is worse than b  if  mean(d) > h,   h = t_{n-1}(1 - tail) std(d) sqrt((1 - n/K) / n)

    Where probes come in antithetic pairs, a pair is one d: n and K count pairs. Single probes would
    overstate the variance of their mean.

    The question is which class has the lower mean over all K probes, so the margin h shrinks to
    zero as n reaches K (the finite population correction). It takes the differences for normal;
    probes in low-discrepancy order are spread more evenly than independent ones, so their means
    vary less than the test assumes.

    Attributes:
        tail: probability that a class that is no worse is called worse.
        n_probes: K, in probes.
        unit: probes that are one d.
    """

    tail: float
    n_probes: int
    unit: int = 1

    def margin(self, difference: torch.Tensor) -> torch.Tensor:
        """h of differences [..., n] by probe, float64 [...]; infinite where one says nothing of K.

        What is left over of a unit takes no part in the variance.
        """
        if difference.shape[-1] >= self.n_probes:
            return torch.zeros(difference.shape[:-1], dtype=torch.float64)
        n = difference.shape[-1] // self.unit
        if n < 2:
            return torch.full(difference.shape[:-1], math.inf, dtype=torch.float64)
        whole = difference[..., : n * self.unit].double().unflatten(-1, (n, self.unit)).mean(dim=-1)
        left = (1 - n * self.unit / self.n_probes) / n
        return student_t_quantile(1 - self.tail, n - 1) * math.sqrt(left) * whole.std(dim=-1)


class Contest:
    """Classes that race on the task's probes, in rounds that end at the given numbers of probes.

    Classes may enter at any time: they catch up on the probes that they missed, and are tested on
    the way against the leader on the probes that both have.

    Attributes:
        ledger: all losses seen.
        left: the classes still racing, bool [C].
        entered: all that ever raced, bool [C].
    """

    def __init__(self, task: Task, looks: Sequence[int], test: PairedTest) -> None:
        c = len(task.vocabulary)
        self.looks, self.test = tuple(looks), test
        self.penalty = task.penalty()
        self.ledger = Ledger(c, len(task.probes))
        self.left = torch.zeros(c, dtype=torch.bool)
        self.entered = torch.zeros(c, dtype=torch.bool)
        self.round = torch.zeros(c, dtype=torch.int64)
        self.left_after: list[list[int]] = []

    def enter(self, classes: torch.Tensor) -> None:
        """Lets classes race; those that did so before are not asked again."""
        new = classes[~self.entered[classes] & self.penalty[classes].isfinite()]
        self.entered[new] = self.left[new] = True

    def classes(self) -> torch.Tensor:
        """The classes still racing, int64."""
        return self.left.nonzero()[:, 0]

    def decided(self) -> bool:
        """Whether no further probe can change the answer."""
        return self.left_alone() or self.rounds() == len(self.looks)

    def left_alone(self) -> bool:
        """Whether all rivals have left."""
        return int(self.left.sum()) == 1

    def rounds(self) -> int:
        """Rounds that all those left have had."""
        return int(self.round[self.left].min())

    def advance(self, keep: int | None = None):
        """One round of those who have had the fewest, then the test; yields requests.

        After the last round nobody leaves: all are measured alike, and the lowest mean wins.

        Args:
            keep: instead of the test, the ``keep`` lowest means stay.
        """
        racing = self.classes()
        done = int(self.round[racing].min())
        behind = racing[self.round[racing] == done]
        first, last = self.looks[done - 1] if done else 0, self.looks[done]
        yield from self.measure(behind, torch.arange(first, last))
        self.round[behind] += 1
        if last < self.looks[-1]:
            self._eliminate(racing, done, last, keep)
        self.left_after.append(self.classes().tolist())

    def _eliminate(self, racing: torch.Tensor, done: int, last: int, keep: int | None) -> None:
        """Drops those that lose on the first ``last`` probes among all who have had them."""
        abreast = racing[self.round[racing] > done]
        losses = self.ledger.losses[abreast, :last].double()
        energy = losses.mean(dim=1) + self.penalty[abreast]
        if keep is None:
            leader = energy.argmin()
            worse = energy - energy[leader] > self.test.margin(losses - losses[leader])
        else:
            worse = torch.ones(len(abreast), dtype=torch.bool)
            worse[energy.argsort(stable=True)[:keep]] = False
        self.left[abreast[worse]] = False

    def measure(self, classes: torch.Tensor, probe_ids: torch.Tensor):
        """Asks for what is not yet known of these losses and enters it."""
        if len(classes) == 0:
            return
        known = self.ledger.losses[classes][:, probe_ids].isfinite()
        for todo, group in _alike(~known):
            asked, ids = classes[group], probe_ids[todo]
            losses = yield Losses(asked, ids)
            self.ledger.add(asked, ids, losses)

    def leader(self) -> int:
        """The class of the lowest mean among those left, on the probes that all of them have."""
        racing = self.classes()
        n = self.looks[max(int(self.round[racing].min()), 1) - 1]
        energy = self.ledger.losses[racing, :n].double().mean(dim=1) + self.penalty[racing]
        return int(racing[energy.argmin()])

    def answer(self, **trace) -> Answer:
        """The leader, with a bound for every class that left.

        bound_c = mean(d) - h on the probes that c shares with the winner: with the test's
        confidence, L_c - L_winner is at least that.
        """
        winner = self.leader()
        bound = torch.full((len(self.left),), torch.nan)
        for c in (self.entered & ~self.left).nonzero()[:, 0].tolist():
            difference = (self.ledger.losses[c] - self.ledger.losses[winner]).double()
            difference = difference[difference.isfinite()]
            bound[c] = difference.mean() - self.test.margin(difference)
        return self.ledger.answer(
            winner, bound=bound, losses=self.ledger.losses, left=self.left_after, **trace
        )


def _alike(todo: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Groups the rows of a mask [n, k] by equal content: (columns, rows) of each that asks."""
    if todo.all():
        return [(torch.arange(todo.shape[1]), torch.arange(len(todo)))]
    groups = []
    for pattern in torch.unique(todo, dim=0):
        if pattern.any():
            rows = (todo == pattern).all(dim=1).nonzero()[:, 0]
            groups.append((pattern.nonzero()[:, 0], rows))
    return groups


@lru_cache(maxsize=4096)
def student_t_quantile(p: float, degrees: int) -> float:
    """The p-quantile of Student's t; ``scipy.stats.t.ppf`` without the import of all of it."""
    return float(stdtrit(degrees, p))


def growing_looks(first: int, growth: float, k: int) -> tuple[int, ...]:
    """Where a race of k probes, or units, looks: each ``growth`` times the last, k at the end."""
    looks, n = [], first
    while n < k:
        looks.append(n)
        n = max(n + 1, round(n * growth))
    return (*looks, k)
