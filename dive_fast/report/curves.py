"""Figures of classifiers' runs: accuracy over evaluations, reliability, coverage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dive_fast.evaluation.curves import binomial_error, coverage, reliability
from dive_fast.evaluation.table import RunTable
from dive_fast.report import plots
from dive_fast.report.parts import (
    Cell,
    Column,
    Figure,
    Section,
    SideBySide,
    Table,
    number,
    percent,
)
from dive_fast.report.plots import Curve
from dive_fast.report.runs import Run

_PARTS = 8  # of a run's images, by their evaluations


@dataclass(frozen=True)
class Part:
    """Images that took about as many evaluations.

    Attributes:
        least, most, mean: their evaluations.
        n: how many they are.
        accuracy: the share that was answered right.
    """

    least: int
    most: int
    mean: float
    n: int
    accuracy: float


def by_evaluations(table: RunTable, parts: int = _PARTS) -> list[Part]:
    """A run's images in parts of about one size by their evaluations; equal ones stay together."""
    values, place = np.unique(table.evaluations, return_inverse=True)
    n = np.bincount(place)
    hits = np.bincount(place, table.correct)
    # A value belongs to the part in which the middle of its images lies.
    middle = np.cumsum(n) - n / 2
    part = np.minimum((parts * middle / len(table)).astype(int), parts - 1)
    found = []
    for i in np.unique(part):
        own = part == i
        total = int(n[own].sum())
        mean = float((values[own] * n[own]).sum()) / total
        bounds = int(values[own].min()), int(values[own].max())
        found.append(Part(*bounds, mean, total, float(hits[own].sum()) / total))
    return found


def cost_section(runs: Sequence[Run]) -> Section:
    """What accuracy costs, between runs and within them."""
    figures = [_within(runs)]
    if len(runs) > 1:
        figures.insert(0, _between(runs))
    return Section("evaluations", "Accuracy over evaluations", [SideBySide(figures)])


def confidence_section(runs: Sequence[Run]) -> Section:
    """Whether probabilities can be believed, and what leaving out the uncertain brings."""
    figures = [_reliability(runs), _coverage(runs)]
    return Section("confidence", "What the probabilities are worth", [SideBySide(figures)])


def _between(runs: Sequence[Run]) -> Figure:
    curves, rows, said = [], [], []
    for run in runs:
        n, p = len(run.table), float(run.table.correct.mean())
        mean, error = float(run.table.evaluations.mean()), binomial_error(p, n)
        at = np.array([mean]), np.array([p]), np.array([error])
        curves.append(Curve(run.series, *at))
        rows.append([Cell(run.label, run=run.series), _count(mean, 1), _share(p, error), _count(n)])
        said.append(f"{run.label} {percent(p, error)} at {mean:,.0f}")
    columns = _columns("Run", "Evaluations per image", "Accuracy", "Images")
    return Figure(
        plots.runs_over_evaluations("between", curves),
        f"Accuracy over evaluations per image: {'; '.join(said)}.",
        "Run by run",
        "Each run is a point; the bars are one standard error.",
        _legend(runs),
        Table("Accuracy and evaluations of each run", columns, rows),
    )


def _within(runs: Sequence[Run]) -> Figure:
    curves, rows, said = [], [], []
    for run in runs:
        parts = by_evaluations(run.table)
        errors = [binomial_error(p.accuracy, p.n) for p in parts]
        x, y = np.array([p.mean for p in parts]), np.array([p.accuracy for p in parts])
        curves.append(Curve(run.series, x, y, np.array(errors)))
        for part, error in zip(parts, errors, strict=True):
            rows.append(
                [
                    Cell(run.label, run=run.series),
                    Cell(_range(part.least, part.most), part.mean),
                    _share(part.accuracy, error),
                    _count(part.n),
                ]
            )
        first, last = parts[0], parts[-1]
        said.append(
            f"{run.label} {percent(first.accuracy)} at {_range(first.least, first.most)}"
            + (
                f" and {percent(last.accuracy)} at {_range(last.least, last.most)}"
                if len(parts) > 1
                else ""
            )
        )
    columns = _columns("Run", "Evaluations", "Accuracy", "Images")
    return Figure(
        plots.accuracy_by_evaluations("within", curves),
        f"Accuracy of the images by how many evaluations they took: {'; '.join(said)}.",
        "Image by image",
        f"The images of each run in up to {_PARTS} parts of about one size, by how many "
        "evaluations they took; the bars are one standard error.",
        _legend(runs),
        Table("Accuracy by evaluations within each run", columns, rows),
    )


def _reliability(runs: Sequence[Run]) -> Figure:
    curves, rows, said = [], [], []
    for run in runs:
        bins = [b for b in reliability(run.table) if b.n]
        curves.append(
            Curve(
                run.series,
                np.array([b.confidence for b in bins]),
                np.array([b.accuracy for b in bins]),
                np.array([b.standard_error for b in bins]),
                np.array([b.n for b in bins]),
            )
        )
        rows += [
            [
                Cell(run.label, run=run.series),
                Cell(f"{percent(b.low)} to {percent(b.high)}", b.low),
                _share(b.confidence),
                _share(b.accuracy, b.standard_error),
                _count(b.n),
            ]
            for b in bins
        ]
        sure = bins[-1]
        said.append(
            f"{run.label}: of {sure.n:,} answers surer than {percent(sure.low)}, "
            f"{percent(sure.accuracy)} are right"
        )
    columns = _columns("Run", "Probability", "Mean probability", "Accuracy", "Images")
    return Figure(
        plots.reliability("reliability", curves),
        f"Reliability diagram. {'; '.join(said)}.",
        "Reliability",
        "Where the points lie on the dashed line, answers of 80% are right in 80% of the cases. "
        "Below: how many images there are in each of 15 bins.",
        _legend(runs),
        Table("Accuracy by the answer's probability", columns, rows),
    )


def _coverage(runs: Sequence[Run]) -> Figure:
    curves, rows, said = [], [], []
    for run in runs:
        found = coverage(run.table)
        points = found.points
        x, y = np.array([p.coverage for p in points]), np.array([p.accuracy for p in points])
        curves.append(Curve(run.series, x, y))
        rows += [
            [
                Cell(run.label, run=run.series),
                _share(p.coverage),
                _share(p.accuracy, p.standard_error),
                Cell(number(p.probability), p.probability),
                _count(p.n),
            ]
            for p in points
        ]
        half = min(points, key=lambda p: abs(p.coverage - 0.5))
        said.append(
            f"{run.label}: {percent(points[-1].accuracy)} of all are right, and "
            f"{percent(half.accuracy)} of the surest {percent(half.coverage, digits=0)}; "
            f"area of the risk {number(found.area, 4)}"
        )
    columns = _columns("Run", "Answered", "Accuracy", "Lowest probability", "Images")
    return Figure(
        plots.coverage("coverage", curves),
        f"Accuracy over coverage. {'. '.join(said)}.",
        "Leaving out the uncertain",
        "How accurate the answers are when only the most certain ones are given.",
        _legend(runs),
        Table("Accuracy of the most certain answers", columns, rows),
    )


def _columns(first: str, *others: str) -> list[Column]:
    return [Column(first, numeric=False), *(Column(title) for title in others)]


def _legend(runs: Sequence[Run]) -> list[tuple[int, str]]:
    return [(run.series, run.label) for run in runs] if len(runs) > 1 else []


def _range(least: int, most: int) -> str:
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"


def _share(value: float, error: float | None = None) -> Cell:
    return Cell(percent(value, error), value)


def _count(value: float, digits: int = 0) -> Cell:
    return Cell(number(value, digits), value)
