"""Reads boxes kept as arrays, with no images."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch

from dive_fast.data.coco.dataset import CocoDataset, CocoImage
from dive_fast.data.coco.frames import fractions
from dive_fast.data.coco.objects import LONGEST
from dive_fast.data.coco.problems import Problem
from dive_fast.data.npz import read_npz
from dive_fast.errors import DataError

# What an array holds: numpy's kinds of its values, and what a sentence calls them.
_WHOLE, _NUMBERS, _FLAGS = ("iu", "whole numbers"), ("iuf", "numbers"), ("iub", "0 or 1")
_ARRAYS = {
    "image_id": ("iuU", "whole numbers or texts"),
    "width": _WHOLE,
    "height": _WHOLE,
    "offset": _WHOLE,
    "box_xyxy": _NUMBERS,
    "label": _WHOLE,
    "suspect_crowd": _FLAGS,
    "coco_category_id": ("iuU", "whole numbers or texts"),
    "names": ("U", "texts"),
    "in_open_test": _FLAGS,
}


def read_box_arrays(path: str | os.PathLike[str]) -> CocoDataset:
    """The boxes of COCO val2017 as ``coco_val2017_layouts.npz`` holds them.

    The boxes of image k are rows ``offset[k]`` to ``offset[k + 1]`` of ``box_xyxy`` and ``label``.
    Images that are ``in_open_test`` are left out, so that what learns of the rest may be tested on
    them; so are boxes without area. Boxes that are probably crowds are marked as such.

    Raises:
        DataError: no such file, unreadable, an array missing or of another kind, arrays that do
            not fit together, values that mean nothing, or no image or no box is left.
    """
    path = Path(path)
    arrays = _read(path)
    offset, boxes = arrays["offset"], arrays["box_xyxy"]
    n = len(arrays["image_id"])
    sizes = np.stack([arrays["width"], arrays["height"]], axis=1)
    of_box = np.repeat(np.arange(n), np.diff(offset))
    if (form := fractions(boxes.astype(np.float64), sizes[of_box])) is not None:
        raise DataError(
            f"{path}: expected box_xyxy in pixels, got fractions of the images' sizes{form}."
        )
    cut = np.clip(boxes, 0, np.tile(sizes[of_box], 2)).astype(np.float32)
    flat = (cut[:, 2:] <= cut[:, :2]).any(axis=1)
    kept = ~arrays["in_open_test"].astype(bool)
    if not (~flat & kept[of_box]).any():
        raise DataError(
            f"{path}: expected boxes of some size in images outside the open test set, got none "
            f"of {len(boxes)}."
        )
    images = []
    for k in np.flatnonzero(kept).tolist():
        rows = np.arange(offset[k], offset[k + 1])
        rows = rows[~flat[rows]]
        images.append(
            CocoImage(
                id=arrays["image_id"][k].item(),
                path=None,
                size=(int(sizes[k, 0]), int(sizes[k, 1])),
                boxes=torch.from_numpy(cut[rows]),
                class_ids=torch.from_numpy(arrays["label"][rows]),
                crowd=torch.from_numpy(arrays["suspect_crowd"][rows].astype(bool)),
            )
        )
    said = {
        "images of the open test set left out": n - len(images),
        "boxes without area left out": int((flat & kept[of_box]).sum()),
    }
    return CocoDataset(
        names=tuple(arrays["names"].tolist()),
        category_ids=tuple(arrays["coco_category_id"].tolist()),
        images=tuple(images),
        source=path.name,
        notes=tuple(
            Problem(what, f"{path.name}: {what}: {count}.") for what, count in said.items() if count
        ),
    )


def _read(path: Path) -> dict[str, np.ndarray]:
    """The arrays, of the right kinds, shapes and ranges; whole numbers as int64."""
    arrays = read_npz(path, tuple(_ARRAYS))
    for name, (kinds, meaning) in _ARRAYS.items():
        if arrays[name].dtype.kind not in kinds:
            raise DataError(f"{path}: expected {name} as {meaning}, got {arrays[name].dtype}.")
        if arrays[name].dtype.kind in "iu":
            # Differences of small or unsigned whole numbers would wrap around.
            arrays[name] = arrays[name].astype(np.int64)
    _check_shapes(path, arrays)
    for name, low, high in (
        ("width", 1, LONGEST),
        ("height", 1, LONGEST),
        ("box_xyxy", -LONGEST, LONGEST),
        ("label", 0, len(arrays["names"]) - 1),
        ("suspect_crowd", 0, 1),
        ("in_open_test", 0, 1),
    ):
        good = (arrays[name] >= low) & (arrays[name] <= high)  # NaN is not
        if not good.all():
            bad = arrays[name][~good][0]
            raise DataError(f"{path}: expected {name} from {low} to {high}, got {bad}.")
    return arrays


def _check_shapes(path: Path, arrays: dict[str, np.ndarray]) -> None:
    offset, boxes = arrays["offset"], arrays["box_xyxy"]
    n, m, k = (arrays[name].size for name in ("image_id", "label", "names"))
    shapes = {
        **dict.fromkeys(("image_id", "width", "height", "in_open_test"), (n,)),
        **dict.fromkeys(("label", "suspect_crowd"), (m,)),
        **dict.fromkeys(("names", "coco_category_id"), (k,)),
        "box_xyxy": (m, 4),
        "offset": (n + 1,),
    }
    wrong = [name for name, shape in shapes.items() if arrays[name].shape != shape]
    if not wrong and offset[0] == 0 and offset[-1] == m and (np.diff(offset) >= 0).all():
        return
    of = f" and {wrong[0]} {list(arrays[wrong[0]].shape)}" if wrong else ""
    raise DataError(
        f"{path}: expected the boxes of {n} images, offset {[n + 1]} from 0 to their number, "
        f"got box_xyxy {list(boxes.shape)} and offset {list(offset.shape)}{of}."
    )
