"""Writes COCO annotation files."""

from __future__ import annotations

import json
import os
from pathlib import Path

from dive_fast.data.coco.dataset import CocoDataset
from dive_fast.errors import DataError


def write_coco(
    path: str | os.PathLike[str], dataset: CocoDataset, images: str | os.PathLike[str] | None = None
) -> None:
    """Write the annotations as a COCO file that ``read_coco`` and pycocotools read.

    Args:
        path: the JSON file.
        dataset: its images are not written.
        images: the folder that ``read_coco`` will be given; by default file names are bare names.

    Raises:
        DataError: the file cannot be written.
    """
    content = json.dumps(dataset.to_coco(None if images is None else Path(images)), allow_nan=False)
    try:
        Path(path).write_text(content + "\n", encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror or error}).") from error
