"""Reading the ``.npz`` files that zoo models are trained on."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from dive_fast.errors import DataError


class Pictures(NamedTuple):
    """One part of a data set: images uint8 [N, h, w], labels int64 [N], one name per class."""

    images: np.ndarray
    labels: np.ndarray
    names: tuple[str, ...]


def read_arrays(
    path: str | Path, names: tuple[str, ...], size: tuple[int, int]
) -> tuple[np.ndarray, ...]:
    """The arrays ``names`` of an ``.npz``; the first holds pictures, the second their labels.

    Raises:
        DataError: no such file, unreadable, an array missing, or of another form.
    """
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            missing = [name for name in names if name not in archive.files]
            if missing:
                raise DataError(
                    f"{path}: expected the arrays {', '.join(names)}, "
                    f"got {', '.join(archive.files) or 'none'}."
                )
            arrays = tuple(archive[name] for name in names)
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{path}: expected an .npz file, but nothing is there.") from error
    except Exception as error:  # a damaged archive fails in zipfile, zlib, lzma or numpy
        raise DataError(f"{path}: cannot be read as an .npz of plain arrays ({error}).") from error
    images, labels = arrays[:2]
    if images.dtype != np.uint8 or images.shape[1:] != size or len(images) == 0:
        raise DataError(
            f"{path}: expected {names[0]} as uint8 [N, {size[0]}, {size[1]}], "
            f"got {images.dtype} {list(images.shape)}."
        )
    if labels.shape != (len(images),) or labels.dtype.kind not in "iu":
        raise DataError(
            f"{path}: expected {names[1]} as whole numbers [{len(images)}], "
            f"got {labels.dtype} {list(labels.shape)}."
        )
    return arrays
