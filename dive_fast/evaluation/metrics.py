"""Figures of a classifier's run, from its ``RunTable``; docs/runs.md has their equations.

scikit-learn (the extra ``metrics``) computes what it has: AUROC, F1, precision, confusion. Without
it ``figures`` leaves AUROC and macro F1 out, and what is nothing without it says so.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dive_fast.errors import DiveFastError, RunError, some
from dive_fast.evaluation.curves import (
    Bin,
    Coverage,
    CoveragePoint,
    binomial_error,
    coverage,
    reliability,
)
from dive_fast.evaluation.influence import (
    auroc_influence,
    calibration_influence,
    error_of,
    macro_f1_influence,
)
from dive_fast.evaluation.table import TOP, RunTable
from dive_fast.predict.calibration import (
    UNMEASURED_PROBABILITY,
    expected_calibration_error,
)

__all__ = [
    "Bin",
    "ClassFigures",
    "Coverage",
    "CoveragePoint",
    "FIGURES",
    "Figures",
    "Groups",
    "by_group",
    "confusion",
    "coverage",
    "figures",
    "per_class",
    "reliability",
    "tell_what_is_missing",
]

log = logging.getLogger(__name__)

_BLOCK = 2**18  # probabilities of the memory map that are held at once
_QUICK = 10**6  # probabilities of which the error of AUROC is computed in a second
_FEWEST = 16  # classes that are read at once, so that there are not too many readings


@dataclass(frozen=True)
class Figures:
    """Of some answered images; None where they do not support a figure.

    ``top5``, ``auroc``, ``nll`` and ``brier`` need records with ``log_posterior``.

    Attributes:
        n: images.
        top1: share of them that were answered right.
        top5: share whose right class is among the five most probable; None of fewer classes than
            five. A right class that was given up is counted as not among them.
        mean_per_class: mean recall of the classes that occur.
        auroc: mean over the classes that occur, but not in all images, of the area under the
            receiver operating characteristic of p(y | x0) for that class against the rest.
        macro_f1: mean F1 of the classes that occur or were answered.
        ece: expected calibration error over 15 bins.
        nll: mean of -log p(truth | x0), in nats; a class that was not measured counts as 1e-6.
        brier: mean of sum_y (p(y | x0) - [y = truth])^2, in [0, 2].
        standard_errors: by the names above; None where there is none to tell: of one image, and
            of the AUROC where images times classes are more than a million.
    """

    n: int
    top1: float | None = None
    top5: float | None = None
    mean_per_class: float | None = None
    auroc: float | None = None
    macro_f1: float | None = None
    ece: float | None = None
    nll: float | None = None
    brier: float | None = None
    standard_errors: dict[str, float | None] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


FIGURES = tuple(f.name for f in dataclasses.fields(Figures))[1:-1]


@dataclass(frozen=True)
class ClassFigures:
    """Of one class; None where nothing supports a figure.

    Attributes:
        name, row: the class.
        n: images that are of it.
        answered: images that were answered with it.
        recall: share of the ``n`` that were answered right.
        precision: share of the ``answered`` that are right.
        f1: their harmonic mean, 2 tp / (n + answered).
        standard_error: of the recall, sqrt(r (1 - r) / n).
    """

    name: str
    row: int
    n: int
    answered: int
    recall: float | None
    precision: float | None
    f1: float | None
    standard_error: float | None

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Groups:
    """Figures of the images by what a column says of them.

    Attributes:
        column: its name.
        figures: by value, in alphabetical order.
        worst: the value of the lowest accuracy, of several the first; None of no images.
    """

    column: str
    figures: dict[str, Figures]
    worst: str | None

    @property
    def worst_accuracy(self) -> float | None:
        return None if self.worst is None else self.figures[self.worst].top1

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "worst_accuracy": self.worst_accuracy}


def figures(table: RunTable, rows: np.ndarray | None = None) -> Figures:
    """All figures of a run, or of some of its images.

    Args:
        table: the run.
        rows: int [m], rows of the table; all if None.
    """
    rows = np.arange(len(table)) if rows is None else np.asarray(rows)
    n = len(rows)
    if n == 0:
        return Figures(0, standard_errors=dict.fromkeys(FIGURES))
    truth, index = table.truth[rows], table.index[rows]
    correct = truth == index
    found: dict[str, tuple[float | None, float | None]] = dict.fromkeys(FIGURES, (None, None))
    found["top1"] = _share(correct)
    found["mean_per_class"] = _mean_recall(truth, correct)
    p = table.probability[rows]
    ece_error = error_of(calibration_influence(p, correct))
    found["ece"] = expected_calibration_error(p, correct), ece_error
    with table.posteriors() as posteriors:
        if posteriors is not None:
            found["nll"] = _mean(-log_probability(table, rows))
            found["brier"] = _mean(_brier(posteriors, rows, truth))
            if table.n_classes >= TOP:
                found["top5"] = _share(table.truth_rank[rows] <= TOP)
        if (sklearn := _sklearn_metrics()) is not None:
            f1 = sklearn.f1_score(truth, index, average="macro", zero_division=0)
            found["macro_f1"] = float(f1), error_of(macro_f1_influence(truth, index))
            if posteriors is not None:
                found["auroc"] = _auroc(sklearn, posteriors, rows, truth)
    return Figures(
        n,
        **{name: value for name, (value, _) in found.items()},
        standard_errors={name: error for name, (_, error) in found.items()},
    )


def per_class(table: RunTable) -> list[ClassFigures]:
    """Recall, precision and F1 of every class of the model, in their order.

    Raises:
        DiveFastError: scikit-learn is not installed.
    """
    matrix = confusion(table)
    n, answered = matrix.sum(axis=1).tolist(), matrix.sum(axis=0).tolist()
    if len(table):
        precision, recall, f1, _ = _needed_sklearn().precision_recall_fscore_support(
            table.truth, table.index, labels=np.arange(table.n_classes), zero_division=np.nan
        )
    else:
        precision = recall = f1 = np.full(table.n_classes, np.nan)
    return [
        ClassFigures(
            name=table.names[row],
            row=row,
            n=n[row],
            answered=answered[row],
            recall=(r := _number(recall[row])),
            precision=_number(precision[row]),
            f1=_number(f1[row]),
            standard_error=None if r is None else binomial_error(r, n[row]),
        )
        for row in range(table.n_classes)
    ]


def confusion(table: RunTable) -> np.ndarray:
    """int64 [C, C]: of the images of each class (row) how many were answered with each (column).

    Raises:
        DiveFastError: scikit-learn is not installed.
    """
    if not len(table):
        return np.zeros((table.n_classes, table.n_classes), np.int64)
    c = table.n_classes
    labels = np.arange(max(2, c))  # of a single one scikit-learn warns
    found = _needed_sklearn().confusion_matrix(table.truth, table.index, labels=labels)
    return found[:c, :c].astype(np.int64)


def by_group(table: RunTable, column: str, rows: np.ndarray | None = None) -> Groups:
    """The figures of the images of each value of a column of ``--group-by``.

    Args:
        table: the run.
        column: its name.
        rows: int [m], rows of the table; all if None.

    Raises:
        RunError: the run has no such column.
    """
    if column not in table.groups:
        there = some(list(table.groups)) if table.groups else "none"
        raise RunError(f"expected a column that the run is grouped by ({there}), got {column!r}.")
    values = table.groups[column]
    of_value: dict[str, list[int]] = {}
    for row in range(len(table)) if rows is None else rows.tolist():
        of_value.setdefault(values[row], []).append(row)
    found = {value: figures(table, np.array(of_value[value])) for value in sorted(of_value)}
    return Groups(column, found, min(found, key=lambda value: found[value].top1, default=None))


# -- single figures, each with its standard error -------------------------------------------------


def _share(hits: np.ndarray) -> tuple[float, float]:
    p = float(hits.mean())
    return p, binomial_error(p, len(hits))


def _mean(values: np.ndarray) -> tuple[float, float | None]:
    n = len(values)
    return float(values.mean()), float(values.std(ddof=1)) / math.sqrt(n) if n > 1 else None


def _mean_recall(truth: np.ndarray, correct: np.ndarray) -> tuple[float, float]:
    """With K classes that occur: se^2 = sum_c r_c (1 - r_c) / n_c / K^2."""
    n = np.bincount(truth)
    occurs = n > 0
    n, hits = n[occurs], np.bincount(truth, correct)[occurs]
    recall = hits / n
    variance = (recall * (1 - recall) / n).sum()
    return float(recall.mean()), math.sqrt(variance) / len(n)


def log_probability(table: RunTable, rows: np.ndarray) -> np.ndarray:
    """log p(truth | x0) of some rows, float64 [m], in nats; not measured it counts as log 1e-6."""
    found = table.truth_log_probability[rows]
    return np.where(found == -math.inf, math.log(UNMEASURED_PROBABILITY), found)


def _brier(posteriors: np.ndarray, rows: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """sum_y (p_y - [y = truth])^2 of every image, float64 [m]."""
    found = np.ones(len(rows))
    for first, block in _blocks(posteriors, rows):
        found += np.einsum("nc,nc->n", block, block, dtype=np.float64)
        own = np.flatnonzero((first <= truth) & (truth < first + block.shape[1]))
        found[own] -= 2 * block[own, truth[own] - first].astype(np.float64)
    return found


def _auroc(
    sklearn, posteriors: np.ndarray, rows: np.ndarray, truth: np.ndarray
) -> tuple[float | None, float | None]:
    n = np.bincount(truth, minlength=posteriors.shape[1])
    quick = posteriors.shape[1] * len(rows) <= _QUICK
    areas, influence = [], np.zeros(len(rows))
    for first, block in _blocks(posteriors, rows):
        for row, scores in enumerate(block.T, start=first):
            if 0 < n[row] < len(rows):
                right = truth == row
                areas.append(sklearn.roc_auc_score(right, scores))
                if quick:
                    influence += auroc_influence(scores, right)
    if not areas:
        return None, None
    return float(np.mean(areas)), error_of(influence / len(areas)) if quick else None


def _blocks(posteriors: np.ndarray, rows: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """p(y | x0) of some images for a few classes after the other: (first class, [m, classes])."""
    classes = posteriors.shape[1]
    width = min(classes, max(_FEWEST, _BLOCK // len(rows)))
    height = max(1, _BLOCK // classes)  # rows of which whole pages may be mapped at once
    for first in range(0, classes, width):
        block = np.empty((len(rows), min(width, classes - first)), np.float32)
        for start in range(0, len(rows), height):
            some_rows = rows[start : start + height]
            block[start : start + height] = posteriors[some_rows, first : first + width]
            _release(posteriors)
        yield first, block


def _release(posteriors: np.ndarray) -> None:
    """Lets go of the pages that were read: they lie in a file, and need not count as memory."""
    mapped = getattr(posteriors, "_mmap", None)
    if hasattr(mapped, "madvise"):
        import mmap

        mapped.madvise(mmap.MADV_DONTNEED)


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


# -- scikit-learn ----------------------------------------------------------------------------------


def _sklearn_metrics():
    """The module, or None where it is not installed."""
    try:
        import sklearn.metrics
    except ImportError:
        return None
    return sklearn.metrics


def _needed_sklearn():
    if (found := _sklearn_metrics()) is None:
        raise DiveFastError(f"this needs scikit-learn: {INSTALL}.")
    return found


INSTALL = "pip install 'dive_fast[metrics]'"


def tell_what_is_missing() -> None:
    """One line where figures were left out because scikit-learn is not installed."""
    if _sklearn_metrics() is None:
        log.warning("AUROC and macro F1 are left out, they need scikit-learn: %s.", INSTALL)
