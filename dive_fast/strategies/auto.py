"""``auto``: one gradient ranks the whole vocabulary, and the few that it names race.

The gradient shortlist is the library's own; the race is that of ``elimination``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from dive_fast.core.requests import Gradients, Search
from dive_fast.errors import DiveFastError
from dive_fast.strategies.base import DefaultProbes, Task
from dive_fast.strategies.elimination import Contest, PairedTest


@dataclass(frozen=True)
class Auto(DefaultProbes):
    """Gradient shortlist, then a race among the shortlisted, widened until they hold the answer.

        L(y_c) ~ L(v0) + slope g . (v_c - v0) + curvature_c,   g = dL/dv at v0 = mean of the rows

    with slope 1 and curvature 0 unless the model's shortlist was fitted (``fit_shortlist``).

    1. Shortlist: the classes of the lowest estimates on ``gradient_probes`` probes.
    2. First look: each of them on ``first_look`` probes. While the leader is not among the better
       half of the shortlist, the estimates are not to be trusted so far: twice as many enter.
    3. The race goes on by the paired test of ``PairedTest`` at level (1 - min_agreement) / looks,
       with looks at ``growth`` times as many probes.
    4. Where the estimates are in doubt, because the shortlist was not fitted or had to be widened,
       the race re-linearises at the leader of the first look, whose embedding is nearer to the
       answer's than the mean is. The classes that its gradient puts in front enter
       too, if they have not raced; again for other leaders, ``relinearise`` times at most.

    Where the gradient says nothing (it is zero, or not finite), all classes race from the start.

    Attributes:
        min_agreement: the share of answers that shall equal those of enumeration over the same
            probes. It bounds the error of the race; what the shortlist misses comes on top.
            docs/strategies.md has measured curves.
        shortlist: classes of the first shortlist; C^0.41 if None (3 of ten, 10 of 242), twice that
            where the model's shortlist was not fitted.
        gradient_probes: probes of a gradient; 2 evaluations each.
        first_look: probes before the first test.
        growth: probes at a look over those at the look before.
        relinearise: gradients at leaders, at most.
        loss: "l2", "l1" or "huber".
    """

    name: ClassVar[str] = "auto"
    min_agreement: float = 0.9
    shortlist: int | None = None
    gradient_probes: int = 24
    first_look: int = 12
    growth: float = 1.5
    relinearise: int = 1
    loss: str = "l2"

    def __post_init__(self) -> None:
        if not 0 < self.min_agreement < 1:
            raise DiveFastError(
                f"min_agreement must lie between 0 and 1, got {self.min_agreement}."
            )
        least = {"gradient_probes": 1, "first_look": 2, "relinearise": 0, "shortlist": 1}
        for key, bound in least.items():
            value = getattr(self, key)
            if value is not None and value < bound:
                raise DiveFastError(f"{key} must be at least {bound}, got {value}.")
        if not self.growth > 1:
            raise DiveFastError(f"growth must be greater than 1, got {self.growth}.")

    def search(self, task: Task) -> Search:
        vocabulary, k = task.vocabulary, len(task.probes)
        c = len(vocabulary)
        looks = growing_looks(self.first_look, self.growth, k)
        contest = Contest(task, looks, PairedTest((1 - self.min_agreement) / len(looks), k))
        probes = torch.arange(min(self.gradient_probes, k))

        v0 = vocabulary.mean()
        reply = yield Gradients(v0[None], probes)
        estimate = vocabulary.linear(v0, reply.gradients[0])
        if task.shortlist is not None:
            estimate = task.shortlist.correct(estimate)
        order = (estimate + task.penalty()).argsort(stable=True)
        m = first = self._size(task) if _tells(reply.gradients) else c
        contest.enter(order[:m])
        yield from contest.advance()
        while m < c and int((order == contest.leader()).nonzero()) >= m / 2:
            m = min(2 * m, c)
            contest.enter(order[:m])
            yield from contest.advance()

        in_doubt = task.shortlist is None or m > first
        linearised: list[int] = []
        while True:
            leader = contest.leader()
            new = leader not in linearised and len(linearised) < self.relinearise
            if in_doubt and new and not contest.entered.all():
                linearised.append(leader)
                yield from self._relinearise(task, contest, leader, probes, first)
            if contest.decided():
                break
            yield from contest.advance()
        return contest.answer(order=order, shortlist=m, linearised=linearised)

    def _relinearise(self, task: Task, contest: Contest, leader: int, probes: torch.Tensor, m: int):
        """Lets the classes enter that the gradient at the leader puts in front."""
        vocabulary, at = task.vocabulary, torch.tensor([leader])
        reply = yield Gradients(at, probes)
        contest.ledger.add(at, probes, reply.losses)
        if _tells(reply.gradients):
            estimate = vocabulary.linear(vocabulary.rows(at)[0], reply.gradients[0])
            contest.enter((estimate + task.penalty()).argsort(stable=True)[:m])

    def _size(self, task: Task) -> int:
        """Classes of the first shortlist."""
        c = len(task.vocabulary)
        if self.shortlist is not None:
            return min(self.shortlist, c)
        return min(math.ceil(c**0.41) * (2 if task.shortlist is None else 1), c)


def _tells(gradient: torch.Tensor) -> bool:
    """Whether a gradient ranks the classes at all."""
    return bool(gradient.isfinite().all()) and bool((gradient != 0).any())


def growing_looks(first: int, growth: float, k: int) -> tuple[int, ...]:
    """The numbers of probes at which a race looks: each ``growth`` times the last, k at the end."""
    looks, n = [], first
    while n < k:
        looks.append(n)
        n = max(n + 1, round(n * growth))
    return (*looks, k)
