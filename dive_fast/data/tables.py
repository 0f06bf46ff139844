"""A table of image paths and labels: CSV with a header, or JSONL with an object a line."""

from __future__ import annotations

import csv
import os
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from dive_fast.data.columns import Column, ColumnBuilder, Kinds, facts_among
from dive_fast.data.examples import NO_FACTS, DataSet, Examples, Fact, rows_digest
from dive_fast.data.image_files import read_image
from dive_fast.data.matching import label_rows, named_labels
from dive_fast.data.pictures import file_size
from dive_fast.data.spec import IMAGE_COLUMNS, LABEL_COLUMNS, find_column
from dive_fast.data.table_rows import TEXT_SUFFIXES, Row, TableFile
from dive_fast.errors import DataError, shown

SUFFIXES = (*TEXT_SUFFIXES, ".jsonl", ".ndjson")


@dataclass(frozen=True)
class TablePictures:
    """Files that a table lists; what else it says of them is read from it when it is asked for.

    Attributes:
        table: how the table is read.
        image, label: its columns that are no facts.
        offsets: int64 [n], where the rows begin; None if there are no other columns.
        readers: of columns whose texts are no texts, what makes values of them.
    """

    table: TableFile
    image: str
    label: str
    offsets: np.ndarray | None
    readers: Mapping[str, Callable[[str], Fact | None]]

    def loader(self, row: int, example_id: str) -> Callable[[], Image.Image]:
        return partial(read_image, Path(os.path.dirname(self.table.path), example_id))

    def facts(self, row: int, example_id: str) -> Mapping[str, Fact]:
        if self.offsets is None:
            return NO_FACTS
        try:
            with _told(self.table.path):
                cells = self.table.row_at(int(self.offsets[row])).cells
        except StopIteration:
            cells = {}
        if cells.get(self.image) != example_id:
            raise DataError(f"{self.table.path}: was changed while it was in use.")
        others = (item for item in cells.items() if item[0] not in (self.image, self.label))
        return facts_among((name, self._value(name, cell)) for name, cell in others)

    def _value(self, name: str, cell: Any) -> Any:
        return self.readers[name](cell) if name in self.readers else cell

    def __reduce__(self) -> tuple[type, tuple]:
        # Another process may work elsewhere.
        table = replace(self.table, path=os.path.abspath(self.table.path))
        return TablePictures, (table, self.image, self.label, self.offsets, self.readers)


class _Table(NamedTuple):
    """A table that was read."""

    ids: list[str]
    labels: Column
    pictures: TablePictures


def open_table(path: Path, class_names: Sequence[str], options: Mapping[str, str]) -> DataSet:
    """The images that a table lists; ``open_dataset`` says which.

    Raises:
        DataError: it cannot be read, a column is missing, an image stands in it twice, or a label
            is none that the model knows.
    """
    ids, labels, pictures = _read(path, options)
    rows = np.array(label_rows(str(path), labels.values, class_names))
    return DataSet(
        name=path.name,
        examples=Examples(ids, rows[labels.codes], pictures),
        names=tuple(named_labels(labels.values) or ()) or None,
        content=rows_digest((name, file_size(path.parent / name)) for name in ids),
    )


def table_classes(path: Path, options: Mapping[str, str]) -> list[str] | None:
    """The different names among the labels, sorted; None where they are numbers.

    Raises:
        DataError: as ``open_table``.
    """
    return named_labels(_read(path, options).labels.values)


@contextmanager
def _told(path: str | Path) -> Iterator[None]:
    """What goes wrong with the file is a ``DataError``."""
    try:
        yield
    except DataError:
        raise
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected UTF-8 text, got other bytes.") from error
    except (OSError, ValueError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: cannot be read as a table ({reason}).") from error


def _read(path: Path, options: Mapping[str, str]) -> _Table:
    with _told(path):
        table = TableFile.found(os.fspath(path))
        columns = [name for name in table.columns if name]
        image = find_column(str(path), columns, IMAGE_COLUMNS, options.get("image"))
        label = find_column(str(path), columns, LABEL_COLUMNS, options.get("label"))
        return _assembled(table, image, label)


def _assembled(table: TableFile, image: str, label: str) -> _Table:
    ids: list[str] = []
    seen: set[str] = set()
    labels, kinds, offsets = ColumnBuilder(), Kinds(), array("q")
    others = False
    for row in table.rows():
        name, truth = _image_and_label(table.path, row, image, label)
        if name in seen:
            raise DataError(
                f"{table.path}: expected each image once, got {name!r} again in line {row.line}."
            )
        seen.add(name)
        ids.append(name)
        labels.add(truth)
        offsets.append(row.offset)
        others = others or len(row.cells) > len({image, label})
        if table.delimiter is not None:
            kinds.see(row.cells)
    if not ids:
        raise DataError(f"{table.path}: expected at least one image, got none.")
    places = np.array(offsets) if others else None
    return _Table(ids, labels.made(), TablePictures(table, image, label, places, kinds.readers()))


def _image_and_label(path: str, row: Row, image: str, label: str) -> tuple[str, str | int]:
    name, truth = row.cells.get(image), row.cells.get(label)
    if not isinstance(name, str) or not name:
        raise DataError(
            f"{path}: line {row.line}: expected the path of an image in {image!r}, got "
            f"{'none' if name is None else shown(name)}."
        )
    if isinstance(truth, bool) or not isinstance(truth, (str, int)) or truth == "":
        raise DataError(
            f"{path}: line {row.line}: expected the name or index of a class in {label!r}, got "
            f"{'none' if truth is None else shown(truth)}."
        )
    return name, truth
