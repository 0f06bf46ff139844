"""BCCD: 364 images of blood, 640 x 480 pixels, with boxes of red cells, white cells, platelets.

Source: github.com/Shenggan/BCCD_Dataset (MIT), in its official split, with annotations in COCO's
form: ``instances_train.json``, ``instances_val.json`` and ``instances_test.json`` beside the
folder ``BCCD/JPEGImages``. Red cells that the border cuts, or in clumps, are often not labelled.
"""

from __future__ import annotations

import os
from pathlib import Path

from dive_fast.data.coco import CocoDataset, read_coco
from dive_fast.errors import DataError

NAMES = ("RBC", "WBC", "Platelets")
PARTS = ("train", "val", "test")


def load_bccd(folder: str | os.PathLike[str], part: str) -> CocoDataset:
    """The official split: ``"train"`` 205 images, ``"val"`` 87, ``"test"`` 72.

    Raises:
        DataError: another part is asked for, nothing is there, or it is not BCCD.
    """
    if part not in PARTS:
        raise DataError(f"BCCD has the parts {', '.join(PARTS)}, got {part!r}.")
    annotations = Path(folder) / f"instances_{part}.json"
    dataset = read_coco(annotations, Path(folder) / "BCCD" / "JPEGImages")
    if dataset.names != NAMES:
        raise DataError(
            f"{annotations}: expected the classes {', '.join(NAMES)}, got "
            f"{', '.join(dataset.names)}."
        )
    return dataset
