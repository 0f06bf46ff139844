"""Examples that come one after the other, once, from data too large to have at hand."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import numpy as np

from dive_fast.data.examples import Change, Example, LazyExamples
from dive_fast.errors import DataError


class Stream(Protocol):
    """Where streamed images come from. It pickles."""

    where: str  # what a sentence calls it

    def examples(self, start: int) -> Iterator[tuple[int, Callable[[], Example]]]:
        """Of each row from ``start`` on, its number and what makes the example of it."""
        ...


@dataclass(frozen=True)
class ChangedStream:
    """A stream of whose images ``change`` makes others when they are loaded."""

    stream: Stream
    change: Change

    @property
    def where(self) -> str:
        return self.stream.where

    def examples(self, start: int) -> Iterator[tuple[int, Callable[[], Example]]]:
        for row, make in self.stream.examples(start):
            yield row, partial(_changed, self.change, make)


def _changed(change: Change, make: Callable[[], Example]) -> Example:
    example = make()
    return replace(example, load=partial(change, example.load, example.id))


class StreamedExamples(LazyExamples):
    """Examples in the order of a stream, none of which is decoded before its ``load`` is called.

    Every iteration begins anew. Rows that are not among the examples are passed over undecoded. An
    index reads on to its row from that of the index before, and begins anew for one further back:
    positions that mostly ascend cost one pass.

    Attributes:
        labels: None; each example has its own.

    Args:
        stream: where they come from.
        rows: integers [n], ascending; None where nobody knows how many there are.
    """

    labels = None

    def __init__(self, stream: Stream, rows: Sequence[int] | None) -> None:
        self._stream = stream
        self._rows = rows
        self._ahead: Iterator[tuple[int, Callable[[], Example]]] = iter(())
        self._next_row = -1  # of ``_ahead``

    def __reduce__(self) -> tuple[type, tuple]:
        return StreamedExamples, (self._stream, self._rows)

    @property
    def ids(self) -> list[str]:
        """The ids of all examples: their rows.

        Raises:
            DataError: nobody knows how many there are.
        """
        return [row_id(int(row)) for row in self._known()]

    def __len__(self) -> int:
        return len(self._known())

    def __getitem__(self, index: int) -> Example:
        rows = self._known()
        row = int(rows[operator.index(index)])
        if not 0 <= self._next_row <= row:
            self._ahead = self._stream.examples(row)
        self._next_row = -1  # until the row is found, nobody knows where the stream is
        for found, example in self._ahead:
            if found == row:
                self._next_row = row + 1
                return example()
        raise self._ended()

    def __iter__(self) -> Iterator[Example]:
        wanted = iter(self._known())
        row = next(wanted, None)
        if row is None:
            return
        for found, example in self._stream.examples(int(row)):
            if found != row:
                continue
            yield example()
            if (row := next(wanted, None)) is None:
                return
        raise self._ended()

    def _ended(self) -> DataError:
        return DataError(
            f"{self._stream.where}: expected {int(self._known()[-1]) + 1} images, but the stream "
            "ended before; --limit says how many to take."
        )

    def take(self, positions: Sequence[int]) -> StreamedExamples:
        """Those at the positions.

        Raises:
            DataError: the positions do not ascend: a stream comes in its own order.
        """
        at = np.asarray(positions, dtype=np.int64).reshape(-1)
        if (np.diff(at) <= 0).any():
            raise DataError(f"{self._stream.where}: expected positions that ascend, of a stream.")
        return StreamedExamples(self._stream, np.asarray(self._known())[at])

    def changed(self, change: Change) -> StreamedExamples:
        """The same, with images that ``change`` makes of what loads them."""
        return StreamedExamples(ChangedStream(self._stream, change), self._rows)

    def first(self, n: int | None) -> StreamedExamples:
        """The first n, or all if None or if there are fewer."""
        if n is None:
            return self
        rows = range(n) if self._rows is None else self._rows[:n]
        return StreamedExamples(self._stream, rows)

    def _known(self) -> Sequence[int]:
        if self._rows is None:
            raise DataError(
                f"{self._stream.where}: nobody says how many images this stream has; "
                "--limit N takes the first N."
            )
        return self._rows


def row_id(row: int) -> str:
    """The id of an image that has none but its row."""
    return f"{row:08d}"
