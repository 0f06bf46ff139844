"""Confusion, single classes and groups of classifiers' runs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dive_fast.evaluation.curves import binomial_error
from dive_fast.evaluation.metrics import ClassFigures, confusion, per_class
from dive_fast.report.parts import (
    NOTHING,
    Cell,
    Column,
    Headed,
    Heat,
    Section,
    SideBySide,
    Table,
    Text,
    number,
    percent,
)
from dive_fast.report.runs import Run

MOST_IN_A_MATRIX = 40  # classes; of more the most confused pairs are listed
PAIRS = 50
_NARROW = 12  # classes of matrices that stand side by side
GROUPS = 100
# Shares of a class's images from which a cell is darker; the last steps are those of right answers.
_STEPS = (0.0, 0.02, 0.08, 0.2, 0.4, 0.7)


def confusion_section(runs: Sequence[Run]) -> Section:
    """A matrix of each run, or its most confused pairs."""
    parts: list[object] = []
    narrow = all(run.table.n_classes <= _NARROW for run in runs)
    for run in runs:
        matrix = confusion(run.table)
        small = run.table.n_classes <= MOST_IN_A_MATRIX
        part = _heat(run, matrix) if small else _pairs(run, matrix)
        parts.append(Headed(run.label, [part], series=run.series) if len(runs) > 1 else part)
    if narrow and len(runs) > 1:
        parts = [SideBySide(parts)]
    return Section("confusion", "What is taken for what", parts)


def _heat(run: Run, matrix: np.ndarray) -> Heat:
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    steps = np.searchsorted(_STEPS, shares, side="left")
    cells = [
        list(zip(counts, dark, strict=True))
        for counts, dark in zip(matrix.tolist(), steps.tolist(), strict=True)
    ]
    caption = (
        f"{run.label}: of the images of each class (row), how many were answered with each "
        "(column). Right answers lie on the diagonal; a stronger colour is a larger share of the "
        "row; empty cells are 0."
    )
    return Heat(caption, run.table.names, cells)


def _pairs(run: Run, matrix: np.ndarray) -> Table | Text:
    wrong = matrix.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:PAIRS]
    truth, answer = np.unravel_index(order, wrong.shape)
    of_class, names = matrix.sum(axis=1), run.table.names
    rows = [
        [
            Cell(names[t]),
            Cell(names[a]),
            Cell(f"{wrong[t, a]:,}", int(wrong[t, a])),
            _bar(wrong[t, a] / of_class[t], None, run.series),
        ]
        for t, a in zip(truth.tolist(), answer.tolist(), strict=True)
        if wrong[t, a]
    ]
    if not rows:
        return Text(f"{run.label}: no class was taken for another.")
    pairs = int(np.count_nonzero(wrong))
    caption = f"{run.label}: the {len(rows)} most frequent of {pairs:,} pairs that were confused"
    columns = [
        Column("Right class", numeric=False),
        Column("Answer", numeric=False),
        Column("Images"),
        Column("Share of the class"),
    ]
    return Table(caption, columns, rows)


# -- classes ---------------------------------------------------------------------------------------


def class_section(runs: Sequence[Run]) -> Section:
    """One row per class that occurs, in all runs."""
    found = {run.series: {c.name: c for c in per_class(run.table)} for run in runs}
    names = dict.fromkeys(name for of in found.values() for name in of)
    there = [n for n in names if any(_occurs(of.get(n)) for of in found.values())]
    table = _one_run(runs[0], found, there) if len(runs) == 1 else _many_runs(runs, found, there)
    parts: list[object] = [table]
    if missing := len(names) - len(there):
        parts.append(Text(f"{missing:,} more classes have no image and were never answered."))
    return Section("classes", "Class by class", parts)


def _occurs(one: ClassFigures | None) -> bool:
    return one is not None and bool(one.n or one.answered)


def _one_run(run: Run, found: dict[int, dict[str, ClassFigures]], names: Sequence[str]) -> Table:
    rows = []
    for name in names:
        one = found[run.series][name]
        precision, f1 = percent(one.precision), number(one.f1)
        rows.append(
            [
                Cell(name),
                Cell(f"{one.n:,}", one.n),
                _bar(one.recall, one.standard_error, run.series),
                Cell(precision, one.precision),
                Cell(f1, one.f1),
                Cell(f"{one.answered:,}", one.answered),
            ]
        )
    columns = [
        Column("Class", numeric=False),
        Column("Images"),
        Column("Recall", meaning="share of its images that were answered right"),
        Column("Precision", meaning="share of the answers with it that are right"),
        Column("F1"),
        Column("Answered", meaning="images that were answered with it"),
    ]
    return Table("Recall, precision and F1 of each class", columns, rows)


def _many_runs(
    runs: Sequence[Run], found: dict[int, dict[str, ClassFigures]], names: Sequence[str]
) -> Table:
    rows = []
    for name in names:
        of_runs = [(run.series, found[run.series].get(name)) for run in runs]
        counts = [one.n if one else 0 for _, one in of_runs]
        same = len(set(counts)) == 1
        images = f"{counts[0]:,}" if same else " / ".join(f"{n:,}" for n in counts)
        bars = [
            _bar(one.recall if one else None, one.standard_error if one else None, series)
            for series, one in of_runs
        ]
        rows.append([Cell(name), Cell(images, max(counts)), *bars])
    columns = [Column("Class", numeric=False), Column("Images")]
    columns += [Column(run.label, series=run.series) for run in runs]
    return Table("Recall of each class, run by run", columns, rows)


# -- groups ----------------------------------------------------------------------------------------


def group_section(runs: Sequence[Run]) -> Section | None:
    """A table for each column that a run is grouped by; None where there is none."""
    columns = dict.fromkeys(column for run in runs for column in run.table.groups)
    parts: list[object] = [part for column in columns for part in _groups(runs, column)]
    return Section("groups", "Groups", parts) if parts else None


def _groups(runs: Sequence[Run], column: str) -> list[object]:
    found = [_of_groups(run, column) for run in runs]
    values = list(dict.fromkeys(value for of in found for value in of))
    largest = sorted(values, key=lambda v: -max(of.get(v, (0, 0))[0] for of in found))[:GROUPS]
    shown = _in_order(largest)
    rows = []
    for value in shown:
        cells = [Cell(value or NOTHING)]
        for run, of in zip(runs, found, strict=True):
            n, hits = of.get(value, (0, 0))
            p = hits / n if n else None
            error = binomial_error(p, n) if n else None
            cells += [Cell(f"{n:,}", n), _bar(p, error, run.series)]
        rows.append(cells)
    columns = [Column(column, numeric=False)]
    for run in runs:
        name = f"{run.label}: " if len(runs) > 1 else ""
        series = run.series if len(runs) > 1 else None
        columns += [Column(f"{name}images"), Column(f"{name}accuracy", series=series)]
    parts: list[object] = [Table(f"Accuracy by {column}", columns, rows)]
    if len(values) > len(shown):
        parts.append(Text(f"The {len(shown)} largest of {len(values):,} groups are shown."))
    return parts


def _of_groups(run: Run, column: str) -> dict[str, tuple[int, int]]:
    """(images, right ones) by the value of the column."""
    if column not in run.table.groups:
        return {}
    values, place = np.unique(run.table.groups[column], return_inverse=True)
    n = np.bincount(place).tolist()
    hits = np.bincount(place, run.table.correct).astype(int).tolist()
    return dict(zip(values.tolist(), zip(n, hits, strict=True), strict=True))


def _in_order(values: Sequence[str]) -> list[str]:
    """By their size where all are numbers, else by their letters."""
    try:
        return sorted(values, key=float)
    except ValueError:
        return sorted(values)


def _bar(value: float | None, error: float | None, series: int) -> Cell:
    return Cell(percent(value, error), value, bar=value, series=series)
