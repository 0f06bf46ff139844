"""What a classifier's probabilities are worth: reliability, and accuracy over coverage."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from dive_fast.core.numbers import whole
from dive_fast.evaluation.table import RunTable
from dive_fast.predict.calibration import BINS

COVERAGES = 20  # points of the curve, evenly spaced


@dataclass(frozen=True)
class Bin:
    """Answers whose probability lies in (low, high]; the lowest bin has 0, too.

    Attributes:
        n: how many.
        confidence, accuracy: their mean probability and the share that is right; None of none.
        standard_error: of the accuracy.
    """

    low: float
    high: float
    n: int
    confidence: float | None
    accuracy: float | None
    standard_error: float | None

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class CoveragePoint:
    """The answers that are the most certain.

    Attributes:
        coverage: their share of all.
        n: how many they are.
        probability: the lowest among them.
        accuracy: the share of them that is right.
        standard_error: of the accuracy.
    """

    coverage: float
    n: int
    probability: float
    accuracy: float
    standard_error: float


@dataclass(frozen=True)
class Coverage:
    """Accuracy over coverage.

    Attributes:
        points: at every twentieth of the images, the smallest coverage first.
        area: under the curve of risk (1 - accuracy) over coverage, the mean over 1 to n images
            (AURC, arXiv 1805.08206); None of no images. Lower is better.
    """

    points: list[CoveragePoint]
    area: float | None

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def binomial_error(p: float, n: int) -> float:
    """Standard error of a share p of n, sqrt(p (1 - p) / n)."""
    return math.sqrt(p * (1 - p) / n)


def reliability(table: RunTable, bins: int = BINS) -> list[Bin]:
    """Accuracy over the answers' probability, the bins of ``Figures.ece``.

    Raises:
        DiveFastError: ``bins`` is no whole number of at least 1.
    """
    bins = whole("bins", bins, 1)
    p = table.probability.astype(np.float64)
    place = np.searchsorted(np.arange(1, bins) / bins, p)
    n = np.bincount(place, minlength=bins).tolist()
    sum_p = np.bincount(place, p, bins)
    hits = np.bincount(place, table.correct, bins)
    found = []
    for i, count in enumerate(n):
        low, high = i / bins, (i + 1) / bins
        if not count:
            found.append(Bin(low, high, 0, None, None, None))
            continue
        accuracy = float(hits[i]) / count
        found.append(
            Bin(
                low, high, count, float(sum_p[i]) / count, accuracy, binomial_error(accuracy, count)
            )
        )
    return found


def coverage(table: RunTable) -> Coverage:
    """Accuracy when only the most certain answers count, by p(y | x0) of the answer.

    Answers of equal probability cannot be told apart: where some of them count and others do not,
    the accuracy is what is expected of a random choice among them.
    """
    n = len(table)
    if n == 0:
        return Coverage([], None)
    order = np.argsort(-table.probability, kind="stable")
    p = table.probability[order]
    # Behind the last of each run of equal probabilities the hits are known; between, a straight
    # line is what a random choice is expected to hit.
    last = np.flatnonzero(np.append(p[1:] != p[:-1], True)) + 1
    known = np.append(0, np.cumsum(table.correct[order])[last - 1])
    counts = np.arange(1, n + 1)
    accuracy = np.interp(counts, np.append(0, last), known) / counts
    kept = sorted({math.ceil(n * step / COVERAGES) for step in range(1, COVERAGES + 1)})
    points = [
        CoveragePoint(k / n, k, float(p[k - 1]), a := float(accuracy[k - 1]), binomial_error(a, k))
        for k in kept
    ]
    return Coverage(points, float(1 - accuracy.mean()))
