"""What a page is made of: plain values, which the template turns into HTML."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar


@dataclass(frozen=True)
class Cell:
    """One value of a table.

    Attributes:
        text: what is read.
        note: more of it, in a line of small letters below.
        sort: what it is sorted by; the text if None.
        bar: a share in [0, 1] that is drawn behind the text.
        series: the run whose colour the bar has.
        run: the run that the text names, whose mark stands before it.
        best: whether no other run has a better value in its column.
        differs: whether the runs differ in its row.
    """

    text: str
    sort: float | None = None
    note: str = ""
    bar: float | None = None
    series: int = 0
    run: int | None = None
    best: bool = False
    differs: bool = False


@dataclass(frozen=True)
class Column:
    """The head of a column; ``meaning`` says in a few words what its numbers are."""

    title: str
    numeric: bool = True
    meaning: str = ""
    series: int | None = None


@dataclass(frozen=True)
class Table:
    """Rows under heads; the first cell of a row names it."""

    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    sortable: bool = True
    id: str = ""
    kind: ClassVar[str] = "table"


@dataclass(frozen=True)
class Figure:
    """A drawing, what it shows in words, and its numbers.

    Attributes:
        svg: the drawing, as ``svg.inline`` gives it.
        alt: what it shows, with the numbers that matter.
        title, caption: what stands above and below it.
        legend: (series, name) of the runs in it; empty where there is one only.
        numbers: the same as a table.
    """

    svg: str
    alt: str
    title: str
    caption: str
    legend: Sequence[tuple[int, str]]
    numbers: Table
    kind: ClassVar[str] = "figure"


@dataclass(frozen=True)
class Heat:
    """A confusion matrix: rows are right classes, columns are answers.

    Attributes:
        names: of the classes.
        cells: for each row (count, step): a step of 0 to 6 is how dark it is.
    """

    caption: str
    names: Sequence[str]
    cells: Sequence[Sequence[tuple[int, int]]]
    kind: ClassVar[str] = "heat"


@dataclass(frozen=True)
class Picture:
    """One image with its answer.

    Attributes:
        id: the record's.
        uri: the pixels, or "" where there are none.
        size: (width, height) on the page, in CSS pixels.
        alt: what it is.
        facts: lines below it.
        right: whether the answer is right; None where nobody knows.
        top: (name, share, whether it is the right class) of the best classes.
        pixelated: whether its pixels are to be seen.
        missing: why there is no picture.
    """

    id: str
    uri: str
    size: tuple[int, int]
    alt: str
    facts: Sequence[str] = ()
    right: bool | None = None
    top: Sequence[tuple[str, float, bool]] = ()
    pixelated: bool = False
    missing: str = ""


@dataclass(frozen=True)
class Gallery:
    """Pictures under one heading; ``wide`` ones take more room."""

    pictures: Sequence[Picture]
    wide: bool = False
    kind: ClassVar[str] = "gallery"


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str
    kind: ClassVar[str] = "text"


@dataclass(frozen=True)
class Tiles:
    """A few large numbers: (what, number, more)."""

    tiles: Sequence[tuple[str, str, str]]
    kind: ClassVar[str] = "tiles"


@dataclass(frozen=True)
class Folded:
    """Parts that are shown when they are asked for."""

    title: str
    parts: Sequence[object]
    kind: ClassVar[str] = "folded"


@dataclass(frozen=True)
class Headed:
    """Parts under a heading of the order ``level``; ``series`` is the run that they are of."""

    title: str
    parts: Sequence[object]
    series: int | None = None
    level: int = 3
    kind: ClassVar[str] = "headed"


@dataclass(frozen=True)
class SideBySide:
    """Parts that stand side by side where there is room."""

    parts: Sequence[object]
    kind: ClassVar[str] = "side"


@dataclass(frozen=True)
class Section:
    """A heading of the second order and what stands below it."""

    id: str
    title: str
    parts: Sequence[object] = field(default_factory=list)


# -- numbers as text -------------------------------------------------------------------------------

NOTHING = "\N{EN DASH}"


def percent(value: float | None, error: float | None = None, digits: int = 1) -> str:
    """A share as "92.7% ± 1.5"; a dash where there is none."""
    if not is_known(value):
        return NOTHING
    more = f" ± {100 * error:.{digits}f}" if is_known(error) else ""
    return f"{100 * value:.{digits}f}%{more}"


def number(value: float | None, digits: int = 3, error: float | None = None) -> str:
    """A number with thousands apart; a dash where there is none."""
    if not is_known(value):
        return NOTHING
    more = f" ± {error:,.{digits}f}" if is_known(error) else ""
    return f"{value:,.{digits}f}{more}"


def is_known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def share(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def best_of(values: Iterable[float | None], higher: bool) -> list[bool]:
    """Which of the values is the best, where they are not all the same."""
    values = list(values)
    known = [v for v in values if is_known(v)]
    if len(set(known)) < 2:
        return [False] * len(values)
    best = max(known) if higher else min(known)
    return [v == best for v in values]
