"""Reading ``.npz`` files."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dive_fast.errors import DataError


class LabelledImages(NamedTuple):
    """One part of a data set: images uint8 [N, h, w], labels int64 [N], one name per class."""

    images: np.ndarray
    labels: np.ndarray
    names: tuple[str, ...]


@contextlib.contextmanager
def open_npz(path: str | Path) -> Iterator[np.lib.npyio.NpzFile]:
    """An ``.npz`` of plain arrays, open; its ``files`` are the arrays' names.

    Raises:
        DataError: there is no such file, or reading it fails, also later inside the context.
    """
    try:
        # np.load leaves a damaged file open if it opens it itself.
        with open(path, "rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise DataError(f"{path}: expected an .npz archive, got a single array.")
            with archive:
                yield archive
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{path}: expected an .npz file, but nothing is there.") from error
    except Exception as error:  # a damaged archive fails in zipfile, zlib, lzma or numpy
        if "pickle" in str(error).lower():
            raise DataError(
                f"{path}: expected an .npz archive of plain arrays, got pickled objects or no "
                "archive at all; pickles are not loaded, because they can run code."
            ) from error
        reason = str(error).rstrip(".") or type(error).__name__
        raise DataError(f"{path}: unreadable, truncated or damaged ({reason}).") from error


def read_npz(path: str | Path, *choices: Sequence[str]) -> dict[str, np.ndarray]:
    """The arrays of the first of the choices that an ``.npz`` has whole, by their names.

    Raises:
        DataError: as ``open_npz``, or none of the choices is there.
    """
    with open_npz(path) as archive:
        for names in choices:
            if set(names) <= set(archive.files):
                # A member that is no .npy comes as bytes: an array without dimensions.
                return {name: np.asarray(archive[name]) for name in names}
        expected = ", or ".join(f"{', '.join(names[:-1])} and {names[-1]}" for names in choices)
        got = ", ".join(map(repr, archive.files)) or "none"
        if len(choices) == 1:
            missing = (name for name in choices[0] if name not in archive.files)
            got = f"none called {', '.join(missing)}"
        raise DataError(f"{path}: expected the arrays {expected}, got {got}.")


def checked_names(path: str | Path, name: str, array: np.ndarray) -> tuple[str, ...]:
    """An array of the classes' names [C] as texts.

    Raises:
        DataError: it holds something else, or an empty name.
    """
    if array.ndim != 1 or array.dtype.kind != "U":
        raise DataError(
            f"{path}: expected {name} as texts [C], got {array.dtype} {list(array.shape)}."
        )
    names = tuple(map(str, array))
    if empty := [i for i, text in enumerate(names) if not text.strip()]:
        raise DataError(f"{path}: expected a name of every class, got an empty one of {empty[0]}.")
    return names


def read_arrays(
    path: str | Path, names: tuple[str, ...], size: tuple[int, int]
) -> tuple[np.ndarray, ...]:
    """The arrays ``names`` of an ``.npz``; the first holds images, the second their labels.

    Raises:
        DataError: as ``read_npz``, or images or labels of another form.
    """
    arrays = tuple(read_npz(path, names).values())
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
