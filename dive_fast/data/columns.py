"""Values of columns: the different labels, and what the texts of a CSV stand for."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from dive_fast.data.examples import Fact


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        values: the different values.
        codes: int32 [n], each row's value among them.
    """

    values: list[Any]
    codes: np.ndarray


class ColumnBuilder:
    """A column that is read row by row."""

    def __init__(self) -> None:
        self._code_of: dict[str | int, int] = {}
        self._codes = array("i")

    def add(self, value: str | int) -> None:
        """The value of the next row."""
        self._codes.append(self._code_of.setdefault(value, len(self._code_of)))

    def made(self) -> Column:
        return Column(list(self._code_of), np.array(self._codes, dtype=np.int32))


def facts_among(cells: Iterable[tuple[str, Any]]) -> dict[str, Fact]:
    """The cells that can stand in ``Example.facts``: texts, finite numbers and truth values."""
    return {name: value for name, value in cells if is_fact(value)}


def is_fact(value: Any) -> bool:
    """Whether a value can stand in ``Example.facts``."""
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, (str, int, bool))


class Kinds:
    """What the texts of each column are: whole numbers, numbers or truth values if all of them are.

    A whole number is one only as Python writes it: "007" stays a text.
    """

    def __init__(self) -> None:
        self._possible: dict[str, list[Callable[[str], Fact | None]]] = {}

    def see(self, cells: Mapping[str, str]) -> None:
        """One more row."""
        for name, text in cells.items():
            possible = self._possible.setdefault(name, [_whole, _number, _truth])
            if possible:
                possible[:] = [read for read in possible if read(text) is not None]

    def readers(self) -> dict[str, Callable[[str], Fact | None]]:
        """Of each column that holds no texts, what makes values of its texts."""
        return {name: possible[0] for name, possible in self._possible.items() if possible}


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
