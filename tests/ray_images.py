"""Images for Ray's workers that misbehave where they are read: in the worker's process."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from dive_fast.data import DataSet, Example
from dive_fast.data.digits import load_digits
from dive_fast.data.streams import row_id
from dive_fast.errors import ImageError

Misbehave = Callable[[], None]


def digits(n: int, odd: dict[int, Misbehave] | None = None) -> DataSet:
    """The first n held-out digits; what ``odd`` names by position misbehaves before it is read."""
    images, labels = load_digits("test")
    odd = odd or {}
    examples = [
        Example(f"{i:03}", int(labels[i]), partial(_load, images[i], odd.get(i))) for i in range(n)
    ]
    return DataSet("digits", examples, None, "the first")


def _load(image: np.ndarray, misbehave: Misbehave | None) -> np.ndarray:
    if misbehave is not None:
        misbehave()
    return image


def die() -> None:
    """As an image that its worker does not survive."""
    os.kill(os.getpid(), signal.SIGKILL)


def die_once(mark: Path) -> None:
    """As a worker that is lost, whatever it is at: only the first that comes here dies."""
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        return
    die()


class Rows:
    """The first n digits as a stream, whose reader dies once in the middle."""

    where = "rows"

    def __init__(self, n: int, mark: Path) -> None:
        self._data = digits(n, {n // 2: partial(die_once, mark)})

    def examples(self, start: int) -> Iterator[tuple[int, Callable[[], Example]]]:
        for row in range(start, len(self._data.examples)):
            yield row, partial(self._example, row)

    def _example(self, row: int) -> Example:
        return replace(self._data.examples[row], id=row_id(row))


def unreadable() -> None:
    raise ImageError("the image: truncated or damaged.")


def fail() -> None:
    raise ZeroDivisionError("a bug in the reader")
