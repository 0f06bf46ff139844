"""``auto`` at work on one image: what is asked next, and when the answer stands."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch
from scipy.special import ndtr, ndtri, stdtrit

from dive_fast.core.requests import Answer, Gradients, Losses, Search
from dive_fast.errors import DiveFastError
from dive_fast.strategies.base import Task
from dive_fast.strategies.elimination import growing_looks
from dive_fast.strategies.evidence import FEWEST, Evidence, Standing
from dive_fast.strategies.looking import look

# Of so few classes all are measured at once: a gradient costs two evaluations a probe.
FEW = 3
# A head that names no more classes than this does without the gradient.
FEW_NAMED = 8
# z(n) = z (USUAL_UNITS / n)^GAMMA of a class measured on n units.
USUAL_UNITS, GAMMA = 4, 1 / 3
# Images whose best classes are so close that they are settled early, at most: together they may be
# wrong as often as all images may.
NEAR_TIES = 0.1
# Of classes that only the gradient speaks of, unfitted and fitted: they are many, and each of them
# has to be measured if it is in question.
ENTRY = (1.0, 0.4)
# Evaluations of an image at least: a pair of probes of the gradient, and one of two classes.
LEAST_BUDGET = 8


class Settings(Protocol):
    """What a hunt reads of ``Auto``."""

    min_agreement: float
    budget: int | None
    shortlist: int | None
    gradient_probes: int
    first_gradient: int
    final_probes: int
    growth: float


class Hunt:
    """One image's search: its evidence, the classes that were measured, what it may still cost."""

    def __init__(self, settings: Settings, task: Task) -> None:
        if task.shortlist is not None and task.shortlist.needed(settings.min_agreement) is None:
            # What was learned did not do on images that were left out.
            task = replace(task, shortlist=None)
        self.settings, self.task, self.evidence = settings, task, Evidence(task)
        self.z, self.least = reach(settings.min_agreement, task)
        self.possible = np.isfinite(self.evidence.penalty)
        self.looks = growing_looks(1, settings.growth, self.evidence.units)
        self.v0 = task.vocabulary.mean()
        # An answer of several prompts costs as many evaluations a probe.
        budget, parts = settings.budget, task.vocabulary.parts
        if budget is not None and budget < LEAST_BUDGET * parts:
            raise DiveFastError(
                f"budget must be at least {LEAST_BUDGET} for each of {parts} prompts of a class, "
                f"got {budget}."
            )
        self.left = math.inf if budget is None else budget / parts
        self.most_looked = self._units(settings.gradient_probes)
        self.few = int(self.possible.sum()) <= FEW
        if self.few:
            self.most_looked = 0
        self.named = np.empty(0, dtype=np.int64)  # by the head
        self.rounds: list[list[int]] = []

    def run(self) -> Search:
        evidence = self.evidence
        if self.task.head is not None:
            yield from self._read_head()
        if self.most_looked:
            first = min(self._units(self.settings.first_gradient), self.most_looked)
            # Half of a small budget is left for the classes.
            yield from self._look(int(min(first, max(self.left // (4 * evidence.unit), 1))))
        while True:
            standing = evidence.standing()
            classes = self._in_question(standing)
            self.rounds.append(classes.tolist())
            if len(classes) == 1:
                classes = self._final(standing)
                target = self._final_look(classes)
            else:
                classes = self._affordable(classes, standing)
                target = self._next_look(classes)
            behind = classes[evidence.measured[classes] < target]
            if len(behind) == 0 or self._price(behind, target) > self.left:
                return self._answer(standing)
            if len(classes) > 2 and self._look_rather(classes):
                yield from self._look(min(evidence.looked * 3 // 2 + 1, self.most_looked))
            else:
                yield from self._measure(behind, target)

    def _read_head(self) -> Iterator:
        """The classes that the head puts first, as many as held enough answers when it was tried.

        A head that needs more of them than the gradient would name is not read.
        """
        enough = (1 + self.settings.min_agreement) / 2
        recall = self.task.head.recall
        m = next((n for n, share in enumerate(recall, 1) if share >= enough), None)
        if m is None or m > max(self._shortlist(), FEW_NAMED):
            return
        scores = yield from look(self.task)
        self.left -= 1
        if not bool(scores.isfinite().all()):
            return
        order = scores.argsort(descending=True, stable=True).numpy()
        self.named = order[self.possible[order]][: max(m, 2)]
        if len(self.named) <= FEW_NAMED:
            self.most_looked = 0

    def _answer(self, standing: Standing) -> Answer:
        """The leader, or of a small budget the best that was measured.

        Losses are the leader's mean and the gaps to it, so that their order is that of the search.
        """
        evidence, measured = self.evidence, self.evidence.measured > 0
        if not measured[standing.leader]:
            # Against one that was not measured nothing may be known of the others.
            first = int(evidence.measured.argmax())
            best = int(np.where(measured, evidence.against(first)[0], np.inf).argmin())
            standing = Standing(best, *evidence.against(best))
        leader, gap = standing.leader, standing.gap
        gap = gap - np.where(self.possible, evidence.penalty, 0.0)
        gap = np.where(measured, gap - gap[leader], np.nan)
        given_up = measured & (evidence.measured < evidence.measured[leader])
        bound = np.where(given_up, gap - self._reaches() * standing.error, np.nan)
        losses = evidence.ledger.losses
        return Answer(
            leader,
            (losses[leader].nanmean() + torch.from_numpy(gap)).float(),
            losses.isfinite().sum(dim=1),
            {
                "losses": losses,
                "left": self.rounds,
                "order": torch.from_numpy(standing.gap.argsort(kind="stable")),
                "looked": evidence.looked * evidence.unit,
            },
            torch.from_numpy(bound).float(),
        )

    def _units(self, probes: int) -> int:
        unit = self.evidence.unit
        return min(-(-probes // unit), self.evidence.units)

    def _reaches(self) -> np.ndarray:
        """z(n) of every class, [C]; of ``FEW`` classes the quantile of Student's t instead."""
        n = self.evidence.measured
        reach = np.maximum(self.z * (USUAL_UNITS / np.maximum(n, 1)) ** GAMMA, self.least)
        if self.few:
            # No other rivals tell the variance: its n - 1 degrees of freedom are all there are.
            reach = stdtrit(np.maximum(n - 1, 1), ndtr(reach))
        return np.where(n > 0, reach, self.z * ENTRY[self.evidence.fitted is not None])

    def _in_question(self, standing: Standing) -> np.ndarray:
        """The classes that may be the best, leader included, int64."""
        evidence, measured = self.evidence, self.evidence.measured > 0
        if not measured.any() and (evidence.looked == 0 or evidence.fitted is None):
            # Nothing judges the gradient yet.
            return np.union1d(self._first_classes(), self.named)
        alive = self.possible & (standing.gap <= self._reaches() * standing.error)
        new = (alive & ~measured).nonzero()[0]
        most = max(int(measured.sum()), FEWEST)
        if len(new) > most:
            alive[new[standing.gap[new].argsort(kind="stable")[most:]]] = False
        alive[standing.leader] = True
        if not measured.any():
            alive[self.named] = True
        return alive.nonzero()[0]

    def _first_classes(self) -> np.ndarray:
        possible = self.possible.nonzero()[0]
        if self.evidence.looked == 0:
            return self.named if len(self.named) else possible
        expected = (self.evidence.expected() + self.evidence.penalty)[possible]
        return np.sort(possible[expected.argsort(kind="stable")[: self._shortlist()]])

    def _shortlist(self) -> int:
        """Classes that are measured first on the gradient's word, unfitted."""
        m = self.settings.shortlist
        return max(2 * math.ceil(len(self.possible) ** 0.41), FEWEST) if m is None else m

    def _final(self, standing: Standing) -> np.ndarray:
        """The answer and its nearest rival: both are measured before it stands."""
        order = standing.gap.argsort(kind="stable")
        order = order[self.possible[order] & (order != standing.leader)]
        return np.array([standing.leader, *order[:1]])

    def _final_look(self, classes: np.ndarray) -> int:
        """Units that both are measured on, as far as the budget pays for them."""
        target = self._units(self.settings.final_probes)
        while target > 1 and self._price(classes, target) > self.left:
            target -= 1
        return target

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
        missing = np.maximum(target - self.evidence.measured[classes], 0)
        return int(missing.sum()) * self.evidence.unit

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
        # Two classes must still be paid for.
        if 2 * (len(probes) + evidence.unit) > self.left:
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


def reach(min_agreement: float, task: Task) -> tuple[float, float]:
    """Standard errors at which enough answers are enumeration's: of most images, of near ties.

    The leader is the luckiest of all classes: where no check on left-out images tells how much that
    matters, the level is shared among log10(C).
    """
    level, shared = 1 - min_agreement, max(math.log10(len(task.vocabulary)), 1)
    if task.shortlist is not None:
        level, shared = 1 - task.shortlist.needed(min_agreement), 1
    return float(-ndtri(level / 2 / shared)), float(-ndtri(min(level / NEAR_TIES, 0.5)))


def _spread(by_class: np.ndarray) -> float:
    """Variance between units, mean over the rivals of the first class."""
    if by_class.shape[1] < 2:
        return float((by_class[1:] ** 2).mean())
    return float(by_class[1:].var(axis=1, ddof=1).mean())
