"""Labelled images to evaluate on: the digits, a folder by class, or an ``.npz``.

Images are loaded one by one when asked for, so that a bad one is one record's error and not the
run's; labels are checked against the model's classes at once.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from dive_fast.data.arrays import PAIRS, open_digits, open_npz
from dive_fast.data.class_folders import open_folder, subfolder_names
from dive_fast.data.examples import DataSet, Picture
from dive_fast.errors import DataError


def open_dataset(
    spec: str | os.PathLike[str], class_names: Sequence[str], part: str = "test"
) -> DataSet:
    """Open labelled images for a model with these classes.

    Args:
        spec: ``"digits"`` (the 397 held-out handwritten digits); a folder with one sub-folder per
            class; or an ``.npz`` file with ``images`` and ``labels`` (or ``x_test`` and
            ``y_test``): [n, h, w] or [n, h, w, c] and integers [n]. Of a file of Omniglot (``x``,
            ``y``, ``drawer``, ``classes``) only the held-out drawers. A folder *named* digits is
            given as ``./digits``.
        class_names: the model's classes in order. Sub-folders are matched to a whole name or to
            one of its comma-separated synonyms (``"tench, Tinca tinca"``): to the letter, or else
            without regard to case, or else with underscores, hyphens and blanks alike; an integer
            that no class is called is the class of that index. ``data.paths`` says which files of
            the sub-folders count; what does not is told in a line.
        part: ``"train"`` takes the 1,400 digits for training, and ``x_train`` and ``y_train``.

    Raises:
        DataError: there is no such part or no such data, it cannot be read, or it has classes that
            the model does not know.
    """
    spec = os.fspath(spec)
    if part not in PAIRS:
        raise DataError(f"expected a part of {', '.join(PAIRS)}, got {part!r}.")
    found = _open(spec, class_names, part)
    return replace(found, where=spec if spec == "digits" else os.path.abspath(spec))


def _open(spec: str, class_names: Sequence[str], part: str) -> DataSet:
    if spec == "digits":
        return open_digits(class_names, part)
    if os.path.isdir(spec):
        return open_folder(Path(spec), class_names)
    if not os.path.exists(spec):
        raise DataError(
            f"{spec}: expected 'digits', a folder by class or an .npz file, but nothing is there."
        )
    if not spec.lower().endswith(".npz"):
        raise DataError(f"{spec}: expected 'digits', a folder by class or an .npz file.")
    return open_npz(Path(spec), class_names, part)


def folder_classes(spec: str | os.PathLike[str]) -> list[str] | None:
    """The names of the sub-folders of a folder by class; None for other data."""
    folder = Path(spec)
    if os.fspath(spec) == "digits" or not folder.is_dir():
        return None
    return subfolder_names(folder) or None


def select(dataset: DataSet, limit: int | None, seed: int) -> DataSet:
    """A random subset of ``limit`` examples in their original order; None, or more, means all.

    With one seed, a smaller subset is part of every larger one.

    Raises:
        DataError: ``limit`` is below 1 or ``seed`` below 0.
    """
    if limit is not None and limit < 1:
        raise DataError(f"expected a limit of at least 1 example, got {limit}.")
    if seed < 0:
        raise DataError(f"expected a seed of at least 0, got {seed}.")
    if limit is None or limit >= len(dataset.examples):
        return dataset
    return dataset.take(chosen(len(dataset.examples), limit, seed))


def chosen(n: int, limit: int | None, seed: int) -> list[int]:
    """``limit`` of 0 to n - 1 at random, in their order; None, or more, means all."""
    return sorted(np.random.default_rng(seed).permutation(n)[:limit].tolist())


def load_all(dataset: DataSet) -> tuple[list[Picture], np.ndarray]:
    """All images and their labels, int64 [n].

    Raises:
        ImageError: an image cannot be read.
    """
    return [example.load() for example in dataset.examples], dataset.labels
