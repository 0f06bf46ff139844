"""The demonstration's second half: real digits found in scenes, in numbers and in an image."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

from dive_fast.data.coco import CocoDataset
from dive_fast.data.scenes import write_scenes
from dive_fast.evaluation import evaluate_detections, read_records
from dive_fast.evaluation.machine import environment
from dive_fast.predict.detections import Detections
from dive_fast.predict.detector import LayoutDetector

SCENES = 2  # of some 2,500 evaluations each
COLUMNS = 3
GAP = 12  # pixels between images


def run_detection_demo(
    out: str | Path, *, limit: int | None = None, progress: bool = True
) -> dict[str, Any]:
    """Finds the digits of the first held-out scenes and writes ``out``.

    Writes ``scenes.json`` (the twelve COCO numbers and the cost), ``scenes.png`` (what was found)
    and the run directory ``scenes``; run again, it goes on where it stopped.

    Args:
        out: the folder.
        limit: scenes, two if None.
        progress: show a bar.

    Returns:
        The content of ``scenes.json``.
    """
    out = Path(out)
    detector = LayoutDetector.from_pretrained("scenes")
    data = write_scenes(out / "scenes-data", "test", SCENES if limit is None else limit)
    summary = evaluate_detections(
        detector,
        data,
        out / "scenes",
        environment=environment(detector),
        progress=progress,
    )
    found = {"model": "scenes", **summary.to_dict()}
    (out / "scenes.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    draw(out / "scenes.png", data, read_records(out / "scenes"), detector.names)
    return found


def draw(path: Path, data: CocoDataset, records: dict[str, dict], names: tuple[str, ...]) -> None:
    """All images with what was found in them, side by side."""
    drawn = []
    for image in data.images:
        record = records[str(image.id)]
        found = Detections(record["boxes"], record["indices"], record["confidences"], names)
        drawn.append(found.draw(image.read()))
    width, height = (max(side) for side in zip(*(picture.size for picture in drawn), strict=True))
    rows, columns = -(-len(drawn) // COLUMNS), min(len(drawn), COLUMNS)
    size = (columns * (width + GAP) + GAP, rows * (height + GAP) + GAP)
    sheet = Image.new("RGB", size, "white")
    for i, picture in enumerate(drawn):
        row, column = divmod(i, COLUMNS)
        sheet.paste(picture, (GAP + column * (width + GAP), GAP + row * (height + GAP)))
    sheet.save(path)


def as_line(found: dict[str, Any]) -> str:
    """The figures for a terminal."""
    return (
        f"scenes: {found['n']} images, AP50 {found['AP50']:.2f}, AP {found['AP']:.2f}, "
        f"{found['evaluations_per_image']:,.0f} evaluations and "
        f"{found['seconds_per_image']:.1f} s an image"
    )
