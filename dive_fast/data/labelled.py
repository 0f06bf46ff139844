"""Labelled images to evaluate on: the digits, a folder by class, or an ``.npz``.

Images are loaded one by one when asked for, so that a bad one is one record's error and not the
run's; labels are checked against the model's classes at once.
"""

from __future__ import annotations

import hashlib
import json
import logging
import operator
import os
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from dive_fast.data import digits, omniglot
from dive_fast.data.images import read_image
from dive_fast.data.matching import ClassMatcher
from dive_fast.data.npz import read_npz
from dive_fast.data.paths import LeftOut, list_images, once, real_paths
from dive_fast.errors import DataError, ImageError, some

log = logging.getLogger(__name__)

_NPZ_PAIRS = {
    "test": (("images", "labels"), ("x_test", "y_test")),
    "train": (("images", "labels"), ("x_train", "y_train")),
}


@dataclass(frozen=True)
class Example:
    """One labelled image.

    Attributes:
        id: unique in its data set and the same in every run.
        label: index of the true class among the model's classes.
        load: reads the image: a PIL image, or an array [h, w] or [h, w, c]; raises
            ``ImageError`` where it cannot.
    """

    id: str
    label: int
    load: Callable[[], Image.Image | np.ndarray]


@dataclass(frozen=True)
class DataSet:
    """Labelled images.

    Attributes:
        name: ``"digits"``, or the name of the folder or file.
        examples: the images with their labels.
        names: what the data itself calls its classes, or None if it only has numbers.
        content: digest of the source's content (pixels for arrays; paths and sizes for files).
    """

    name: str
    examples: list[Example]
    names: tuple[str, ...] | None
    content: str = ""

    def identity(self) -> dict[str, str | int]:
        """What tells this data set from another, for JSON: source, count, fingerprint.

        The fingerprint covers the content and the ids and labels chosen from it, not where the
        data lies, so a run resumes after the data were moved.
        """
        chosen = json.dumps([self.content, [(e.id, e.label) for e in self.examples]])
        return {
            "source": self.name,
            "count": len(self.examples),
            "fingerprint": hashlib.sha256(chosen.encode()).hexdigest()[:16],
        }


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
    if part not in _NPZ_PAIRS:
        raise DataError(f"expected a part of {', '.join(_NPZ_PAIRS)}, got {part!r}.")
    if spec == "digits":
        return _open_digits(class_names, part)
    if os.path.isdir(spec):
        return _open_folder(Path(spec), class_names)
    if not os.path.exists(spec):
        raise DataError(
            f"{spec}: expected 'digits', a folder by class or an .npz file, but nothing is there."
        )
    if not spec.lower().endswith(".npz"):
        raise DataError(f"{spec}: expected 'digits', a folder by class or an .npz file.")
    return _open_npz(Path(spec), class_names, part)


def folder_classes(spec: str | os.PathLike[str]) -> list[str] | None:
    """The names of the sub-folders of a folder by class; None for other data."""
    folder = Path(spec)
    if os.fspath(spec) == "digits" or not folder.is_dir():
        return None
    names = [path.name for path in _subfolders(folder, LeftOut())]
    # macOS takes letters with accents apart; nobody writes prompts so.
    return [unicodedata.normalize("NFC", name) for name in names] or None


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
    picked = chosen(len(dataset.examples), limit, seed)
    return replace(dataset, examples=[dataset.examples[i] for i in picked])


def chosen(n: int, limit: int | None, seed: int) -> list[int]:
    """``limit`` of 0 to n - 1 at random, in their order; None, or more, means all."""
    return sorted(np.random.default_rng(seed).permutation(n)[:limit].tolist())


def load_all(dataset: DataSet) -> tuple[list[Image.Image | np.ndarray], np.ndarray]:
    """All images and their labels, int64 [n].

    Raises:
        ImageError: an image cannot be read.
    """
    labels = np.array([example.label for example in dataset.examples], dtype=np.int64)
    return [example.load() for example in dataset.examples], labels


def _open_digits(class_names: Sequence[str], part: str) -> DataSet:
    matcher = ClassMatcher(class_names)
    # Models of digits call them by word or by figure; an index alone would let any model pass.
    found = [matcher.named(n) or matcher.named(str(i)) for i, n in enumerate(digits.NAMES)]
    unknown = [name for name, indices in zip(digits.NAMES, found, strict=True) if not indices]
    if unknown:
        raise DataError(f"digits: the model does not know the classes {some(unknown)}.")
    images, labels = digits.load_digits(part)
    return DataSet(
        name="digits",
        examples=_array_examples(images, np.array([indices[0] for indices in found])[labels]),
        names=digits.NAMES,
        content=_array_digest(images, labels),
    )


def _open_folder(folder: Path, class_names: Sequence[str]) -> DataSet:
    left = LeftOut()
    try:
        subfolders = _subfolders(folder, left)
        if not subfolders:
            raise DataError(f"{folder}: expected a sub-folder for each class, got none.")
        labels = _folder_labels(folder, [p.name for p in subfolders], class_names)
        labelled = _labelled_paths(folder, subfolders, labels, left)
        sizes = [_size(path) for path, _ in labelled]
    except (OSError, ImageError) as error:
        raise DataError(f"{folder}: cannot be read ({error}).") from error
    if not labelled:
        without = f" ({left} left out)" if str(left) else ""
        raise DataError(f"{folder}: expected images in its sub-folders, got none{without}.")
    left.warn(folder)
    ids = [path.relative_to(folder).as_posix() for path, _ in labelled]
    content = json.dumps(list(zip(ids, sizes, strict=True)))
    return DataSet(
        name=folder.resolve().name,
        examples=[
            Example(name, label, partial(read_image, path))
            for name, (path, label) in zip(ids, labelled, strict=True)
        ],
        names=tuple(p.name for p in subfolders),
        content=hashlib.sha256(content.encode()).hexdigest(),
    )


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
    folder: Path, subfolders: list[Path], labels: list[int], left: LeftOut
) -> list[tuple[Path, int]]:
    """The images of all classes, each once in its class; two lines tell what is odd."""
    paths = [list_images(path, recursive=True, left=left) for path in subfolders]
    empty = [path.name for path, found in zip(subfolders, paths, strict=True) if not found]
    if empty and len(empty) < len(subfolders):
        log.warning("%s: no images in the folders of the classes %s.", folder, some(empty))
    of_class: dict[int, list[Path]] = {}
    for label, found in zip(labels, paths, strict=True):
        of_class.setdefault(label, []).extend(found)
    label_of = {path: c for c, found in of_class.items() for path in once(found, left)}
    _tell_contradictions(folder, label_of)
    return [(path, label_of[path]) for found in paths for path in found if path in label_of]


def _tell_contradictions(folder: Path, label_of: dict[Path, int]) -> None:
    """Warns of files that stand in several classes, by links."""
    first: dict[str, Path] = {}
    twice = []
    for path, real in zip(label_of, real_paths(list(label_of)), strict=True):
        if (other := first.setdefault(real, path)) is not path:
            twice.append((other, path))
    if twice:
        one, two = (path.relative_to(folder).as_posix() for path in twice[0])
        log.warning(
            "%s: %d files stand in several classes by links, the first as %r and %r; they count in "
            "each.", folder, len(twice), one, two,
        )  # fmt: skip


def _open_npz(path: Path, class_names: Sequence[str], part: str) -> DataSet:
    arrays = read_npz(path, *_NPZ_PAIRS[part], omniglot.ARRAYS)
    if set(arrays) == set(omniglot.ARRAYS):
        images, labels, _ = omniglot.load_omniglot(path, part)
    else:
        images, labels = arrays.values()
    _check_arrays(path, images, labels, len(class_names))
    return DataSet(
        name=path.name,
        examples=_array_examples(images, labels),
        names=None,
        content=_array_digest(images, labels),
    )


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


def _folder_labels(folder: Path, found: list[str], class_names: Sequence[str]) -> list[int]:
    """The class index of each sub-folder."""
    matcher = ClassMatcher(class_names)
    indices = [matcher.meant(name) for name in found]
    unknown = [name for name, matches in zip(found, indices, strict=True) if not matches]
    if unknown:
        raise DataError(
            f"{folder}: the model does not know the classes {some(unknown)}: expected names such "
            f"as {some(class_names)} or indices 0 to {len(class_names) - 1}."
        )
    for name, matches in zip(found, indices, strict=True):
        if len(matches) > 1:
            raise DataError(
                f"{folder}: the sub-folder {name!r} could be any of the model's classes "
                f"{', '.join(map(str, matches))}: name it by its index."
            )
    return [matches[0] for matches in indices]


def _array_examples(images: np.ndarray, labels: np.ndarray) -> list[Example]:
    return [
        Example(f"{index:06d}", int(label), partial(operator.getitem, images, index))
        for index, label in enumerate(labels)
    ]


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:  # a dangling link is one record's error, when it is loaded
        return None


def _array_digest(*arrays: np.ndarray) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
