"""The figures of the runs side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dive_fast.evaluation.metrics import Figures
from dive_fast.report.configuration import model_name, strategy_name
from dive_fast.report.parts import (
    NOTHING,
    Cell,
    Column,
    Section,
    Table,
    Text,
    Tiles,
    best_of,
    number,
    percent,
)
from dive_fast.report.runs import Run


@dataclass(frozen=True)
class _Of:
    """A column of the headline."""

    title: str
    name: str
    meaning: str
    share: bool = True
    higher: bool = True


_COLUMNS = (
    _Of("Accuracy", "top1", "share of the images answered right, ± one standard error"),
    _Of("Top\N{NON-BREAKING HYPHEN}5", "top5", "share whose right class is among the five best"),
    _Of("Mean per class", "mean_per_class", "mean recall of the classes that occur"),
    _Of("AUROC", "auroc", "area under the ROC curve, each class against the rest", share=False),
    _Of("Macro F1", "macro_f1", "mean F1 of the classes", share=False),
    _Of("ECE", "ece", "expected calibration error, 15 bins; lower is better", higher=False),
    _Of("NLL", "nll", "mean -log p of the right class, in nats; lower is better", False, False),
    _Of("Brier", "brier", "mean squared error of p, in [0, 2]; lower is better", False, False),
)


def section(runs: Sequence[Run], figures: Sequence[Figures]) -> Section:
    """The headline of runs of classifiers: large numbers of a single one, and the table."""
    parts: list[object] = []
    if len(runs) == 1:
        parts.append(_tiles(runs[0], figures[0]))
    parts.append(_table(runs, figures))
    if any(f.auroc is None and f.macro_f1 is None for f in figures):
        parts.append(Text(f"{NOTHING} stands for what the run's records do not tell."))
    if len({str(run.data.get("fingerprint")) for run in runs}) > 1:
        parts.append(Text("These runs are over different images: compare with care."))
    return Section("figures", "Accuracy, calibration, cost", parts)


def _table(runs: Sequence[Run], figures: Sequence[Figures]) -> Table:
    columns = [Column("Run", numeric=False)]
    columns += [Column(c.title, meaning=c.meaning) for c in _COLUMNS]
    cost = ("forwards plus backwards of the network, a mean", "of wall time, a mean")
    columns += [
        Column("Evaluations per image", meaning=cost[0]),
        Column("Seconds per image", meaning=cost[1]),
        Column("Images", meaning="answered; failed ones could not be read"),
    ]
    by_column = [_cells(c, figures) for c in _COLUMNS]
    evaluations = [float(run.table.evaluations.mean()) for run in runs]
    seconds = [float(run.table.seconds.mean()) for run in runs]
    by_column += [_costs(evaluations, 0), _costs(seconds, 3)]
    by_column.append([counted(len(run.table), len(run.table.failed)) for run in runs])
    rows = [[named(run), *(cells[i] for cells in by_column)] for i, run in enumerate(runs)]
    return Table("The runs side by side", columns, rows, sortable=len(runs) > 1)


def _cells(column: _Of, figures: Sequence[Figures]) -> list[Cell]:
    values = [getattr(f, column.name) for f in figures]
    errors = [f.standard_errors.get(column.name) for f in figures]
    text = percent if column.share else number
    best = best_of(values, column.higher)
    return [
        Cell(text(value), value, _plus_minus(column, error), best=best[i])
        for i, (value, error) in enumerate(zip(values, errors, strict=True))
    ]


def _plus_minus(column: _Of, error: float | None) -> str:
    if error is None:
        return ""
    return f"± {100 * error:.1f}" if column.share else f"± {number(error)}"


def named(run: Run) -> Cell:
    """The head of a run's row, with what it is a run of."""
    return Cell(run.label, note=f"{model_name(run)}, {strategy_name(run)}", run=run.series)


def _costs(values: Sequence[float], digits: int) -> list[Cell]:
    best = best_of([round(v, digits) for v in values], higher=False)
    return [Cell(number(v, digits), v, best=b) for v, b in zip(values, best, strict=True)]


def counted(n: int, failed: int) -> Cell:
    """How many images were answered, and how many failed."""
    return Cell(f"{n:,}", n, f"{failed:,} failed" if failed else "")


def _tiles(run: Run, found: Figures) -> Tiles:
    table = run.table
    errors = found.standard_errors
    failed = f"{len(table.failed):,} failed" if table.failed else "none failed"
    error = errors.get("top1")
    return Tiles(
        [
            ("accuracy", percent(found.top1), f"± {percent(error)}" if error else ""),
            ("evaluations per image", number(float(table.evaluations.mean()), 0), ""),
            ("seconds per image", number(float(table.seconds.mean()), 3), ""),
            ("calibration error", percent(found.ece), "ECE, 15 bins"),
            ("images", f"{len(table):,}", failed),
        ]
    )
