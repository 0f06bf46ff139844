"""Small runs of classifiers and detectors, for pages that are made of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dive_fast.evaluation import RunDirectory
from dive_fast.evaluation.records import Form

NAMES = ("ant", "bee", "cat")
ENVIRONMENT = {"dive_fast": "0.1.0", "torch": "2.10", "model": "toy", "device": "cpu"}


def answer(
    key: str,
    truth: int,
    probabilities: Sequence[float],
    names: Sequence[str] = NAMES,
    **more: object,
) -> dict[str, Any]:
    """A classifier's record; a probability of 0 was not measured."""
    order = [int(i) for i in np.argsort(-np.array(probabilities), kind="stable")]
    best, n = order[0], len(probabilities)
    top = [(i, probabilities[i]) for i in order[:5] if probabilities[i]]
    return {
        "id": key,
        "truth": truth,
        "label": names[best],
        "index": best,
        "probability": probabilities[best],
        "top": [{"label": names[i], "index": i, "score": p} for i, p in top],
        "log_posterior": [math.log(p) if p else None for p in probabilities],
        "losses": [1.0] * n,
        "n_probes": [3] * n,
        "eliminated": [],
        "log_odds_bound": [None] * n,
        "evaluations": 10,
        "seconds": 0.5,
        **more,
    }


# Three of four right; the wrong one is sure of it, and "ant/2.png" is the closest.
ANSWERS = (
    answer("ant/1.png", 0, [0.9, 0.1, 0.0], groups={"eye": "left"}),
    answer("ant/2.png", 0, [0.5, 0.4, 0.1], groups={"eye": "right"}, evaluations=40),
    answer("bee/1.png", 1, [0.05, 0.2, 0.75], groups={"eye": "left"}, evaluations=20),
    answer("cat/1.png", 2, [0.1, 0.2, 0.7], groups={"eye": "right"}),
    {"id": "cat/2.png", "truth": 2, "error": "cat/2.png: cut off."},
)
PICTURE_IDS = tuple(record["id"] for record in ANSWERS if "error" not in record)


def write_run(
    path: Path,
    records: Sequence[Mapping[str, Any]] = ANSWERS,
    names: Sequence[str] | None = NAMES,
    data: str | None = None,
    strategy: str = "auto",
    **config: Any,
) -> Path:
    """A classifier's run directory."""
    settings = {"model": {"family": "dit", "weights": "abc"}, "strategy": {"name": strategy}}
    settings |= {"probes": 100, "seed": 0, "data": {"source": "toy", "count": 5}, **config}
    facts = {"names": None if names is None else list(names), "data": data}
    form = Form("classification", names)
    with RunDirectory.open(path, settings, ENVIRONMENT, form, facts) as run:
        for record in records:
            run.append(record)
    return path


def write_folder(folder: Path, side: int = 20) -> Path:
    """Pictures of the answers, one sub-folder per class."""
    for i, key in enumerate(PICTURE_IDS):
        target = folder / key
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (side, side + 10), (40 * i, 90, 200)).save(target)
    return folder


def write_detections(path: Path, records: Sequence[Mapping[str, Any]], **config: Any) -> Path:
    """A detector's run directory, of the classes "one" and "two"."""
    settings = {"model": {"family": "layout"}, "strategy": {"name": "guided"}, **config}
    settings["names"] = ["one", "two"]
    form = Form("detection", ["one", "two"])
    with RunDirectory.open(path, settings, ENVIRONMENT, form) as run:
        for record in records:
            run.append(record)
    return path


def found(key: str, boxes: Sequence[Sequence[float]], rows: Sequence[int], sure: float) -> dict:
    """A detector's record."""
    return {
        "id": key,
        "boxes": [list(box) for box in boxes],
        "labels": [("one", "two")[row] for row in rows],
        "indices": list(rows),
        "confidences": [sure] * len(boxes),
        "evaluations": 200,
        "seconds": 1.0,
    }
