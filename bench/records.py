"""The record of measurements that are no op benchmarks: one JSON object a line, only appended."""

from __future__ import annotations

import datetime
import json
import os
from pathlib import Path
from typing import Any

from dive_fast import DiffusionClassifier, LayoutDetector
from dive_fast.evaluate import environment

RESULTS = Path(__file__).parent / "results"


def append(name: str, row: dict[str, Any], classifier: DiffusionClassifier) -> None:
    """Adds ``row`` to bench/results/<name>.jsonl, with time, load, versions, machine and commit."""
    append_to(RESULTS / f"{name}.jsonl", row, classifier)


def append_to(path: Path, row: dict[str, Any], model: DiffusionClassifier | LayoutDetector) -> None:
    """The same, to any file."""
    now = datetime.datetime.now(datetime.timezone.utc)
    record = {
        "time": now.isoformat(timespec="seconds"),
        **row,
        "load": os.getloadavg()[0],
        "environment": environment(model),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
