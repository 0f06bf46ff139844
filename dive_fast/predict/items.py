"""Texts and items as callers give them, and how many are looked at together."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dive_fast.errors import DiveFastError, shown

# Items whose texts are encoded together and whose rows share batches: enough that the last ones of
# a chunk, which leave batches half empty, do not matter, and the first answer does not wait long.
CHUNK_ITEMS = 64
# Of the float32 conditions that are held at a time, 1 GiB; one item may need more.
CHUNK_BYTES = 1 << 30


@dataclass(frozen=True)
class Item:
    """An image and its candidates, or why it cannot be used."""

    key: Any
    image: Any = None
    candidates: tuple[str, ...] = ()
    pixel_weights: Any = None
    error: DiveFastError | None = None


def as_texts(given: Any, at_least: int = 1) -> tuple[str, ...]:
    """Texts that are not empty; a single one is a list of it.

    Raises:
        DiveFastError: they are none, or too few.
    """
    given = [given] if isinstance(given, str) else given
    if not isinstance(given, Sequence) or isinstance(given, bytes):
        raise DiveFastError(f"expected texts as a list, got {shown(given)}.")
    if len(given) < at_least:
        raise DiveFastError(f"expected at least {at_least} texts, got {len(given)}.")
    for text in given:
        if not isinstance(text, str) or not text.strip() or not _is_writable(text):
            raise DiveFastError(f"expected texts that are not empty, got {shown(text)}.")
    return tuple(given)


def as_items(given: Any) -> Iterator[Item]:
    """Items of a stream one by one; what is wrong with its texts stands in the item.

    Raises:
        DiveFastError: it is no iterable of (key, image, texts) or (key, image, texts,
            pixel_weights), or a key cannot be one.
    """
    expected = "expected items as (key, image, texts) or (key, image, texts, pixel_weights)"
    if isinstance(given, str | torch.Tensor) or not isinstance(given, Iterable):
        raise DiveFastError(f"{expected}, got {shown(given)}.")
    for entry in given:
        if not isinstance(entry, tuple | list) or len(entry) not in (3, 4):
            raise DiveFastError(f"{expected}, got {shown(entry)}.")
        key, image, texts, *weights = entry
        if not isinstance(key, Hashable):
            raise DiveFastError(f"{expected}, got a {type(key).__name__} as key.")
        try:
            candidates = as_candidates(texts)
        except DiveFastError as error:
            yield Item(key, error=error)
        else:
            yield Item(key, image, candidates, weights[0] if weights else None)


def as_candidates(given: Any) -> tuple[str, ...]:
    """Two or more different texts.

    Raises:
        DiveFastError: they are not.
    """
    candidates = as_texts(given, at_least=2)
    seen: set[str] = set()
    for text in candidates:
        if text in seen:
            raise DiveFastError(f"expected candidates that differ, got {shown(text)} twice.")
        seen.add(text)
    return candidates


def in_chunks(items: Iterable[Item], dim: int) -> Iterator[list[Item]]:
    """Items in their order, as many together as their distinct texts leave room for.

    Args:
        dim: of a text's condition.
    """
    most, chunk, texts = texts_at_once(dim), [], set()
    for item in items:
        more = texts.union(item.candidates)
        if chunk and (len(chunk) == CHUNK_ITEMS or len(more) > most):
            yield chunk
            chunk, more = [], set(item.candidates)
        chunk.append(item)
        texts = more
    if chunk:
        yield chunk


def texts_at_once(dim: int) -> int:
    """How many texts' conditions of ``dim`` values are held together."""
    return max(1, CHUNK_BYTES // (torch.float32.itemsize * dim))


def _is_writable(text: str) -> bool:
    """Tokenizers take no halves of surrogate pairs."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
