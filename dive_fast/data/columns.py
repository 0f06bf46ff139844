"""Columns of a table beside image and label: each value is held once, and a code per row."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from dive_fast.data.examples import NO_FACTS, Fact


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        values: the different values.
        codes: int32 [n], each row's value among them; -1 where it has none.
    """

    values: list[Fact]
    codes: np.ndarray


class ColumnBuilder:
    """A column that is read row by row."""

    def __init__(self) -> None:
        self._values: list[Fact] = []
        self._code_of: dict[tuple[type, Fact], int] = {}
        self._codes = array("i")

    def set(self, row: int, value: Fact) -> None:
        """The value of a row; rows that are passed over have none."""
        self._codes.extend([-1] * (row - len(self._codes)))
        key = (type(value), value)  # True is 1 for a dict
        code = self._code_of.setdefault(key, len(self._values))
        if code == len(self._values):
            self._values.append(value)
        self._codes.append(code)

    def made(self, n_rows: int) -> Column:
        codes = np.full(n_rows, -1, dtype=np.int32)
        codes[: len(self._codes)] = np.frombuffer(self._codes, dtype=np.int32)
        return Column(self._values, codes)


class TableBuilder:
    """Columns that are read row by row; they may turn up late."""

    def __init__(self) -> None:
        self._columns: dict[str, ColumnBuilder] = {}

    def set(self, row: int, cells: Iterable[tuple[str, Any]]) -> None:
        """The cells of a row; what is no text, finite number or truth value is left out."""
        for name, value in cells:
            if is_fact(value):
                self._columns.setdefault(name, ColumnBuilder()).set(row, value)

    def made(self, n_rows: int) -> dict[str, Column]:
        return {name: column.made(n_rows) for name, column in self._columns.items()}


def is_fact(value: Any) -> bool:
    """Whether a value can stand in ``Example.facts``."""
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, (str, int, bool))


def facts_of(columns: Mapping[str, Column], row: int) -> Mapping[str, Fact]:
    """What the columns say of a row."""
    if not columns:
        return NO_FACTS
    codes = {name: int(column.codes[row]) for name, column in columns.items()}
    return {name: columns[name].values[code] for name, code in codes.items() if code >= 0}


def typed(column: Column) -> Column:
    """A column of texts as whole numbers, numbers or truth values, if each of its texts is one.

    A whole number is one only as Python writes it: "007" stays a text.
    """
    for read in (_whole, _number, _truth):
        values = [read(text) for text in column.values]
        if None not in values:
            return Column(values, column.codes)
    return column


def _whole(text: str) -> int | None:
    value = _read(int, text)
    return value if str(value) == text else None


def _number(text: str) -> float | None:
    digits = text.lstrip("+-")
    if digits[:1] == "0" and digits[1:2].isdigit():
        return None
    value = _read(float, text)
    return value if value is not None and math.isfinite(value) else None


def _truth(text: str) -> bool | None:
    return {"true": True, "false": False}.get(text.lower())


def _read(kind: Callable[[str], Any], text: str) -> Any:
    try:
        return kind(text) if "_" not in text else None
    except ValueError:
        return None
