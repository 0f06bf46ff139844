"""A folder with one sub-folder of images per class."""

from __future__ import annotations

import logging
import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dive_fast.data.examples import DataSet, Examples, rows_digest
from dive_fast.data.matching import label_rows
from dive_fast.data.paths import LeftOut, list_images, once, real_paths
from dive_fast.data.pictures import FilePictures, file_size
from dive_fast.errors import DataError, ImageError, some

log = logging.getLogger(__name__)


def open_folder(folder: Path, class_names: Sequence[str]) -> DataSet:
    """The images of the sub-folders; ``open_dataset`` says which.

    Raises:
        DataError: it cannot be read, has no images, or classes that the model does not know.
    """
    left = LeftOut()
    try:
        subfolders = _subfolders(folder, left)
        if not subfolders:
            raise DataError(f"{folder}: expected a sub-folder for each class, got none.")
        of_folders = label_rows(
            str(folder), [p.name for p in subfolders], class_names, "the sub-folder"
        )
        ids, labels = _labelled_paths(folder, subfolders, of_folders, left)
    except (OSError, ImageError) as error:
        raise DataError(f"{folder}: cannot be read ({error}).") from error
    if not ids:
        without = f" ({left} left out)" if str(left) else ""
        raise DataError(f"{folder}: expected images in its sub-folders, got none{without}.")
    left.warn(folder)
    return DataSet(
        name=folder.resolve().name,
        examples=Examples(ids, np.array(labels), FilePictures(os.fspath(folder))),
        names=tuple(p.name for p in subfolders),
        content=rows_digest((name, file_size(folder / name)) for name in ids),
    )


def subfolder_names(folder: Path) -> list[str]:
    """The names of the classes of a folder, as prompts have them."""
    names = [path.name for path in _subfolders(folder, LeftOut())]
    # macOS takes letters with accents apart; nobody writes prompts so.
    return [unicodedata.normalize("NFC", name) for name in names]


def _subfolders(folder: Path, left: LeftOut) -> list[Path]:
    """The folders of the classes, links to folders among them."""
    found = []
    for path in sorted(folder.iterdir()):
        if left.hides(path.name):
            continue
        if path.is_dir():
            found.append(path)
        elif path.is_symlink() and not path.exists():
            left.reasons["linked to nothing"] += 1
        else:
            left.reasons["beside the folders of the classes"] += 1
    return found


def _labelled_paths(
    folder: Path, subfolders: list[Path], labels: Sequence[int], left: LeftOut
) -> tuple[list[str], list[int]]:
    """The images of all classes, each once in its class, by their paths below the folder.

    Two lines tell what is odd.
    """
    members: dict[int, list[int]] = {}
    for number, label in enumerate(labels):
        members.setdefault(label, []).append(number)
    ids: list[list[str]] = [[] for _ in subfolders]
    empty: list[int] = []
    # Class by class: of a million files only the names stay.
    for numbers in members.values():
        found = [list_images(subfolders[n], recursive=True, left=left) for n in numbers]
        empty += [n for n, paths in zip(numbers, found, strict=True) if not paths]
        kept = set(once([path for paths in found for path in paths], left))
        for n, paths in zip(numbers, found, strict=True):
            ids[n] = [path.relative_to(folder).as_posix() for path in paths if path in kept]
    if empty and len(empty) < len(subfolders):
        names = [subfolders[n].name for n in sorted(empty)]
        log.warning("%s: no images in the folders of the classes %s.", folder, some(names))
    _tell_contradictions(folder, [[name for n in m for name in ids[n]] for m in members.values()])
    of_each = [label for label, names in zip(labels, ids, strict=True) for _ in names]
    return [name for names in ids for name in names], of_each


def _tell_contradictions(folder: Path, of_classes: list[list[str]]) -> None:
    """Warns of files that stand in several classes, by links."""
    hashes = [_hashes(folder, names) for names in of_classes]
    values, counts = np.unique(np.concatenate(hashes), return_counts=True)
    several = values[counts > 1]
    first: dict[str, str] = {}
    twice = []
    for names, found in zip(of_classes, hashes, strict=True):
        at = np.flatnonzero(np.isin(found, several))
        paths = [folder / names[i] for i in at]
        for i, real in zip(at, real_paths(paths), strict=True):
            if (other := first.setdefault(real, names[i])) is not names[i]:
                twice.append((other, names[i]))
    if twice:
        log.warning(
            "%s: %d files stand in several classes by links, the first as %r and %r; they count in "
            "each.", folder, len(twice), *twice[0],
        )  # fmt: skip


def _hashes(folder: Path, names: list[str]) -> np.ndarray:
    """Where files lie without links, as int64 [n] that differ where the places do, but rarely."""
    return np.array([hash(real) for real in real_paths([folder / n for n in names])], np.int64)
