"""The zoo's scenes as PNG files with COCO annotations."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from PIL import Image

from dive_fast.data.coco import CocoDataset, CocoImage, read_coco, write_coco
from dive_fast.data.scenes import CANVAS, N_TEST, NAMES, Scenes, load_scenes
from dive_fast.errors import DataError

ANNOTATIONS = "annotations.json"
PICTURES = "images"


def write_scenes(
    folder: str | os.PathLike[str], part: str = "test", n: int = N_TEST
) -> CocoDataset:
    """Writes the first ``n`` scenes of a part: ``images/*.png`` and ``annotations.json``.

    What is written is always the same, so it may be written again over itself.

    Returns:
        The data set as ``read_coco`` reads it back.

    Raises:
        DataError: another part is asked for, ``n`` is below 1, scikit-learn is not installed, or
            the folder cannot be written.
    """
    made, folder = load_scenes(part, n), Path(folder)
    pictures = folder / PICTURES
    dataset = scenes_dataset(made, pictures, f"scenes ({part})")
    try:
        pictures.mkdir(parents=True, exist_ok=True)
        for picture, image in zip(made.images, dataset.images, strict=True):
            Image.fromarray(picture).save(image.path)
    except OSError as error:
        raise DataError(
            f"{folder}: the scenes cannot be written ({error.strerror or error})."
        ) from error
    write_coco(folder / ANNOTATIONS, dataset, pictures)
    return read_coco(folder / ANNOTATIONS, pictures)


def scenes_dataset(made: Scenes, pictures: Path, source: str) -> CocoDataset:
    """Scenes as a data set whose pictures are to lie in a folder; ids count from 1."""
    images = []
    for index, count in enumerate(made.counts.tolist()):
        images.append(
            CocoImage(
                id=index + 1,
                path=pictures / f"{index + 1:06}.png",
                size=(CANVAS, CANVAS),
                boxes=torch.from_numpy(made.boxes[index, :count]).float(),
                class_ids=torch.from_numpy(made.class_ids[index, :count]),
                crowd=torch.zeros(count, dtype=torch.bool),
            )
        )
    return CocoDataset(NAMES, tuple(range(1, len(NAMES) + 1)), tuple(images), source)
