"""What an evaluation of a classifier found, in one object: for people, ``--json`` and files."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dive_fast.evaluation.grouping import MOST_VALUES
from dive_fast.evaluation.metrics import Figures, Groups, by_group, figures
from dive_fast.evaluation.table import RunTable, table_of

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Summary:
    """What an evaluation found; ``None`` stands for figures that no image supports.

    docs/runs.md has the equations.

    Attributes:
        accuracy: share of the images answered right.
        standard_error: of the accuracy, sqrt(p (1 - p) / n).
        mean_per_class_accuracy: mean over the classes that occur.
        expected_calibration_error: mean distance of confidence and accuracy, over 15 bins.
        n: images answered.
        failed: images that could not be read.
        evaluations_per_image: forwards plus backwards of the network.
        seconds_per_image: of wall time.
        fill_rate: share of the batches' rows that were used, over what this process computed.
        top5_accuracy: share of the images whose class is among the five most probable; None of
            fewer than five classes.
        auroc: macro average of one class against the rest; None without scikit-learn.
        macro_f1: mean F1 of the classes; None without scikit-learn.
        nll: mean of -log p(truth | x0), in nats.
        brier: mean squared distance of the posterior and the truth, in [0, 2].
        standard_errors: of the figures by their names, of those that have one.
        groups: for each column of ``group_by`` the figures of each of its values.
    """

    accuracy: float | None
    standard_error: float | None
    mean_per_class_accuracy: float | None
    expected_calibration_error: float | None
    n: int
    failed: int
    evaluations_per_image: float | None
    seconds_per_image: float | None
    fill_rate: float | None = None
    top5_accuracy: float | None = None
    auroc: float | None = None
    macro_f1: float | None = None
    nll: float | None = None
    brier: float | None = None
    standard_errors: dict[str, float] = field(default_factory=dict)
    groups: dict[str, Groups] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {**fields, "groups": {name: g.to_dict() for name, g in self.groups.items()}}


# The names that the figures have in a summary.
_NAMES = {
    "top1": "accuracy",
    "top5": "top5_accuracy",
    "mean_per_class": "mean_per_class_accuracy",
    "ece": "expected_calibration_error",
}


def summarise(records: Sequence[Mapping[str, Any]]) -> Summary:
    """The figures over records of ``results.jsonl``.

    Raises:
        RunError: a record lacks what the figures are made of, such as its ``truth``.
    """
    return summary_of(table_of(records))


def summary_of(
    table: RunTable, ids: Container[str] | None = None, fill_rate: float | None = None
) -> Summary:
    """The figures over a run.

    Args:
        table: the run.
        ids: of the images that count; all if None.
        fill_rate: as ``Summary`` has it.
    """
    rows = np.arange(len(table))
    failed = len(table.failed)
    if ids is not None:
        rows = np.array([row for row, key in enumerate(table.ids) if key in ids], np.int64)
        failed = sum(key in ids for key in table.failed)
    found = figures(table, rows)
    n = len(rows)
    return Summary(
        standard_error=found.standard_errors["top1"],
        n=n,
        failed=failed,
        evaluations_per_image=float(table.evaluations[rows].mean()) if n else None,
        seconds_per_image=float(table.seconds[rows].mean()) if n else None,
        fill_rate=fill_rate,
        standard_errors=_standard_errors(found),
        groups={column: by_group(table, column, rows) for column in _columns(table)},
        **_values(found),
    )


def _columns(table: RunTable) -> Iterator[str]:
    """The columns of which each value has figures of its own."""
    for column, values in table.groups.items():
        if len(set(values)) <= MOST_VALUES:
            yield column
        else:  # of a stream nobody looked at all values before
            log.warning(
                "the groups of the column %r are left out: they are more than %d.", column,
                MOST_VALUES,
            )  # fmt: skip


def _values(found: Figures) -> dict[str, float | None]:
    return {_NAMES.get(name, name): getattr(found, name) for name in found.standard_errors}


def _standard_errors(found: Figures) -> dict[str, float]:
    errors = found.standard_errors.items()
    return {_NAMES.get(name, name): error for name, error in errors if error is not None}
