"""What a data set is: ids and labels in memory, and everything else when it is asked for."""

from __future__ import annotations

import hashlib
import json
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol, TypeAlias, overload

import numpy as np
from PIL import Image

Fact: TypeAlias = str | int | float | bool
Picture: TypeAlias = Image.Image | np.ndarray
# Of what loads an image, and its id, another image; it pickles.
Change: TypeAlias = Callable[[Callable[[], Picture], str], Picture]

NO_FACTS: Mapping[str, Fact] = {}


@dataclass(frozen=True)
class Example:
    """One labelled image.

    Attributes:
        id: unique in its data set and the same in every run.
        label: index of the true class among the model's classes.
        load: reads the image: a PIL image, or an array [h, w] or [h, w, c]; raises
            ``ImageError`` where it cannot.
        facts: what else the data say of the image, by column.
    """

    id: str
    label: int
    load: Callable[[], Picture]
    facts: Mapping[str, Fact] = field(default_factory=dict)


class Pictures(Protocol):
    """Where the images of a data set lie. It pickles, and holds as little per image as it can."""

    def loader(self, row: int, example_id: str) -> Callable[[], Picture]:
        """What ``Example.load`` is, for an image by its row among all that lie there."""
        ...

    def facts(self, row: int, example_id: str) -> Mapping[str, Fact]:
        """What ``Example.facts`` is."""
        ...


@dataclass(frozen=True)
class ChangedPictures:
    """Pictures of which ``change`` makes others when they are loaded."""

    pictures: Pictures
    change: Change

    def loader(self, row: int, example_id: str) -> Callable[[], Picture]:
        return partial(self.change, self.pictures.loader(row, example_id), example_id)

    def facts(self, row: int, example_id: str) -> Mapping[str, Fact]:
        return self.pictures.facts(row, example_id)


class LazyExamples(ABC):
    """Examples that are made when they are gone through.

    Attributes:
        ids: of all, in order.
        labels: int64 [n], or None where they are known only then.
    """

    ids: Sequence[str]
    labels: np.ndarray | None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __iter__(self) -> Iterator[Example]: ...

    @abstractmethod
    def take(self, positions: Sequence[int]) -> LazyExamples:
        """Those at the positions."""

    @abstractmethod
    def changed(self, change: Change) -> LazyExamples:
        """The same, with images that ``change`` makes of what loads them."""


class Examples(LazyExamples, Sequence[Example]):
    """Examples that are made when they are indexed or iterated: only ids and labels are held.

    Args:
        ids: one per example, each once.
        labels: integers [n].
        pictures: where the images lie.
        rows: integers [n], where each example's image is among them; None if it is its position.
    """

    def __init__(
        self,
        ids: Sequence[str],
        labels: np.ndarray,
        pictures: Pictures,
        rows: np.ndarray | None = None,
    ) -> None:
        self.ids = ids
        self.labels = np.asarray(labels, dtype=np.int64)
        self._pictures = pictures
        self._rows = rows

    def __len__(self) -> int:
        return len(self.ids)

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> Examples: ...

    def __getitem__(self, index: int | slice) -> Example | Examples:
        if isinstance(index, slice):
            return self.take(range(len(self))[index])
        position = range(len(self))[operator.index(index)]
        row = position if self._rows is None else int(self._rows[position])
        name = self.ids[position]
        load, facts = self._pictures.loader(row, name), self._pictures.facts(row, name)
        return Example(name, int(self.labels[position]), load, facts)

    def __iter__(self) -> Iterator[Example]:
        return (self[position] for position in range(len(self)))

    def take(self, positions: Sequence[int]) -> Examples:
        """Those at the positions, in their order."""
        at = np.asarray(positions, dtype=np.int64).reshape(-1)
        rows = at if self._rows is None else self._rows[at]
        return Examples([self.ids[i] for i in at.tolist()], self.labels[at], self._pictures, rows)

    def changed(self, change: Change) -> Examples:
        """The same, with images that ``change`` makes of what loads them."""
        return Examples(self.ids, self.labels, ChangedPictures(self._pictures, change), self._rows)


@dataclass(frozen=True)
class DataSet:
    """Labelled images.

    Attributes:
        name: ``"digits"``, or the name of the folder or file.
        examples: the images with their labels; those that ``open_dataset`` gives are made when
            they are indexed or iterated. Those of a stream (``streams.StreamedExamples``) are best
            iterated.
        names: what the data itself calls its classes, or None if it only has numbers.
        content: digest of the source's content (pixels for arrays; paths and sizes for files).
        where: what ``open_dataset`` was given, paths made absolute; None for data of another
            origin. It is no part of the identity.
        corruption: what ``corrupted`` did to the images, for JSON; None of clean ones.
    """

    name: str
    examples: Sequence[Example]
    names: tuple[str, ...] | None
    content: str = ""
    where: str | None = None
    corruption: Mapping[str, Any] | None = None

    @property
    def ids(self) -> Sequence[str]:
        """The ids of all examples, none of which is made for it."""
        if isinstance(self.examples, LazyExamples):
            return self.examples.ids
        return [example.id for example in self.examples]

    @property
    def labels(self) -> np.ndarray | None:
        """The labels of all examples, int64 [n], none of which is made for it.

        None of a stream, where an example's label is known when its turn has come.
        """
        if isinstance(self.examples, LazyExamples):
            return self.examples.labels
        return np.array([example.label for example in self.examples], dtype=np.int64)

    def take(self, positions: Sequence[int]) -> DataSet:
        """The examples at these positions, in the order given.

        Raises:
            IndexError: there is no such position.
        """
        if isinstance(self.examples, LazyExamples):
            return replace(self, examples=self.examples.take(positions))
        return replace(self, examples=[self.examples[i] for i in positions])

    def identity(self) -> dict[str, Any]:
        """What tells this data set from another, for JSON: source, count, fingerprint.

        The fingerprint covers the content and the ids and labels chosen from it, not where the
        data lies, so a run resumes after the data were moved. Of corrupted images the corruption is
        told, too.
        """
        chosen = hashlib.sha256(f"[{json.dumps(self.content)}, ".encode())
        labels = self.labels
        known = [None] * len(self.examples) if labels is None else labels.tolist()
        _add_rows(chosen, zip(self.ids, known, strict=True))
        chosen.update(b"]")
        return {
            "source": self.name,
            "count": len(self.examples),
            "fingerprint": chosen.hexdigest()[:16],
            **({} if self.corruption is None else {"corruption": dict(self.corruption)}),
        }


def rows_digest(rows: Iterable[Sequence[Any]]) -> str:
    """SHA-256 of rows as one JSON list, which is never whole in memory."""
    digest = hashlib.sha256()
    _add_rows(digest, rows)
    return digest.hexdigest()


def _add_rows(digest: Any, rows: Iterable[Sequence[Any]]) -> None:
    digest.update(b"[")
    for number, row in enumerate(rows):
        digest.update(f"{', ' if number else ''}{json.dumps(row)}".encode())
    digest.update(b"]")
