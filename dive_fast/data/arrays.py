"""Labelled images that lie in arrays: an ``.npz``, and the digits of scikit-learn."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from dive_fast.data import digits, omniglot
from dive_fast.data.examples import NO_FACTS, DataSet, Examples, Fact
from dive_fast.data.matching import ClassMatcher
from dive_fast.data.npz import read_npz
from dive_fast.errors import DataError, some

PAIRS = {
    "test": (("images", "labels"), ("x_test", "y_test")),
    "train": (("images", "labels"), ("x_train", "y_train")),
}


@dataclass(frozen=True)
class ArrayPictures:
    """Images [n, h, w] or [n, h, w, c]."""

    images: np.ndarray

    def loader(self, row: int, example_id: str) -> Callable[[], np.ndarray]:
        return partial(operator.getitem, self.images, row)

    def facts(self, row: int, example_id: str) -> Mapping[str, Fact]:
        return NO_FACTS


def open_digits(class_names: Sequence[str], part: str) -> DataSet:
    """The digits for a model that calls them by word or by figure.

    Raises:
        DataError: the model does not know them, or scikit-learn is not installed.
    """
    matcher = ClassMatcher(class_names)
    # An index alone would let any model pass.
    found = [matcher.named(n) or matcher.named(str(i)) for i, n in enumerate(digits.NAMES)]
    unknown = [name for name, indices in zip(digits.NAMES, found, strict=True) if not indices]
    if unknown:
        raise DataError(f"digits: the model does not know the classes {some(unknown)}.")
    images, labels = digits.load_digits(part)
    meant = np.array([indices[0] for indices in found])[labels]
    return _array_set("digits", images, meant, digits.NAMES, _digest(images, labels))


def open_npz(path: Path, class_names: Sequence[str], part: str) -> DataSet:
    """The arrays of an ``.npz``; ``open_dataset`` says which.

    Raises:
        DataError: it cannot be read, or has other arrays or labels.
    """
    arrays = read_npz(path, *PAIRS[part], omniglot.ARRAYS)
    if set(arrays) == set(omniglot.ARRAYS):
        images, labels, _ = omniglot.load_omniglot(path, part)
    else:
        images, labels = arrays.values()
    _check_arrays(path, images, labels, len(class_names))
    return _array_set(path.name, images, labels, None, _digest(images, labels))


def _array_set(
    name: str,
    images: np.ndarray,
    labels: np.ndarray,
    names: tuple[str, ...] | None,
    content: str,
) -> DataSet:
    ids = [f"{index:06d}" for index in range(len(images))]
    return DataSet(name, Examples(ids, labels, ArrayPictures(images)), names, content)


def _check_arrays(path: Path, images: np.ndarray, labels: np.ndarray, n_classes: int) -> None:
    if images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[-1] not in (1, 3, 4)):
        raise DataError(
            f"{path}: expected images [n, h, w] or [n, h, w, c] with c of 1, 3 or 4, "
            f"got shape {images.shape}."
        )
    if images.dtype not in (np.uint8, np.uint16) and images.dtype.kind != "f":
        raise DataError(
            f"{path}: expected images as uint8, uint16 or floating point in [0, 1], "
            f"got {images.dtype}."
        )
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise DataError(
            f"{path}: expected integer labels [n], got {labels.dtype} of shape {labels.shape}."
        )
    if len(images) != len(labels):
        raise DataError(
            f"{path}: expected as many labels as images, got {len(images)} images and "
            f"{len(labels)} labels."
        )
    if images.size == 0:
        raise DataError(f"{path}: expected at least one image, got shape {images.shape}.")
    if labels.min() < 0 or labels.max() >= n_classes:
        raise DataError(
            f"{path}: expected labels 0 to {n_classes - 1}, the model's classes, "
            f"got {labels.min()} to {labels.max()}."
        )


def _digest(*arrays: np.ndarray) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
