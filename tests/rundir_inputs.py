"""Records that a run directory is given, and what then lies in it."""

from __future__ import annotations

import json
from pathlib import Path

CONFIG = {"model": "digits", "seed": 0, "invert": {"lr": 0.01, "stages": (1, 2)}}


def record(i: int, **values: object) -> dict:
    return {"id": f"image-{i}", "label": i} | values


def lines(path: Path) -> list[dict]:
    content = (path / "results.jsonl").read_bytes()
    assert content == b"" or content.endswith(b"\n")
    return [json.loads(line) for line in content.splitlines()]
