"""Images in, one record each out: what ``classify``, ``detect`` and ``evaluate`` do alike.

What has a record is not computed again. An image that cannot be read is recorded with its error,
and the rest go on. docs/records.md says what a record holds.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Protocol

from tqdm import tqdm

from dive_fast.core.threads import choose_again
from dive_fast.data.reading import read_ahead
from dive_fast.errors import ImageError
from dive_fast.evaluation.encoding import Encode, encoded

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """An image that wants an answer.

    Attributes:
        id: of its record; each once in a run.
        read: gives the image as the stream takes it; raises ``ImageError`` where it cannot.
        facts: what the record says beside the answer, such as ``truth``.
        name: what a sentence on it calls it; None where somebody else tells its error.
    """

    id: str
    read: Callable[[], Any]
    facts: Mapping[str, Any] = field(default_factory=dict)
    name: str | None = None


class Records(Protocol):
    """Where records go: a ``RunDirectory``, or what prints them."""

    def finished(self, record_id: str) -> bool:
        """Whether there is an answer of that id already."""
        ...

    def append(self, record: Mapping[str, Any]) -> None:
        """Takes one more record: with "error", or with an answer."""
        ...


def as_record(source_id: str, answer: Any, image: Any) -> Mapping[str, Any]:
    """A ``Classification`` or ``Detections`` for JSON."""
    return answer.to_dict()


def run_over(
    sources: Iterable[Source],
    stream: Callable[[Iterable[tuple[str, Any]]], Iterable[tuple[str, Any]]],
    records: Records,
    *,
    progress: bool = False,
    total: int | None = None,
    record: Callable[[str, Any, Any], Mapping[str, Any]] = as_record,
    readers: int | None = 0,
    shared: Sequence[object] = (),
    ahead: int = 8,
    encode: Encode | None = None,
    at_once: int = 1,
) -> None:
    """Reads the images in their order, and appends a record of each as soon as it is known.

    Args:
        sources: the images, gone through once: none is kept but those on their way.
        stream: takes (id, image) one by one, yields (id, answer) in any order.
        records: where they go. Sources that are finished there are left out.
        progress: show a bar.
        total: how many sources there are, for the bar; their ``len`` if None.
        record: of an id, its answer and its image, what goes into the record.
        readers, shared, ahead: processes that read ahead, see ``read_ahead``.
        encode: makes what the stream takes of ``at_once`` images of uint8; None: they are it.
    """
    if total is None and isinstance(sources, Sized):
        total = len(sources)
    under_way: dict[str, tuple[Source, Any]] = {}  # read, but not answered yet
    with tqdm(total=total, unit="image", disable=not progress) as bar:

        def unfinished() -> Iterator[tuple[Source, Callable[[], Any]]]:
            for source in sources:
                if records.finished(source.id):
                    if progress:
                        bar.initial += 1  # computed before: it says nothing of the speed
                    bar.update()
                else:
                    yield source, source.read

        def pairs(images: Iterable[tuple[Source, Any]]) -> Iterator[tuple[str, Any]]:
            for source, image in images:
                choose_again()
                if isinstance(image, ImageError):
                    records.append(_failed(source, image))
                    bar.update()
                else:
                    under_way[source.id] = (source, image)
                    yield source.id, image

        # Closed here, so that its processes end however this ends.
        with closing(
            read_ahead(unfinished(), readers, shared=shared, ahead=ahead, total=total)
        ) as images:
            ready = images if encode is None else encoded(images, encode, at_once)
            for key, answer in stream(pairs(ready)):
                source, image = under_way.pop(key)
                records.append({"id": key, **source.facts, **record(key, answer, image)})
                bar.update()


def _failed(source: Source, error: ImageError) -> dict[str, Any]:
    """The record of an image that cannot be read, which is told."""
    if source.name is not None:
        log.warning(sentence(source.name, error))
    return {"id": source.id, **source.facts, "error": str(error)}


def sentence(name: str, error: object) -> str:
    """An error that says what it is about: most begin with the path already."""
    return str(error) if name in str(error) else f"{name}: {error}"
