"""Data sets of Hugging Face's ``datasets``: of the hub, folders of parquet, ``save_to_disk``."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from dive_fast.data.columns import ColumnBuilder, is_fact
from dive_fast.data.examples import DataSet, Example, Examples, Fact, rows_digest
from dive_fast.data.hub_loading import HubSet, load_hub_set, reason
from dive_fast.data.image_files import decode_image, read_image
from dive_fast.data.matching import label_rows, named_labels
from dive_fast.data.pictures import file_size
from dive_fast.data.spec import IMAGE_COLUMNS, LABEL_COLUMNS, find_column
from dive_fast.data.streams import StreamedExamples, row_id
from dive_fast.errors import DataError, ImageError, shown, some

if TYPE_CHECKING:
    from datasets import Dataset, Features, IterableDataset


SAMPLED = 16  # images whose content counts in the fingerprint


@dataclass(frozen=True)
class _Columns:
    """Which columns of a data set are what.

    Attributes:
        image, label: their names.
        classes: what the data call the numbers of the label, if it has a list of them.
        facts: other columns of texts, numbers and truth values, with the names of their numbers
            where these have such.
    """

    image: str
    label: str
    classes: tuple[str, ...] | None
    facts: Mapping[str, tuple[str, ...] | None]

    def facts_of(self, cells: Mapping[str, Any]) -> Mapping[str, Fact]:
        """What ``Example.facts`` is of a row."""
        found = {}
        for name, names in self.facts.items():
            value = cells.get(name)
            if names is not None and isinstance(value, int):
                value = names[value] if 0 <= value < len(names) else None
            if is_fact(value):
                found[name] = value
        return found


@dataclass(frozen=True)
class HubPictures:
    """Images in a column of a data set, which stay encoded until they are asked for.

    Attributes:
        images: the column of images alone.
        others: the columns of the facts, or None if there are none.
    """

    images: Dataset
    others: Dataset | None
    columns: _Columns

    def loader(self, row: int, example_id: str) -> Callable[[], Image.Image]:
        return partial(_load_row, self.images, row, self.columns.image, example_id)

    def facts(self, row: int, example_id: str) -> Mapping[str, Fact]:
        return {} if self.others is None else self.columns.facts_of(self.others[row])


@dataclass(frozen=True)
class HubStream:
    """A streamed data set; every pass over it is opened anew.

    Attributes:
        source: where it is.
        columns: which are what.
        rows_of: the model's row of each of the data's classes; None where the data have no list.
        class_names: of the model, in order.
    """

    source: HubSet
    columns: _Columns
    rows_of: tuple[int, ...] | None
    class_names: tuple[str, ...]

    @property
    def where(self) -> str:
        return self.source.where

    def examples(self, start: int) -> Iterator[tuple[int, Callable[[], Example]]]:
        _expect_whole_streams(self.where)
        stream = _undecoded(self.where, load_hub_set(self.source), self.columns.image).skip(start)
        row = start
        try:
            for row, cells in enumerate(stream, start):
                yield row, partial(self._example, row, cells)
        except DataError:
            raise
        except Exception as error:  # a network, a disk or a decoder of parquet fails as it likes
            raise DataError(f"{self.where}: row {row}: {reason(error)}.") from error

    def _example(self, row: int, cells: Mapping[str, Any]) -> Example:
        value = _checked_label(self.where, row, cells[self.columns.label], self.columns.classes)
        if self.rows_of is not None:
            label = self.rows_of[value]
        else:
            (label,) = label_rows(f"{self.where}: row {row}", [value], self.class_names)
        name = row_id(row)
        load = partial(_load_cell, cells[self.columns.image], name)
        return Example(name, label, load, self.columns.facts_of(cells))


def open_hub_set(source: HubSet, class_names: Sequence[str]) -> DataSet:
    """The images of a data set; ``open_dataset`` says which.

    Raises:
        DataError: ``datasets`` is not installed, the data set or its split cannot be loaded, a
            column is missing, or there is a label that the model does not know.
    """
    data = _load_once(source, os.getcwd())
    _load_once.cache_clear()
    columns = _columns(source, data.features)
    if source.streaming:
        return _streamed(source, data, columns, tuple(class_names))
    data = _undecoded(source.where, data, columns.image)
    values, codes = _labels(source, data, columns)
    rows = np.array(label_rows(source.where, _meant(source, columns, values), class_names))
    facts = list(columns.facts)
    pictures = HubPictures(
        data.select_columns([columns.image]),
        data.select_columns(facts) if facts else None,
        columns,
    )
    ids = [row_id(i) for i in range(len(data))]
    return DataSet(
        name=source.name,
        examples=Examples(ids, rows[codes], pictures),
        names=columns.classes or tuple(named_labels(values) or ()) or None,
        content=_digest(source, columns, [[_sample(data, columns.image)], values, codes.tolist()]),
    )


def hub_classes(source: HubSet) -> list[str] | None:
    """What the data call their classes: in the order of their numbers, or sorted.

    Raises:
        DataError: as ``open_hub_set``.
    """
    data = _load_once(source, os.getcwd())
    columns = _columns(source, data.features)
    if columns.classes is not None or source.streaming:
        return list(columns.classes or ()) or None
    return named_labels(_labels(source, data, columns)[0])


def _expect_whole_streams(where: str) -> None:
    """In a worker of a DataLoader, ``datasets`` gives only a part of the rows, unasked."""
    from torch.utils.data import get_worker_info

    if get_worker_info() is not None:
        raise DataError(
            f"{where}: expected to be streamed in the process that hands out the images, not in a "
            "worker of a DataLoader."
        )


@functools.lru_cache(maxsize=1)
def _load_once(source: HubSet, directory: str) -> Dataset | IterableDataset:
    """For whom the classes are asked for first, and then the images."""
    return load_hub_set(source)


def _streamed(
    source: HubSet, data: IterableDataset, columns: _Columns, class_names: tuple[str, ...]
) -> DataSet:
    rows_of = None
    if columns.classes is not None:
        numbers = list(range(len(columns.classes)))
        rows_of = tuple(label_rows(source.where, _meant(source, columns, numbers), class_names))
    split = (data.info.splits or {}).get(source.split)
    count = getattr(split, "num_examples", None)
    stream = HubStream(source, columns, rows_of, class_names)
    return DataSet(
        name=source.name,
        examples=StreamedExamples(stream, range(count) if count else None),
        names=columns.classes,
        content=_digest(source, columns, []),
    )


def _meant(source: HubSet, columns: _Columns, values: Sequence[Any]) -> list[str | int]:
    """What ``label_rows`` is asked: names, or numbers."""
    if columns.classes is None or source.by_index:
        return list(values)
    return [columns.classes[value] for value in values]


def _digest(source: HubSet, columns: _Columns, rows: Sequence[Sequence[Any]]) -> str:
    """Of what depends neither on where the data lie nor on the version of ``datasets``."""
    head = [source.name, source.revision, columns.image, columns.label, columns.classes]
    return rows_digest([head, *rows])


def _sample(data: Dataset, column: str) -> str:
    """A digest of a few images' files: two data sets may have the same labels."""
    found = []
    for row in np.linspace(0, len(data) - 1, min(len(data), SAMPLED)).astype(int).tolist():
        cell = data[row][column] or {}
        content, path = cell.get("bytes"), cell.get("path")
        if content is not None:
            found.append(hashlib.sha256(content).hexdigest())
        elif path is not None:
            found.append(file_size(Path(path)))
    return rows_digest([found])


def _columns(source: HubSet, features: Features) -> _Columns:
    from datasets import ClassLabel, Value
    from datasets import Image as ImageFeature

    def of(kind: type) -> list[str]:
        return [name for name, feature in features.items() if isinstance(feature, kind)]

    image = _chosen(source.where, of(ImageFeature), list(features), IMAGE_COLUMNS, source.image)
    label = _chosen(source.where, of(ClassLabel), list(features), LABEL_COLUMNS, source.label)
    scalars = [name for name in of(Value) + of(ClassLabel) if name not in (image, label)]
    names = {
        name: tuple(features[name].names) if isinstance(features[name], ClassLabel) else None
        for name in [label, *scalars]
        if features[name] != Value("binary")
    }
    classes = names.pop(label, None)
    if source.by_index and classes is None and features[label] == Value("string"):
        raise DataError(f"{source.where}: classes=index needs numbers in {label!r}, got texts.")
    return _Columns(image, label, classes, names)


def _chosen(
    where: str, typed: list[str], columns: list[str], usual: Sequence[str], named: str | None
) -> str:
    """The one column of the right type; else by its name, among them or among all."""
    if named is None and len(typed) == 1:
        return typed[0]
    return find_column(where, typed if named is None and typed else columns, usual, named)


def _undecoded(where: str, data: Any, column: str) -> Any:
    from datasets import Image as ImageFeature

    try:
        return data.cast_column(column, ImageFeature(decode=False))
    except Exception as error:  # pyarrow's, of whatever the column holds
        raise DataError(
            f"{where}: expected images in the column {column!r}: {reason(error)}."
        ) from error


def _labels(source: HubSet, data: Dataset, columns: _Columns) -> tuple[list[Any], np.ndarray]:
    """The different labels, and int32 [n] with each row's among them."""
    builder = ColumnBuilder()
    row = 0
    for batch in data.select_columns([columns.label]).iter(10_000):
        for value in batch[columns.label]:
            builder.add(_checked_label(source.where, row, value, columns.classes))
            row += 1
    if not row:
        raise DataError(f"{source.where}: expected at least one image, got none.")
    column = builder.made()
    return column.values, column.codes


def _checked_label(where: str, row: int, value: Any, classes: Sequence[str] | None) -> str | int:
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value in ("", -1):
        raise DataError(
            f"{where}: row {row}: expected the name or index of a class, got "
            f"{'none' if value in (None, '') else shown(value)}; some splits have no labels."
        )
    if classes is not None and not 0 <= value < len(classes):
        raise DataError(f"{where}: row {row}: expected one of {some(classes)}, got {value}.")
    return value


def _load_row(images: Dataset, row: int, column: str, name: str) -> Image.Image:
    try:
        cell = images[row][column]
    except Exception as error:  # arrow files may be damaged or gone
        raise ImageError(f"{name}: cannot be read ({reason(error)}).") from error
    return _load_cell(cell, name)


def _load_cell(cell: Mapping[str, Any] | None, name: str) -> Image.Image:
    """The image of {"bytes", "path"}, of which one may be None."""
    cell = cell or {}
    content, path = cell.get("bytes"), cell.get("path")
    if content is None and path is None:
        raise ImageError(f"{name}: expected an image, got none.")
    if content is None and "://" not in path:
        return read_image(path)
    return decode_image(_fetched(path, name) if content is None else content, name)


def _fetched(path: str, name: str) -> bytes:
    import fsspec

    try:
        with fsspec.open(path, "rb") as file:
            return file.read()
    except Exception as error:  # each file system has its own errors
        raise ImageError(f"{name}: {path} cannot be read ({reason(error)}).") from error
