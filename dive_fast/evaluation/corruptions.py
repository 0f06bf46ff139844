"""Accuracy under corruptions: one run for each corruption and severity, and one table of all.

    E(c, s)  = share of the images answered wrong under corruption c at severity s
    E(c)     = mean over s of E(c, s)
    mCE      = mean over c of E(c)
    relative = mean over c of (E(c) - E(clean))

Without the division by AlexNet's errors that arXiv 1903.12261 has, which are of ImageNet.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from dive_fast.core.files import replacing
from dive_fast.data import DataSet, corrupted
from dive_fast.data.corruptions import Corruption, expect_corruptions
from dive_fast.errors import DiveFastError, RunError, shown
from dive_fast.evaluation.classification import evaluate
from dive_fast.evaluation.outputs import write_csv
from dive_fast.evaluation.runfiles import RUN, cannot
from dive_fast.evaluation.shards import Shard
from dive_fast.evaluation.summary import Summary
from dive_fast.evaluation.table import RunTable
from dive_fast.predict.classifier import DiffusionClassifier

CLEAN = "clean"
TABLE_JSON, TABLE_CSV = "corruptions.json", "corruptions.csv"


@dataclass(frozen=True)
class Figure:
    """A mean over images with its standard error; None where no image supports it."""

    value: float | None
    standard_error: float | None


@dataclass(frozen=True)
class Row:
    """One run of the table.

    Attributes:
        corruption: its name; "clean" of the clean images.
        severity: 1 to 5; None of the clean images.
        run: its folder's name.
        n, failed: images that were answered, and that could not be read.
        accuracy: of those that were answered.
        relative: the error above that of the clean images, over those that all runs answered; its
            standard error is of the pairs.
        evaluations, seconds: per image.
    """

    corruption: str
    severity: int | None
    run: str
    n: int
    failed: int
    accuracy: Figure
    relative: Figure
    evaluations: float | None
    seconds: float | None


@dataclass(frozen=True)
class CorruptionTable:
    """What a model's accuracy becomes under corruptions.

    Attributes:
        rows: the clean run first, then in the order asked for.
        errors: E(c) of each corruption, over the images that all runs answered.
        relative: E(c) - E(clean) of each.
        mean_error: mCE.
        mean_relative: mean over the corruptions of E(c) - E(clean).
        n: images that all runs answered.
        failed: images that could not be read, over all runs.
    """

    rows: tuple[Row, ...]
    errors: dict[str, Figure]
    relative: dict[str, Figure]
    mean_error: Figure
    mean_relative: Figure
    n: int
    failed: int

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)


def evaluate_corruptions(
    classifier: DiffusionClassifier,
    data: DataSet,
    out: str | Path,
    corruptions: Sequence[Corruption],
    *,
    shard: Shard | str | None = None,
    progress: bool = False,
    **asked: Any,
) -> CorruptionTable:
    """``evaluate`` on the clean images and under every corruption, each in a folder of ``out``.

    ``out/clean`` is the clean run, ``out/NAME-SEVERITY`` the others; each is a run directory as
    ``evaluate`` writes it, and resumes as such. At the end ``out/corruptions.json`` and
    ``out/corruptions.csv`` are written; of a shard nothing but its runs.

    Args:
        data: clean images.
        corruptions: which, each once.
        shard, progress, asked: as ``evaluate`` has them.

    Raises:
        RunError: ``out`` is a run itself, or as ``evaluate``.
        DiveFastError: nothing or something else in ``corruptions``, or imagecorruptions-imaug is
            not installed.
    """
    chosen = _as_corruptions(corruptions)
    expect_corruptions()
    for corruption in chosen:
        corruption.expect_effect(classifier.model.image_shape[0])
    out = Path(out)
    if (out / RUN).exists():
        raise RunError(
            f"{out} is a run itself: expected a folder for one run of each corruption; choose "
            "another --out."
        )
    shard = Shard.read(shard) if isinstance(shard, str) else shard
    summaries: list[Summary] = []
    names = [CLEAN, *map(str, chosen)]
    for number, (name, corruption) in enumerate(zip(names, [None, *chosen], strict=True), 1):
        if progress:
            tqdm.write(f"{number} of {len(names)}: {name}", file=sys.stderr)
        images = data if corruption is None else _under(data, corruption, classifier)
        summaries.append(
            evaluate(classifier, images, out / name, shard=shard, progress=progress, **asked)
        )
    paths = [out / name if shard is None else shard.folder(out / name) for name in names]
    table = _table(names, chosen, summaries, _wrong(paths, data))
    if shard is None:
        _write(out, table)
    return table


def _as_corruptions(given: Any) -> list[Corruption]:
    found = list(given) if isinstance(given, list | tuple) else []
    if not found or not all(isinstance(one, Corruption) for one in found):
        raise DiveFastError(f"expected at least one Corruption, got {shown(given)}.")
    if len(set(map(str, found))) < len(found):
        raise DiveFastError("expected each corruption once, got one of them twice.")
    return found


def _under(data: DataSet, corruption: Corruption, classifier: DiffusionClassifier) -> DataSet:
    return corrupted(
        data,
        corruption.name,
        corruption.severity,
        image_shape=classifier.model.image_shape,
        seed=corruption.seed,
    )


def _wrong(paths: Sequence[Path], data: DataSet) -> np.ndarray:
    """Whether each run answered wrong, bool [R, n], of the images that all of them answered."""
    ids = set(data.ids)
    answers: list[dict[str, bool]] = []
    for path in paths:
        table = RunTable.read(path)
        right = zip(table.ids, table.correct.tolist(), strict=True)
        answers.append({key: not value for key, value in right if key in ids})
    common = [key for key in answers[0] if all(key in other for other in answers[1:])]
    return np.array([[found[key] for key in common] for found in answers], bool)


def _table(
    names: Sequence[str],
    chosen: Sequence[Corruption],
    summaries: Sequence[Summary],
    wrong: np.ndarray,
) -> CorruptionTable:
    clean, under = wrong[0].astype(float), wrong[1:].astype(float)
    rows = [_row(CLEAN, None, CLEAN, summaries[0], _figure(clean - clean))]
    for corruption, name, summary, own in zip(chosen, names[1:], summaries[1:], under, strict=True):
        rows.append(_row(corruption.name, corruption.severity, name, summary, _figure(own - clean)))
    # [C, n], the mean over the severities of each image's errors
    kinds = list(dict.fromkeys(corruption.name for corruption in chosen))
    of = np.array([corruption.name for corruption in chosen])
    errors = np.stack([under[of == kind].mean(axis=0) for kind in kinds])
    return CorruptionTable(
        rows=tuple(rows),
        errors={kind: _figure(own) for kind, own in zip(kinds, errors, strict=True)},
        relative={kind: _figure(own - clean) for kind, own in zip(kinds, errors, strict=True)},
        mean_error=_figure(errors.mean(axis=0)),
        mean_relative=_figure(errors.mean(axis=0) - clean),
        n=wrong.shape[1],
        failed=sum(summary.failed for summary in summaries),
    )


def _row(
    corruption: str, severity: int | None, run: str, summary: Summary, relative: Figure
) -> Row:
    return Row(
        corruption=corruption,
        severity=severity,
        run=run,
        n=summary.n,
        failed=summary.failed,
        accuracy=Figure(summary.accuracy, summary.standard_error),
        relative=relative,
        evaluations=summary.evaluations_per_image,
        seconds=summary.seconds_per_image,
    )


def _figure(values: np.ndarray) -> Figure:
    """The mean over images [n], and its standard error."""
    n = len(values)
    error = float(values.std(ddof=1)) / math.sqrt(n) if n > 1 else None
    return Figure(float(values.mean()) if n else None, error)


_COLUMNS = (
    "corruption", "severity", "run", "n", "failed", "accuracy", "accuracy_standard_error",
    "relative_error", "relative_error_standard_error", "evaluations", "seconds",
)  # fmt: skip


def _write(out: Path, table: CorruptionTable) -> None:
    path = out / TABLE_JSON
    try:
        with replacing(path) as file:
            file.write(json.dumps(table.to_dict(), indent=2, allow_nan=False).encode() + b"\n")
    except OSError as error:
        raise cannot("written", path, error) from error
    write_csv(out / TABLE_CSV, _COLUMNS, map(_cells, table.rows))


def _cells(row: Row) -> list[Any]:
    figures = (row.accuracy.value, row.accuracy.standard_error)
    figures += (row.relative.value, row.relative.standard_error, row.evaluations, row.seconds)
    whole = (row.corruption, row.severity, row.run, row.n, row.failed)
    return ["" if value is None else value for value in (*whole, *figures)]
