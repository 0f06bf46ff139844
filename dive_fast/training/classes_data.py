"""The labelled pictures that a class-conditional model learns from."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dive_fast.data import digits, folder_classes, open_dataset
from dive_fast.data.coco.problems import Problem, tell_all
from dive_fast.data.examples import DataSet
from dive_fast.data.reading import Pixels, images_ahead, load, read_ahead
from dive_fast.errors import DataError, ImageError, some

# Classes that data may have whose labels are numbers without names.
MOST_NUMBERED = 10_000
# One picture of a class to learn from, one to fit to, one to measure on.
FEWEST = 3


class Pictures(NamedTuple):
    """All pictures of a data set that can be read.

    Attributes:
        pixels: uint8 [N, c, side, side].
        labels: int64 [N].
        names: of the classes.
        dataset: those pictures.
    """

    pixels: Tensor
    labels: Tensor
    names: tuple[str, ...]
    dataset: DataSet


def open_classes(
    data: str | os.PathLike[str], classes: Sequence[str] | None = None
) -> tuple[DataSet, tuple[str, ...]]:
    """Labelled pictures and the names of their classes, before any is read.

    Args:
        data: as for ``data.open_dataset``.
        classes: the names; if None those that the data have, or the numbers that their labels are.

    Raises:
        DataError: as ``open_dataset``; data that are streamed; fewer than 2 classes, or a class of
            fewer than 3 pictures.
    """
    spec = os.fspath(data)
    if classes is None and spec == "digits":
        classes = digits.NAMES
    names = classes or folder_classes(spec)
    dataset = open_dataset(spec, names or tuple(map(str, range(MOST_NUMBERED))), part="train")
    if dataset.labels is None:
        raise DataError(f"{spec}: expected data that are read whole, got a stream.")
    if not names:
        names = tuple(map(str, range(int(dataset.labels.max()) + 1)))
    check_counts(spec, dataset.labels, names)
    return dataset, tuple(names)


def check_counts(where: str, labels: np.ndarray, names: Sequence[str]) -> None:
    """That there are classes to tell apart, with pictures enough for all three parts.

    Raises:
        DataError: there are not.
    """
    if len(names) < 2:
        raise DataError(
            f"{where}: expected pictures of 2 classes or more, got {len(names)} ({some(names)})."
        )
    counts = np.bincount(labels, minlength=len(names))
    if few := [name for name, n in zip(names, counts, strict=True) if n < FEWEST]:
        raise DataError(
            f"{where}: expected {FEWEST} pictures or more of every class, got fewer of {some(few)}."
        )


def read_pictures(
    dataset: DataSet,
    names: tuple[str, ...],
    size: int,
    channels: int,
    readers: int | None,
    tell: Callable[[str], object],
) -> Pictures:
    """All pictures, cropped and resized as the classifier does it; those that are bad are told.

    Args:
        readers: as for ``data.reading.read_ahead``.

    Raises:
        DataError: too few are left.
    """
    examples = dataset.examples
    items = ((i, Pixels(partial(load, examples, i), size, channels)) for i in range(len(examples)))
    ahead = images_ahead(channels * size**2)
    read, kept, bad = [], [], []
    found = read_ahead(items, readers, shared=[examples], ahead=ahead, total=len(examples))
    for i, pixels in found:
        if isinstance(pixels, ImageError):
            bad.append(Problem("image", f"left out: {pixels}"))
            continue
        read.append(pixels)
        kept.append(i)
    tell_all(bad, dataset.name, tell)
    dataset = dataset.take(kept)
    check_counts(dataset.name, dataset.labels, names)
    return Pictures(torch.stack(read), torch.from_numpy(dataset.labels), names, dataset)
