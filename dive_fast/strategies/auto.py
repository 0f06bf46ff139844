"""``auto``: a gradient looks at all classes at once, those that may be best are measured.

What both say together is ``evidence``; this is the order in which they are asked.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from scipy.special import ndtri

from dive_fast.core.requests import Gradients, Losses, Search
from dive_fast.core.shortlist import Shortlist
from dive_fast.errors import DiveFastError
from dive_fast.strategies.base import DefaultProbes, Task
from dive_fast.strategies.evidence import Evidence, Standing

# Of so few classes all are measured at once: a gradient costs two evaluations a probe.
FEW = 3
# z(n) = z (USUAL_UNITS / n)^GAMMA of a class measured on n units.
USUAL_UNITS, GAMMA = 4, 1 / 3
# Of classes that only the gradient speaks of, unfitted and fitted: they are many, and each of them
# has to be measured if it is in question.
ENTRY = (1.0, 0.4)
# Unfitted, so many classes are measured at least before the gradient is judged.
FEWEST = 4


@dataclass(frozen=True)
class Auto(DefaultProbes):
    """Looks by gradient, measures what may be best, until one class is left.

    1. The gradient at the mean of the vocabulary, a few probes at a time, gives every class an
       estimate and a standard error. Where the model was fitted (``fit_shortlist``) that says which
       classes may be the best; otherwise the lowest 2 C^0.41 are measured, and what the gradient
       missed of them says how far to trust it for the others.
    2. Classes that may be best by z(n) standard errors are measured on more probes, with the
       gradient as control variate. A class comes (again) into question when the estimates move.
    3. More probes for the gradient, or for the classes: whichever lowers the errors more by
       evaluation.

    The answer stands when no other class is left within

        z(n) = z (4 / n)^gamma,   n: units (antithetic pairs) of the class,   gamma = 1/3

    standard errors: near ties, which cost most and say least, are settled earlier than clear cases.
    z comes from ``min_agreement``: (1 - min_agreement) / 2 of a normal distribution, or what was
    needed on the images that the model was fitted on (``Shortlist.checks``), if that is more.

    Where the gradient says nothing (it is zero, or not finite), all classes are measured.

    Attributes:
        min_agreement: the share of answers that shall equal those of enumeration over the same
            probes. docs/strategies.md has measured curves.
        budget: evaluations of an image at most, whatever they then say; None for no limit. The
            classes in question share what is left in as many rounds as halving them takes
            (sequential halving on common probes, arXiv 1906.04356).
        shortlist: classes that an unfitted model measures first; 2 C^0.41 if None.
        gradient_probes: probes of the gradient at most; 2 evaluations each.
        first_gradient: probes of its first part.
        final_probes: of the answer and its nearest rival, at least.
        growth: probes at a look over those at the look before.
        loss: "l2", "l1" or "huber".
    """

    name: ClassVar[str] = "auto"
    min_agreement: float = 0.95
    budget: int | None = None
    shortlist: int | None = None
    gradient_probes: int = 24
    first_gradient: int = 8
    final_probes: int = 6
    growth: float = 1.5
    loss: str = "l2"

    def __post_init__(self) -> None:
        if not 0 < self.min_agreement < 1:
            raise DiveFastError(
                f"min_agreement must lie between 0 and 1, got {self.min_agreement}."
            )
        least = {
            "budget": 1,
            "shortlist": 1,
            "gradient_probes": 0,
            "first_gradient": 1,
            "final_probes": 1,
        }
        for key, bound in least.items():
            value = getattr(self, key)
            if value is not None and value < bound:
                raise DiveFastError(f"{key} must be at least {bound}, got {value}.")
        if not self.growth > 1:
            raise DiveFastError(f"growth must be greater than 1, got {self.growth}.")

    def search(self, task: Task) -> Search:
        return (yield from _Hunt(self, task).run())


class _Hunt:
    """One image's search: its evidence, the classes that were measured, what it may still cost."""

    def __init__(self, settings: Auto, task: Task) -> None:
        self.settings = settings
        if task.shortlist is not None and task.shortlist.needed(settings.min_agreement) is None:
            # What was learned did not do on images that were left out.
            task = replace(task, shortlist=None)
        self.z = _z(settings.min_agreement, task)
        self.task, self.evidence = task, Evidence(task)
        self.possible = np.isfinite(self.evidence.penalty)
        self.looks = growing_looks(1, settings.growth, self.evidence.units)
        self.v0 = task.vocabulary.mean()
        self.left = math.inf if settings.budget is None else settings.budget
        self.most_looked = self._units(settings.gradient_probes) if self._worth_looking() else 0
        self.rounds: list[list[int]] = []

    def run(self) -> Search:
        evidence = self.evidence
        if self.most_looked:
            yield from self._look(self._units(self.settings.first_gradient))
        while True:
            standing = evidence.standing()
            classes = self._in_question(standing)
            self.rounds.append(classes.tolist())
            if len(classes) == 1:
                classes = self._final(standing)
                target = self._units(self.settings.final_probes)
            else:
                classes = self._affordable(classes, standing)
                target = self._next_look(classes)
            behind = classes[evidence.measured[classes] < target]
            if len(behind) == 0 or self._price(behind, target) > self.left:
                break
            if len(classes) > 2 and self._look_rather(classes):
                yield from self._look(min(evidence.looked * 3 // 2 + 1, self.most_looked))
            else:
                yield from self._measure(behind, target)
        return self._answer(standing)

    def _answer(self, standing: Standing):
        evidence = self.evidence
        measured = evidence.measured > 0
        leader = standing.leader
        if not measured[leader]:
            leader = int(np.where(measured, standing.gap, np.inf).argmin())
        known = measured & (evidence.measured < evidence.measured.max())
        bound = np.where(known, standing.gap - self._reach() * standing.error, np.nan)
        bound = bound - np.where(known, evidence.penalty - evidence.penalty[leader], 0.0)
        bound[leader] = np.nan
        return evidence.ledger.answer(
            leader,
            bound=torch.from_numpy(bound).float(),
            losses=evidence.ledger.losses,
            left=self.rounds,
            order=torch.from_numpy(standing.gap.argsort(kind="stable")),
            looked=evidence.looked * evidence.unit,
        )

    def _units(self, probes: int) -> int:
        unit = self.evidence.unit
        return min(-(-probes // unit), self.evidence.units)

    def _worth_looking(self) -> bool:
        return int(self.possible.sum()) > FEW and self.settings.gradient_probes > 0

    def _reach(self) -> np.ndarray:
        """z(n) of every class, [C]."""
        n = self.evidence.measured
        reach = self.z * (USUAL_UNITS / np.maximum(n, 1)) ** GAMMA
        return np.where(n > 0, reach, self.z * ENTRY[self.evidence.fitted is not None])

    def _in_question(self, standing: Standing) -> np.ndarray:
        """The classes that may be the best, leader included, int64."""
        evidence, measured = self.evidence, self.evidence.measured > 0
        if not measured.any() and (evidence.looked == 0 or evidence.fitted is None):
            # Nothing judges the gradient yet.
            return self._first_classes()
        alive = self.possible & (standing.gap <= self._reach() * standing.error)
        new = (alive & ~measured).nonzero()[0]
        most = max(int(measured.sum()), FEWEST)
        if len(new) > most:
            alive[new[standing.gap[new].argsort(kind="stable")[most:]]] = False
        alive[standing.leader] = True
        return alive.nonzero()[0]

    def _first_classes(self) -> np.ndarray:
        possible = self.possible.nonzero()[0]
        if self.evidence.looked == 0:
            return possible
        m = self.settings.shortlist
        m = max(2 * math.ceil(len(self.possible) ** 0.41), FEWEST) if m is None else m
        expected = (self.evidence.expected() + self.evidence.penalty)[possible]
        return np.sort(possible[expected.argsort(kind="stable")[:m]])

    def _final(self, standing: Standing) -> np.ndarray:
        """The answer and its nearest rival: both are measured before it stands."""
        order = standing.gap.argsort(kind="stable")
        order = order[self.possible[order] & (order != standing.leader)]
        return np.array([standing.leader, *order[:1]])

    def _next_look(self, classes: np.ndarray) -> int:
        least = int(self.evidence.measured[classes].min())
        return next((look for look in self.looks if look > least), self.looks[-1])

    def _affordable(self, classes: np.ndarray, standing: Standing) -> np.ndarray:
        """As many of the best as this round's share of what is left of the budget pays for."""
        if self.left == math.inf:
            return classes
        target = self._next_look(classes)
        share = self.left / max(math.ceil(math.log2(len(classes))), 1)
        order = classes[standing.gap[classes].argsort(kind="stable")]
        for m in range(len(order), 2, -1):
            kept = order[:m]
            if self._price(kept[self.evidence.measured[kept] < target], target) <= share:
                return np.sort(kept)
        return np.sort(order[:2])

    def _price(self, classes: np.ndarray, target: int) -> int:
        return int((target - self.evidence.measured[classes]).sum()) * self.evidence.unit

    def _look_rather(self, classes: np.ndarray) -> bool:
        """Whether more of the gradient lowers the errors more by evaluation than measuring does."""
        evidence, g = self.evidence, self.evidence.looked
        n = int(evidence.measured[classes].min())
        if not 0 < g < self.most_looked or 2 * evidence.unit > self.left or n >= g:
            return False
        expected = evidence.slopes[classes] - evidence.slopes[classes[0]]
        spread = _spread(expected)
        if n == 0:
            fitted = evidence.fitted
            return fitted is not None and spread * fitted.slope**2 / g > 2 * fitted.error**2
        control = evidence.control()
        rest = evidence.differences(classes, n) - control * expected[:, :n]
        rest = _spread(rest) if n > 1 else spread
        # d(var)/d(evaluations): a unit of the gradient costs two for all classes.
        return control**2 * spread / g**2 / 2 > rest / n**2 / len(classes)

    def _look(self, last: int) -> Iterator:
        """The gradient at v0 on its next units; looks no further where it says nothing."""
        evidence = self.evidence
        probes = evidence.probes(evidence.looked, last)
        if 2 * len(probes) > self.left:
            self.most_looked = evidence.looked
            return
        reply = yield Gradients(self.v0[None], probes, per=evidence.unit)
        self.left -= 2 * len(probes)
        gradients = reply.gradients[:, 0]
        if not (bool(gradients.isfinite().all()) and bool((gradients != 0).any())):
            self.most_looked = evidence.looked
            return
        slopes = [self.task.vocabulary.linear(self.v0, g) for g in gradients]
        evidence.add_gradients(reply.losses[0], torch.stack(slopes, dim=1))

    def _measure(self, classes: np.ndarray, target: int) -> Iterator:
        """The losses that these classes lack up to unit ``target``."""
        evidence = self.evidence
        have = evidence.measured[classes]
        for n in np.unique(have).tolist():
            group = classes[have == n]
            probes = evidence.probes(n, target)
            losses = yield Losses(torch.from_numpy(group), probes)
            self.left -= losses.numel()
            evidence.add_losses(group, target, losses)


def _z(min_agreement: float, task: Task) -> float:
    """Standard errors at which enough answers are enumeration's.

    The leader is the luckiest of all classes: where no check on left-out images tells how much that
    matters, the level is shared among log10(C).
    """
    if task.shortlist is not None:
        return float(ndtri((1 + task.shortlist.needed(min_agreement)) / 2))
    shared = max(math.log10(len(task.vocabulary)), 1)
    return float(-ndtri((1 - min_agreement) / 2 / shared))


def _spread(by_class: np.ndarray) -> float:
    """Variance between units, mean over the rivals of the first class."""
    if by_class.shape[1] < 2:
        return float((by_class[1:] ** 2).mean())
    return float(by_class[1:].var(axis=1, ddof=1).mean())


def growing_looks(first: int, growth: float, k: int) -> tuple[int, ...]:
    """The numbers of units at which a race looks: each ``growth`` times the last, k at the end."""
    looks, n = [], first
    while n < k:
        looks.append(n)
        n = max(n + 1, round(n * growth))
    return (*looks, k)
