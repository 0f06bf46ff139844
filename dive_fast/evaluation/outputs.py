"""What lies in a run directory when it is done: ``summary.json`` and ``results.csv``."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dive_fast.core.files import replacing
from dive_fast.evaluation.coco_scores import NAMES
from dive_fast.evaluation.metrics import tell_what_is_missing
from dive_fast.evaluation.runfiles import cannot, read_run
from dive_fast.evaluation.summary import Summary, summary_of
from dive_fast.evaluation.table import RunTable

SUMMARY, TABLE = "summary.json", "results.csv"

COLUMNS = (
    "id", "truth", "truth_name", "index", "label", "correct", "probability", "truth_probability",
    "truth_rank", "margin", "evaluations", "seconds",
)  # fmt: skip
DETECTION_COLUMNS = ("id", "objects", "evaluations", "seconds", "error")


def write_outputs(
    path: Path, *, ids: Container[str] | None = None, fill_rate: float | None = None
) -> Summary:
    """Summarises a classifier's run and writes its ``summary.json`` and ``results.csv``.

    Both are made from ``results.jsonl``, and take the place of older ones when they are whole.

    Args:
        path: the run directory.
        ids: of the images that count; all if None.
        fill_rate: as ``Summary`` has it.

    Raises:
        RunError: there is no run of a classifier, it is damaged, or a file cannot be written.
    """
    table = RunTable.read(path)
    summary = summary_of(table, ids, fill_rate)
    tell_what_is_missing()
    config, environment = table.config, table.environment
    metrics = {
        "acc1": summary.accuracy,
        "acc5": summary.top5_accuracy,
        "mean_per_class_recall": summary.mean_per_class_accuracy,
    }
    head = _head(config, environment, "zeroshot_classification", metrics)
    _write_json(path / SUMMARY, {**head, **summary.to_dict()})
    groups = [f"group_{column}" for column in table.groups]
    write_csv(path / TABLE, [*COLUMNS, *groups, "error"], _rows(table, ids))
    return summary


def write_detection_outputs(
    path: Path,
    summary: Mapping[str, Any],
    records: Iterable[tuple[str, Mapping[str, Any]]],
) -> None:
    """The same of a detector's run.

    Args:
        path: the run directory.
        summary: of the run, for JSON.
        records: of the images that count, with their ids.

    Raises:
        RunError: there is no run, or a file cannot be written.
    """
    content = read_run(path)
    config, environment = content["config"], content.get("environment") or {}
    head = _head(config, environment, "detection", {n: summary[n] for n in NAMES})
    _write_json(path / SUMMARY, {**head, **summary})
    write_csv(path / TABLE, DETECTION_COLUMNS, map(_detection_row, records))


def _head(
    config: Mapping[str, Any], environment: Mapping[str, Any], task: str, metrics: Mapping
) -> dict[str, Any]:
    """The keys of CLIP_benchmark's results, which it makes one table of: names must be texts."""
    model, data = config.get("model"), config.get("data")
    model = model if isinstance(model, Mapping) else {"family": model}
    data = data if isinstance(data, Mapping) else {}
    return {
        "dataset": str(data.get("source") or ""),
        "model": str(environment.get("model") or model.get("family") or ""),
        "pretrained": str(model.get("weights") or ""),
        "task": task,
        "metrics": dict(metrics),
        "language": "en",
    }


def _rows(table: RunTable, ids: Container[str] | None) -> Iterator[list[Any]]:
    """One of every image, in the order of the answers, and behind them those without one."""
    margin = table.top_scores[:, 0] - table.top_scores[:, 1]
    known = table.top[:, 1] >= 0
    for row, key in enumerate(table.ids):
        if ids is not None and key not in ids:
            continue
        truth, index = int(table.truth[row]), int(table.index[row])
        yield [
            key,
            truth,
            table.names[truth],
            index,
            table.names[index],
            int(truth == index),
            table.probability[row],
            table.truth_probability[row],
            table.truth_rank[row],
            f"{margin[row]:.6g}" if known[row] else "",
            table.evaluations[row],
            table.seconds[row],
            *(values[row] for values in table.groups.values()),
            "",
        ]
    blank = [""] * (len(COLUMNS) - 1 + len(table.groups))
    for key, error in table.failed.items():
        if ids is None or key in ids:
            yield [key, *blank, error]


def _detection_row(item: tuple[str, Mapping[str, Any]]) -> list[Any]:
    key, record = item
    if "error" in record:
        return [key, "", "", "", record["error"]]
    return [key, len(record["boxes"]), record["evaluations"], record["seconds"], ""]


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    try:
        with replacing(path) as file:
            file.write(json.dumps(content, indent=2, allow_nan=False).encode() + b"\n")
    except OSError as error:
        raise cannot("written", path, error) from error


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A table, row by row, in UTF-8. Names of files may be any bytes: what is no text is escaped.

    Raises:
        RunError: it cannot be written.
    """
    try:
        with replacing(path) as file:
            text = io.TextIOWrapper(file, "utf-8", errors="backslashreplace", newline="")
            try:
                table = csv.writer(text, lineterminator="\n")
                table.writerow(header)
                table.writerows(rows)
            finally:
                text.detach()
    except OSError as error:
        raise cannot("written", path, error) from error
