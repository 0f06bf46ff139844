"""Two classifiers' runs on the same images: do they agree, and which one is better?"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binomtest, norm

from dive_fast.errors import RunError, shown
from dive_fast.evaluation.metrics import log_probability
from dive_fast.evaluation.table import RunTable

log = logging.getLogger(__name__)

LEVEL = 0.95  # of the intervals
_Z = float(norm.ppf(0.5 + LEVEL / 2))

DIFFERENCES = (
    "id", "truth", "truth_name", "a_index", "a_label", "a_correct", "a_probability",
    "a_truth_probability", "b_index", "b_label", "b_correct", "b_probability",
    "b_truth_probability",
)  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """A mean over the common images, of both runs.

    Attributes:
        a, b: the means.
        difference: b - a.
        standard_error: of the difference, over pairs; None of one image.
        ratio: b / a; None where a is 0.
    """

    a: float
    b: float
    difference: float
    standard_error: float | None
    ratio: float | None


@dataclass(frozen=True)
class Comparison:
    """Two runs on the images that both answered. Intervals are of 95%.

    Attributes:
        a, b: the runs' directories.
        n: images that both answered.
        a_lacks, b_lacks: images that the other one answered alone.
        accuracy: share of the images answered right.
        accuracy_interval: of the difference, by Wald's formula with half an image added to each
            of the four cells (Agresti and Min 2005).
        agreement: share of the images with the same answer, right or wrong.
        agreement_interval: by Wilson.
        a_right, b_right: images that one answered right and the other one wrong.
        mcnemar: p-value of McNemar's exact test, two-sided: that of two equally good classifiers
            one wins so clearly by chance.
        truth_probability: p(truth | x0).
        nll: -log p(truth | x0), in nats.
        evaluations, seconds: per image.
    """

    a: str
    b: str
    n: int
    a_lacks: int
    b_lacks: int
    accuracy: Pair
    accuracy_interval: tuple[float, float]
    agreement: float
    agreement_interval: tuple[float, float]
    a_right: int
    b_right: int
    mcnemar: float
    truth_probability: Pair
    nll: Pair
    evaluations: Pair
    seconds: Pair

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)


class RunPair:
    """Two runs and the rows of the images that both answered.

    Args:
        a, b: run directories.

    Raises:
        RunError: one is no run of a classifier or is damaged, they have no image in common, or do
            not have the same classes and truths.
    """

    def __init__(self, a: str | os.PathLike[str], b: str | os.PathLike[str]) -> None:
        self.a, self.b = RunTable.read(a), RunTable.read(b)
        of_b = {key: row for row, key in enumerate(self.b.ids)}
        common = [(row, of_b[key]) for row, key in enumerate(self.a.ids) if key in of_b]
        self.rows_a, self.rows_b = np.array(common, np.int64).reshape(-1, 2).T
        self._expect_the_same_classes()
        if not common:
            raise RunError(
                f"{_name(self.a)} and {_name(self.b)} have no answered image in common: expected "
                "two runs on the same data."
            )
        self._expect_the_same_truth()
        self._tell_other_data()

    def compare(self) -> Comparison:
        """What the two come to, side by side."""
        a, b, i, j = self.a, self.b, self.rows_a, self.rows_b
        n = len(i)
        right_a, right_b = a.correct[i], b.correct[j]
        only_a, only_b, p_value = mcnemar(right_a, right_b)
        same = binomtest(int((a.index[i] == b.index[j]).sum()), n)
        interval = same.proportion_ci(LEVEL, method="wilson")
        return Comparison(
            a=_name(a),
            b=_name(b),
            n=n,
            a_lacks=len(b) - n,
            b_lacks=len(a) - n,
            accuracy=_pair(right_a, right_b),
            accuracy_interval=_difference_interval(only_a, only_b, n),
            agreement=float(same.statistic),
            agreement_interval=(float(interval.low), float(interval.high)),
            a_right=only_a,
            b_right=only_b,
            mcnemar=p_value,
            truth_probability=_pair(a.truth_probability[i], b.truth_probability[j]),
            nll=_pair(-log_probability(a, i), -log_probability(b, j)),
            evaluations=_pair(a.evaluations[i], b.evaluations[j]),
            seconds=_pair(a.seconds[i], b.seconds[j]),
        )

    def differences(self) -> Iterator[list[Any]]:
        """A row of ``DIFFERENCES`` for every image that the two answered differently."""
        for i, j in zip(self.rows_a.tolist(), self.rows_b.tolist(), strict=True):
            truth = int(self.a.truth[i])
            if self.a.index[i] != self.b.index[j]:
                answers = [*_answer(self.a, i), *_answer(self.b, j)]
                yield [self.a.ids[i], truth, self.a.names[truth], *answers]

    def _expect_the_same_classes(self) -> None:
        a, b = self.a, self.b
        if len(a) and len(b) and a.n_classes != b.n_classes:
            raise RunError(
                f"expected two runs with the same classes, got {a.n_classes} in {_name(a)} and "
                f"{b.n_classes} in {_name(b)}."
            )
        for row, (one, other) in enumerate(zip(a.names, b.names, strict=False)):
            # A run that does not tell its names has numbers in their stead.
            if one != other and str(row) not in (one, other):
                raise RunError(
                    f"expected two runs with the same classes, got {shown(one)} as class {row} in "
                    f"{_name(a)} and {shown(other)} in {_name(b)}."
                )

    def _expect_the_same_truth(self) -> None:
        one, other = self.a.truth[self.rows_a], self.b.truth[self.rows_b]
        if len(wrong := np.flatnonzero(one != other)):
            first = wrong[0]
            raise RunError(
                f"expected two runs on the same data, got the image "
                f"{self.a.ids[self.rows_a[first]]!r} of class {one[first]} in {_name(self.a)} and "
                f"{other[first]} in {_name(self.b)}."
            )

    def _tell_other_data(self) -> None:
        sources = [table.config.get("data") for table in (self.a, self.b)]
        one, other = (s.get("source") if isinstance(s, Mapping) else None for s in sources)
        if None not in (one, other) and one != other:
            log.warning(
                "%s is of the data %s and %s of %s: images are taken for the same by their ids.",
                _name(self.a), shown(one), _name(self.b), shown(other),
            )  # fmt: skip


def compare(a: str | os.PathLike[str], b: str | os.PathLike[str]) -> Comparison:
    """Two runs of classifiers on the images that both answered.

    Args:
        a, b: run directories.

    Raises:
        RunError: as ``RunPair``.
    """
    return RunPair(a, b).compare()


def mcnemar(a: np.ndarray, b: np.ndarray) -> tuple[int, int, float]:
    """McNemar's exact test, two-sided, of which of two is right on images: bool [n] each.

    Returns:
        The images that a alone and that b alone has right, and the p-value; 1 without any.
    """
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    p_value = float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0
    return only_a, only_b, p_value


def _pair(a: np.ndarray, b: np.ndarray) -> Pair:
    a, b = a.astype(np.float64), b.astype(np.float64)
    n, difference = len(a), b - a
    error = float(difference.std(ddof=1)) / math.sqrt(n) if n > 1 else None
    mean_a, mean_b = float(a.mean()), float(b.mean())
    ratio = mean_b / mean_a if mean_a else None
    return Pair(mean_a, mean_b, float(difference.mean()), error, ratio)


def _difference_interval(only_a: int, only_b: int, n: int) -> tuple[float, float]:
    """With b and c images that one run alone answered right, each one half more, of n + 2:

    (c - b) / n  +-  z sqrt(b + c - (c - b)^2 / n) / n
    """
    b, c, n = only_a + 0.5, only_b + 0.5, n + 2
    middle = (c - b) / n
    half = _Z * math.sqrt(b + c - (c - b) ** 2 / n) / n
    return max(-1.0, middle - half), min(1.0, middle + half)


def _answer(table: RunTable, row: int) -> list[Any]:
    index = int(table.index[row])
    return [
        index,
        table.names[index],
        int(index == table.truth[row]),
        table.probability[row],
        table.truth_probability[row],
    ]


def _name(table: RunTable) -> str:
    return str(Path(table.path))
