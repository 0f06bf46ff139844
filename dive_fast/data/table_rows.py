"""The rows of a CSV or JSONL file, from the first to the last, or one again by where it lies."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, BinaryIO, NamedTuple

from dive_fast.errors import DataError, shown

TEXT_SUFFIXES = (".csv", ".tsv")
_DELIMITERS = ",;\t|"
_MARK = b"\xef\xbb\xbf"  # what spreadsheets write begins with it


class Row(NamedTuple):
    """One row: its first line, its first byte, and its cells by column, without empty ones."""

    line: int
    offset: int
    cells: Mapping[str, Any]


class _Lines:
    """The lines of a file as text, with the number of lines and bytes before the next."""

    def __init__(self, file: BinaryIO, line: int = 0) -> None:
        self._file = file
        self.line = line
        self.offset = file.tell()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = next(self._file)
        start = len(_MARK) if self.offset == 0 and line.startswith(_MARK) else 0
        self.line += 1
        self.offset += len(line)
        return line[start:].decode("utf-8")


@dataclass(frozen=True)
class TableFile:
    """How a table is read.

    Attributes:
        path: the file.
        columns: of a CSV those of its header, of a JSONL those of its first object.
        delimiter: of a CSV; None of a JSONL.
    """

    path: str
    columns: tuple[str, ...] = ()
    delimiter: str | None = None

    @classmethod
    def found(cls, path: str) -> TableFile:
        """The table in a file.

        Raises:
            DataError: it is empty, or names a column twice.
        """
        is_text = os.path.splitext(path)[1].lower() in TEXT_SUFFIXES
        table = cls(path)
        with open(path, "rb") as file:
            lines = _Lines(file)
            if is_text:
                head = next(lines, "")
                by = "\t" if path.lower().endswith(".tsv") else max(_DELIMITERS, key=head.count)
                columns = tuple(n.strip() for n in next(csv.reader([head], delimiter=by), []))
                table = replace(table, columns=columns, delimiter=by)
            elif (first := next(table._objects(lines), None)) is not None:
                table = replace(table, columns=tuple(first.cells))
        if twice := [n for i, n in enumerate(table.columns) if n and n in table.columns[:i]]:
            raise DataError(f"{path}: expected columns of different names, got {twice[0]!r} twice.")
        if not any(table.columns):
            raise DataError(f"{path}: expected a table of images and labels, got an empty file.")
        return table

    def rows(self) -> Iterator[Row]:
        """All rows.

        Raises:
            DataError: one of them is no row of this table.
        """
        with open(self.path, "rb") as file:
            lines = _Lines(file)
            if self.delimiter is None:
                yield from self._objects(lines)
            else:
                next(lines)
                yield from self._records(lines)

    def row_at(self, offset: int) -> Row:
        """The row that begins at this byte."""
        with open(self.path, "rb") as file:
            file.seek(offset)
            lines = _Lines(file)
            return next(self._objects(lines) if self.delimiter is None else self._records(lines))

    def _records(self, lines: _Lines) -> Iterator[Row]:
        reader = csv.reader(lines, delimiter=self.delimiter, strict=True)
        line, offset = lines.line + 1, lines.offset
        for cells in reader:
            if cells and len(cells) != len(self.columns):
                raise DataError(
                    f"{self.path}: line {line}: expected {len(self.columns)} cells as in the "
                    f"header, got {len(cells)}."
                )
            if cells:
                stripped = zip(self.columns, (cell.strip() for cell in cells), strict=True)
                yield Row(line, offset, {name: cell for name, cell in stripped if name and cell})
            line, offset = lines.line + 1, lines.offset

    def _objects(self, lines: _Lines) -> Iterator[Row]:
        offset = lines.offset
        for text in lines:
            if text.strip():
                yield Row(lines.line, offset, self._object(lines.line, text))
            offset = lines.offset

    def _object(self, line: int, text: str) -> dict[str, Any]:
        try:
            cells = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self.path}: line {line}: expected JSON ({error}).") from error
        if not isinstance(cells, dict):
            raise DataError(
                f"{self.path}: line {line}: expected an object with an image and its label, got "
                f"{shown(cells)}."
            )
        return cells
