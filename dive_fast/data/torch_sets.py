"""Data sets of torch and torchvision: objects that give (image, label) at an index."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np

from dive_fast.data.examples import NO_FACTS, DataSet, Examples, Fact, Picture, rows_digest
from dive_fast.data.matching import label_rows
from dive_fast.data.streams import row_id
from dive_fast.errors import DataError, ImageError, shown

log = logging.getLogger(__name__)

# Where torchvision's data sets keep what their items are labelled with.
_LABELS = ("targets", "labels", "_labels")


class MapDataset(Protocol):
    """A map-style data set of torch, such as ``torchvision.datasets.CIFAR10``."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Any, Any]: ...


@dataclass(frozen=True)
class TorchPictures:
    """The first parts of a data set's items."""

    dataset: MapDataset

    def loader(self, row: int, example_id: str) -> Callable[[], Picture]:
        return partial(_image, self.dataset, row, example_id)

    def facts(self, row: int, example_id: str) -> Mapping[str, Fact]:
        return NO_FACTS


def from_torch(
    dataset: MapDataset,
    class_names: Sequence[str],
    *,
    name: str | None = None,
    names: Sequence[str] | None = None,
    by_index: bool = False,
) -> DataSet:
    """The images and labels of a map-style data set, for a model with these classes.

    Args:
        dataset: gives (image, label) at an index; its transform leaves what ``as_image`` takes: a
            PIL image, an array, or a tensor [c, h, w] of uint8 or in [0, 1]. Labels are taken from
            its ``targets``, ``labels`` or ``_labels``, also of a ``Subset`` or ``ConcatDataset``;
            where there are none, or there is a ``target_transform``, every item is loaded for its
            label, and a line tells so.
        class_names: the model's classes in order.
        name: what runs call the data; the name of its class if None.
        names: what the data call their labels 0, 1, ...; its ``classes`` if None. They are matched
            as the names of folders are (see ``open_dataset``).
        by_index: the labels are the model's rows, whatever they are called.

    Raises:
        DataError: it has no items, or labels that are no whole numbers or that the model does not
            know.
    """
    name = type(dataset).__name__ if name is None else name
    try:
        count = len(dataset)
    except TypeError as error:
        raise DataError(
            f"{name}: expected a data set with a length and items by index, got "
            f"{type(dataset).__name__}."
        ) from error
    if not count:
        raise DataError(f"{name}: expected at least one image, got none.")
    labels = _stored_labels(dataset)
    if labels is None or len(labels) != count:
        log.warning("%s: has no list of its labels: all %d items are loaded for them.", name, count)
        labels = [_item(dataset, row, name)[1] for row in range(count)]
    labels = _whole_numbers(name, labels)
    called = None if by_index else _names(dataset, names)
    different, codes = np.unique(labels, return_inverse=True)
    meant = different.tolist() if called is None else _called(name, different.tolist(), called)
    rows = np.array(label_rows(name, meant, class_names))
    return DataSet(
        name=name,
        examples=Examples([row_id(i) for i in range(count)], rows[codes], TorchPictures(dataset)),
        names=called,
        content=rows_digest([[called], labels.tolist()]),
    )


def _stored_labels(dataset: Any) -> Sequence[Any] | None:
    """The labels of all items where they lie beside them, also below a subset or several sets."""
    if getattr(dataset, "target_transform", None) is not None:
        return None
    for attribute in _LABELS:
        found = getattr(dataset, attribute, None)
        if found is not None and hasattr(found, "__len__"):
            return found
    if hasattr(dataset, "indices") and hasattr(dataset, "dataset"):
        inner = _stored_labels(dataset.dataset)
        return None if inner is None else [inner[i] for i in dataset.indices]
    if hasattr(dataset, "datasets"):
        parts = [_stored_labels(part) for part in dataset.datasets]
        known = all(part is not None for part in parts)
        return list(itertools.chain.from_iterable(parts)) if known else None
    return None


def _names(dataset: Any, names: Sequence[Any] | None) -> tuple[str, ...] | None:
    """What the labels are called: ImageNet's are tuples of synonyms."""
    inner = dataset
    while names is None and inner is not None:
        names = getattr(inner, "classes", None)
        inner = getattr(inner, "dataset", None) or next(iter(getattr(inner, "datasets", ())), None)
    if names is None:
        return None
    return tuple(name if isinstance(name, str) else ", ".join(name) for name in names)


def _called(where: str, labels: list[int], names: tuple[str, ...]) -> list[str]:
    if unknown := [label for label in labels if not 0 <= label < len(names)]:
        raise DataError(
            f"{where}: expected labels 0 to {len(names) - 1}, which have names, got {unknown[0]}."
        )
    return [names[label] for label in labels]


def _whole_numbers(where: str, labels: Sequence[Any]) -> np.ndarray:
    try:
        found = np.asarray([label.item() if hasattr(label, "item") else label for label in labels])
    except (TypeError, ValueError):
        found = np.empty((0, 0))
    if found.ndim != 1 or found.dtype.kind not in "iu":
        raise DataError(
            f"{where}: expected a whole number as the label of each image, got such as "
            f"{shown(labels[0])}."
        )
    return found.astype(np.int64)


def _item(dataset: MapDataset, row: int, where: str) -> tuple[Any, Any]:
    item = dataset[row]
    if not isinstance(item, (tuple, list)) or len(item) < 2:
        raise DataError(f"{where}: expected items (image, label), got {type(item).__name__}.")
    return item[0], item[1]


def _image(dataset: MapDataset, row: int, name: str) -> Any:
    try:
        return _item(dataset, row, name)[0]
    except Exception as error:  # whatever the data set trips over is this image's error
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"{name}: cannot be read ({reason.rstrip('.')}).") from error
