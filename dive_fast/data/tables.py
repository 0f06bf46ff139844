"""A table of image paths and labels: CSV with a header, or JSONL with an object a line."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np

from dive_fast.data.columns import Column, ColumnBuilder, TableBuilder, typed
from dive_fast.data.examples import DataSet, Examples, rows_digest
from dive_fast.data.matching import label_rows, named_labels
from dive_fast.data.pictures import FilePictures, file_size
from dive_fast.data.spec import IMAGE_COLUMNS, LABEL_COLUMNS, find_column
from dive_fast.errors import DataError, shown

SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson")
_DELIMITERS = ",;\t|"


class _Row(NamedTuple):
    line: int
    cells: Mapping[str, Any]


class _Table(NamedTuple):
    """A table that was read: ids [n], the column of labels, and the others."""

    ids: list[str]
    labels: Column
    facts: dict[str, Column]


def open_table(path: Path, class_names: Sequence[str], options: Mapping[str, str]) -> DataSet:
    """The images that a table lists; ``open_dataset`` says which.

    Raises:
        DataError: it cannot be read, a column is missing, an image stands in it twice, or a label
            is none that the model knows.
    """
    table = _read(path, options)
    rows = np.array(label_rows(str(path), table.labels.values, class_names))
    folder = path.parent
    return DataSet(
        name=path.name,
        examples=Examples(
            table.ids, rows[table.labels.codes], FilePictures(os.fspath(folder), table.facts)
        ),
        names=tuple(named_labels(table.labels.values) or ()) or None,
        content=rows_digest((name, file_size(folder / name)) for name in table.ids),
    )


def table_classes(path: Path, options: Mapping[str, str]) -> list[str] | None:
    """The different names among the labels, sorted; None where they are numbers.

    Raises:
        DataError: as ``open_table``.
    """
    return named_labels(_read(path, options).labels.values)


def _read(path: Path, options: Mapping[str, str]) -> _Table:
    try:
        # utf-8-sig: what spreadsheets write begins with a byte order mark.
        with open(path, encoding="utf-8-sig", newline="") as file:
            text = path.suffix.lower() in (".csv", ".tsv")
            table = _assembled(
                path, _csv_rows(path, file) if text else _json_rows(path, file), options
            )
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected UTF-8 text, got other bytes.") from error
    except (OSError, ValueError, csv.Error) as error:
        if isinstance(error, DataError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: cannot be read as a table ({reason}).") from error
    if not text:
        return table
    return table._replace(facts={name: typed(column) for name, column in table.facts.items()})


def _csv_rows(path: Path, file: TextIO) -> Iterator[_Row]:
    head = file.readline()
    file.seek(0)
    delimiter = "\t" if path.suffix.lower() == ".tsv" else max(_DELIMITERS, key=head.count)
    reader = csv.reader(file, delimiter=delimiter, strict=True)
    header = [name.strip() for name in next(reader, [])]
    if twice := [name for i, name in enumerate(header) if name in header[:i]]:
        raise DataError(f"{path}: expected columns of different names, got {twice[0]!r} twice.")
    yield _Row(1, dict.fromkeys(header, ""))
    for cells in reader:
        if not cells:
            continue
        if len(cells) != len(header):
            raise DataError(
                f"{path}: line {reader.line_num}: expected {len(header)} cells as in the header, "
                f"got {len(cells)}."
            )
        named = zip(header, (cell.strip() for cell in cells), strict=True)
        yield _Row(reader.line_num, {name: cell for name, cell in named if cell})


def _json_rows(path: Path, file: TextIO) -> Iterator[_Row]:
    first = True
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            cells = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: line {number}: expected JSON ({error}).") from error
        if not isinstance(cells, dict):
            raise DataError(
                f"{path}: line {number}: expected an object with an image and its label, got "
                f"{shown(cells)}."
            )
        if first:
            yield _Row(number, cells)  # stands for the header
        first = False
        yield _Row(number, cells)


def _assembled(path: Path, rows: Iterator[_Row], options: Mapping[str, str]) -> _Table:
    """The table of its rows, of which the first names the columns."""
    columns = list(next(rows, _Row(0, {})).cells)
    if not columns:
        raise DataError(f"{path}: expected a table of images and labels, got an empty file.")
    image = find_column(str(path), columns, IMAGE_COLUMNS, options.get("image"))
    label = find_column(str(path), columns, LABEL_COLUMNS, options.get("label"))
    ids: list[str] = []
    seen: set[str] = set()
    labels, facts = ColumnBuilder(), TableBuilder()
    for line, cells in rows:
        name, truth = cells.get(image), cells.get(label)
        if not isinstance(name, str) or not name:
            raise DataError(
                f"{path}: line {line}: expected the path of an image in {image!r}, got "
                f"{'none' if name is None else shown(name)}."
            )
        if name in seen:
            raise DataError(f"{path}: expected each image once, got {name!r} again in line {line}.")
        if not _is_label(truth):
            raise DataError(
                f"{path}: line {line}: expected the name or index of a class in {label!r}, got "
                f"{'none' if truth is None else shown(truth)}."
            )
        seen.add(name)
        labels.set(len(ids), truth)
        facts.set(len(ids), ((key, cells[key]) for key in cells if key not in (image, label)))
        ids.append(name)
    if not ids:
        raise DataError(f"{path}: expected at least one image, got none.")
    return _Table(ids, labels.made(len(ids)), facts.made(len(ids)))


def _is_label(value: Any) -> bool:
    return isinstance(value, (str, int)) and not isinstance(value, bool) and value != ""
