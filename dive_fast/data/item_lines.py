"""Files of items: a JSON object a line, an image with candidate texts each."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from dive_fast.data.image_files import read_image
from dive_fast.errors import DataError, shown

_KEYS = ("id", "image", "candidates", "mask")


@dataclass(frozen=True)
class ItemLine:
    """An image that wants one of its own candidates.

    Attributes:
        id: of its record.
        image: where it lies.
        candidates: two texts or more, as the line has them.
        mask: where the picture lies that says what its pixels count; None where all count alike.
        line: the item as its file has it, in one form of JSON: wherever the file lies.
    """

    id: str
    image: Path
    candidates: tuple[str, ...]
    mask: Path | None
    line: str

    def read(self) -> tuple[Image.Image, tuple[str, ...], Image.Image | None]:
        """The image, its candidates, and its mask.

        Raises:
            ImageError: a file cannot be read.
        """
        mask = None if self.mask is None else read_image(self.mask)
        return read_image(self.image), self.candidates, mask


def read_item_lines(path: str | os.PathLike[str]) -> list[ItemLine]:
    """The items of a file; relative paths begin where it lies.

    Raises:
        DataError: it cannot be read or has no items; a line is no item; or two have the same id.
    """
    path, items, lines_of = Path(path), [], {}
    for number, line in _lines(path):
        where = f"{path}: line {number}"
        item = _item(where, line, path.parent)
        if item.id in lines_of:
            raise DataError(
                f"{where}: the id {shown(item.id)} is that of line {lines_of[item.id]}."
            )
        lines_of[item.id] = number
        items.append(item)
    if not items:
        raise DataError(f"{path}: expected items, a JSON object a line, got none.")
    return items


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Those that are not blank, counted from 1."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}).") from error
    except ValueError as error:  # bytes that are no UTF-8, or a NUL in the name
        raise DataError(f"{path}: expected a text file in UTF-8, got something else.") from error
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, line


def _item(where: str, line: str, folder: Path) -> ItemLine:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        entry = None
    if not isinstance(entry, Mapping):
        raise DataError(f"{where}: expected a JSON object, got {shown(line.strip())}.")
    if unknown := [key for key in entry if key not in _KEYS]:
        raise DataError(
            f"{where}: expected no keys but {', '.join(_KEYS)}, got {shown(unknown[0])}."
        )
    for key in ("id", "image"):
        _expect_text(where, key, entry.get(key))
    if entry.get("mask") is not None:
        _expect_text(where, "mask", entry["mask"])
    candidates = entry.get("candidates")
    texts = isinstance(candidates, list) and all(isinstance(text, str) for text in candidates)
    if not texts or len(candidates) < 2:
        raise DataError(
            f"{where}: expected 'candidates' as a list of two texts or more, got "
            f"{shown(candidates)}."
        )
    mask = None if entry.get("mask") is None else folder / entry["mask"]
    same = json.dumps(entry, sort_keys=True)
    return ItemLine(entry["id"], folder / entry["image"], tuple(candidates), mask, same)


def _expect_text(where: str, key: str, value: Any) -> None:
    if not isinstance(value, str) or not value.strip():
        raise DataError(
            f"{where}: expected {key!r} as a text that is not empty, got {shown(value)}."
        )
