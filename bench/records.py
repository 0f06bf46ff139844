"""The record of measurements that are no op benchmarks: one JSON object a line, only appended."""

from __future__ import annotations

import datetime
import json
import os
from pathlib import Path
from typing import Any

from dive_fast import DiffusionClassifier
from dive_fast.errors import RunError
from dive_fast.evaluation.machine import environment

RESULTS = Path(__file__).parent / "results"


def append(name: str, row: dict[str, Any], classifier: DiffusionClassifier) -> None:
    """Adds ``row`` to bench/results/<name>.jsonl, with time, load, versions, machine and commit."""
    append_line(RESULTS / f"{name}.jsonl", row, environment(classifier))


def append_line(path: Path, row: dict[str, Any], environment: dict[str, Any]) -> None:
    """Adds ``row`` to a file, with time, load and what it was measured under.

    Raises:
        RunError: the file cannot be written.
    """
    now = datetime.datetime.now(datetime.timezone.utc)
    record = {
        "time": now.isoformat(timespec="seconds"),
        **row,
        "load": os.getloadavg()[0],
        "environment": environment,
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror}.") from error
