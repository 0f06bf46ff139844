"""Labelled images to evaluate on: which source it is, by what the user named.

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
from dive_fast.data.hub_loading import parse_hub_set
from dive_fast.data.hub_sets import hub_classes, open_hub_set
from dive_fast.data.spec import split_options
from dive_fast.data.streams import StreamedExamples
from dive_fast.data.tables import SUFFIXES, open_table, table_classes
from dive_fast.data.tar_shards import open_tar_shards, tar_shard_classes
from dive_fast.errors import DataError

_SOURCES = (
    "'digits', a folder by class, an .npz file, a table (.csv, .tsv, .jsonl), wds:TARS or "
    "hf:NAME@SPLIT"
)


def open_dataset(
    spec: str | os.PathLike[str], class_names: Sequence[str], part: str = "test"
) -> DataSet:
    """Open labelled images for a model with these classes.

    Args:
        spec: ``"digits"`` (the 397 held-out handwritten digits); a folder with one sub-folder per
            class; an ``.npz`` file with ``images`` and ``labels`` (or ``x_test`` and
            ``y_test``): [n, h, w] or [n, h, w, c] and integers [n]. Of a file of Omniglot (``x``,
            ``y``, ``drawer``, ``classes``) only the held-out drawers; a ``.csv``, ``.tsv`` or
            ``.jsonl`` of paths and labels, columns found or named (``table.csv?image=A&label=B``);
            ``wds:`` and tar files of webdataset (``wds:path/{000..099}.tar``); or ``hf:`` and a
            data set of Hugging Face (``hf:NAME[:CONFIG]@SPLIT``). docs/data.md has all of it. A
            folder *named* digits is given as ``./digits``.
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
    return replace(found, where=_absolute(spec))


def _absolute(spec: str) -> str:
    """The same data for a process that works elsewhere."""
    if spec == "digits":
        return spec
    if spec.startswith("hf:"):
        place = parse_hub_set(spec).place
        return spec.replace(place, os.path.abspath(place), 1) if os.path.exists(place) else spec
    scheme, place = ("wds:", spec[4:]) if spec.startswith("wds:") else ("", spec)
    return scheme + "::".join(map(os.path.abspath, place.split("::")))


def _open(spec: str, class_names: Sequence[str], part: str) -> DataSet:
    if spec == "digits":
        return open_digits(class_names, part)
    if os.path.isdir(spec):
        return open_folder(Path(spec), class_names)
    if spec.startswith("hf:"):
        return open_hub_set(parse_hub_set(spec), class_names)
    place, options = split_options(spec, ("image", "label"))
    if place.startswith("wds:"):
        return open_tar_shards(place.removeprefix("wds:"), class_names, options)
    suffix = os.path.splitext(place)[1].lower()
    if not os.path.exists(place):
        raise DataError(f"{place}: expected {_SOURCES}, but nothing is there.")
    if suffix in SUFFIXES:
        return open_table(Path(place), class_names, options)
    if suffix != ".npz" or options:
        raise DataError(f"{spec}: expected {_SOURCES}.")
    return open_npz(Path(place), class_names, part)


def folder_classes(spec: str | os.PathLike[str]) -> list[str] | None:
    """What data call their classes: sub-folders, or labels that are names.

    Returns:
        The names; None for data that have none, or of another kind.

    Raises:
        DataError: the data cannot be read.
    """
    spec = os.fspath(spec)
    if spec == "digits":
        return None
    if os.path.isdir(spec):
        return subfolder_names(Path(spec)) or None
    if spec.startswith("hf:"):
        return hub_classes(parse_hub_set(spec))
    place, options = split_options(spec, ("image", "label"))
    if place.startswith("wds:"):
        return tar_shard_classes(place.removeprefix("wds:"), options)
    if place.lower().endswith(SUFFIXES) and os.path.exists(place):
        return table_classes(Path(place), options)
    return None


def select(dataset: DataSet, limit: int | None, seed: int) -> DataSet:
    """A random subset of ``limit`` examples in their original order; None, or more, means all.

    With one seed, a smaller subset is part of every larger one. Of a stream it is the first.

    Raises:
        DataError: ``limit`` is below 1 or ``seed`` below 0.
    """
    if limit is not None and limit < 1:
        raise DataError(f"expected a limit of at least 1 example, got {limit}.")
    if seed < 0:
        raise DataError(f"expected a seed of at least 0, got {seed}.")
    if isinstance(dataset.examples, StreamedExamples):
        return replace(dataset, examples=dataset.examples.first(limit))
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
    pairs = [(example.load(), example.label) for example in dataset.examples]
    return [image for image, _ in pairs], np.array([label for _, label in pairs], dtype=np.int64)
