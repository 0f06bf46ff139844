"""Small annotation files for the tests of their reader."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

Box = list[float]


def annotated(
    n: int = 12,
    size: tuple[int, int] = (640, 480),
    frame: Callable[[Box], Box] = list,
    image_id: Callable[[int], object] = int,
    seed: int = 0,
) -> dict:
    """n images with a box each: [left, top, width, height] in pixels, as ``frame`` changes it."""
    rng = np.random.default_rng(seed)
    images, boxes = [], []
    for i in range(n):
        extent = rng.uniform(0.05, 0.5, 2) * size
        corner = rng.uniform(0, 1, 2) * (np.array(size) - extent)
        number = image_id(i)
        images.append({"id": number, "width": size[0], "height": size[1], "file_name": f"{i}.png"})
        box = frame([*corner.tolist(), *extent.tolist()])
        boxes.append({"id": i + 1, "image_id": number, "category_id": 1, "bbox": box})
    return {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "cat"}]}


def write(folder: Path, content: object) -> Path:
    path = folder / "boxes.json"
    path.write_text(json.dumps(content))
    return path
