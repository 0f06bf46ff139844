"""Reads boxes kept as arrays, with no images."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch

from dive_fast.data.coco.dataset import CocoDataset, CocoImage
from dive_fast.data.npz import read_npz
from dive_fast.errors import DataError

_ARRAYS = (
    "image_id",
    "width",
    "height",
    "offset",
    "box_xyxy",
    "label",
    "suspect_crowd",
    "coco_category_id",
    "names",
    "in_open_test",
)


def read_box_arrays(path: str | os.PathLike[str]) -> CocoDataset:
    """The boxes of COCO val2017 as ``coco_val2017_layouts.npz`` holds them.

    The boxes of image k are rows ``offset[k]`` to ``offset[k + 1]`` of ``box_xyxy`` and ``label``.
    Images that are ``in_open_test`` are left out, so that what learns of the rest may be tested on
    them; so are boxes without area. Boxes that are probably crowds are marked as such.

    Raises:
        DataError: no such file, unreadable, an array missing, or arrays that do not fit together.
    """
    path = Path(path)
    arrays = read_npz(path, _ARRAYS)
    offset, boxes = arrays["offset"], arrays["box_xyxy"]
    n, m = len(arrays["image_id"]), len(boxes)
    fits = (
        boxes.shape == (m, 4)
        and offset.shape == (n + 1,)
        and all(arrays[name].shape == (n,) for name in ("width", "height", "in_open_test"))
        and all(arrays[name].shape == (m,) for name in ("label", "suspect_crowd"))
        and offset[0] == 0
        and offset[-1] == m
        and (np.diff(offset) >= 0).all()
    )
    if not fits:
        raise DataError(
            f"{path}: expected the boxes of {n} images, offset {[n + 1]} from 0 to their number, "
            f"got box_xyxy {list(boxes.shape)} and offset {list(offset.shape)}."
        )
    sizes = np.stack([arrays["width"], arrays["height"]], axis=1).astype(np.int64)
    of_box = np.repeat(np.arange(n), np.diff(offset))
    cut = np.clip(boxes, 0, np.tile(sizes[of_box], 2)).astype(np.float32)
    flat = (cut[:, 2:] <= cut[:, :2]).any(axis=1)
    kept = ~arrays["in_open_test"].astype(bool)
    images = []
    for k in np.flatnonzero(kept).tolist():
        rows = np.arange(offset[k], offset[k + 1])
        rows = rows[~flat[rows]]
        images.append(
            CocoImage(
                id=int(arrays["image_id"][k]),
                path=None,
                size=(int(sizes[k, 0]), int(sizes[k, 1])),
                boxes=torch.from_numpy(cut[rows]),
                class_ids=torch.from_numpy(arrays["label"][rows].astype(np.int64)),
                crowd=torch.from_numpy(arrays["suspect_crowd"][rows].astype(bool)),
            )
        )
    said = {
        "images of the open test set left out": n - len(images),
        "boxes without area left out": int((flat & kept[of_box]).sum()),
    }
    return CocoDataset(
        names=tuple(str(name) for name in arrays["names"]),
        category_ids=tuple(int(number) for number in arrays["coco_category_id"]),
        images=tuple(images),
        source=path.name,
        problems=tuple(f"{path.name}: {what}: {count}." for what, count in said.items() if count),
    )
