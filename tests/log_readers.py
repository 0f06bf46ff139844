"""What TensorBoard, Weights & Biases and Trackio have on the disk, read back as figures.

Each reader gives {name: [(step, value), ...]} in the order of the steps.
"""

from __future__ import annotations

import json
import sqlite3
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Figures = dict[str, list[tuple[int, float]]]


def tensorboard(directory: Path) -> Figures:
    """As TensorBoard shows it: what a restart took back is gone."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory), size_guidance={"scalars": 0}).Reload()
    return {
        name: [(event.step, event.value) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }


def tensorboard_config(directory: Path) -> dict[str, Any]:
    """The first one that was stored."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory)).Reload()
    text = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    return json.loads(text.removeprefix("```json").removesuffix("```"))


def wandb_files(out: Path) -> list[Path]:
    """One of every sitting, oldest first."""
    return sorted(out.glob("wandb/offline-run-*/*.wandb"))


def wandb(path: Path) -> tuple[Figures, dict[str, Any], dict[str, Any], str]:
    """Figures, summary, configuration and the run's id."""
    from wandb.proto.wandb_internal_pb2 import Record

    figures: Figures = {}
    summary, config, run_id = {}, {}, ""
    for content in _log_records(path.read_bytes()):
        record = Record.FromString(content)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run_id = record.run.run_id
            config.update({i.key: json.loads(i.value_json) for i in record.run.config.update})
        elif kind == "summary":
            new = {(i.key or ".".join(i.nested_key)): i.value_json for i in record.summary.update}
            summary.update({key: json.loads(value) for key, value in new.items()})
        elif kind == "history":
            items = {(i.key or ".".join(i.nested_key)): i.value_json for i in record.history.item}
            row = {key: json.loads(value) for key, value in items.items()}
            for name in row:
                if not name.startswith("_"):
                    figures.setdefault(name, []).append((row["_step"], row[name]))
    return figures, summary, config, run_id


def _log_records(content: bytes) -> Iterator[bytes]:
    """Of LevelDB's log format: blocks of 32 KiB, records in one or several of them."""
    block, at, parts = 32768, 7, []
    while at + 7 <= len(content):
        left = block - at % block
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        parts.append(content[at + 7 : at + 7 + length])
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield b"".join(parts)
            parts = []


def trackio(directory: Path, project: str = "dive_fast") -> tuple[Figures, dict[str, Any]]:
    """Figures, and the configurations by the names of their runs."""
    with sqlite3.connect(directory / f"{project}.db") as base:
        rows = base.execute("SELECT step, metrics FROM metrics ORDER BY id").fetchall()
        configs = dict(base.execute("SELECT run_name, config FROM configs").fetchall())
    figures: Figures = {}
    for step, metrics in rows:
        for name, value in json.loads(metrics).items():
            figures.setdefault(name, []).append((step, value))
    return figures, {name: json.loads(config) for name, config in configs.items()}
