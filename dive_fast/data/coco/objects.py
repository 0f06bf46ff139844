"""The annotations of a file: what is usable becomes objects, the rest problems."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dive_fast.core.numbers import is_number
from dive_fast.data.coco.frames import ROUNDING, check_frame
from dive_fast.data.coco.ids import Id, as_id
from dive_fast.data.coco.problems import Problems, short
from dive_fast.errors import DataError

LONGEST = 2**31 - 1  # pixels of a side or a coordinate that a file may state
_THIN = 1e-6  # of the image's side: less is no size, and could vanish in float32


@dataclass(frozen=True)
class Entry:
    """An image as the file describes it."""

    id: Id
    size: tuple[int, int]
    file_name: object

    def __str__(self) -> str:
        if not isinstance(self.file_name, str):
            return f"image {short(self.id)}"
        plain = self.file_name.isprintable() and len(self.file_name) <= 60
        return f"image {short(self.id)} ({self.file_name if plain else short(self.file_name)})"


class Object(NamedTuple):
    """One annotation: ``box`` is xyxy, cut at the border."""

    box: tuple[float, float, float, float]
    class_id: int
    crowd: bool
    bbox: tuple[float, float, float, float]
    area: float


def read_objects(
    path: Path,
    annotations: list,
    entries: Mapping[Id, Entry],
    classes: Mapping[Id, int],
    problems: Problems,
) -> Mapping[Id, list[Object]]:
    """The usable annotations by image, in the file's order.

    Raises:
        DataError: there are annotations and not one is usable, or their boxes are in another frame.
    """
    _check_frame(path, annotations, entries, problems)
    found: defaultdict[Id, list[Object]] = defaultdict(list)
    bad, seen = Problems(problems.source), set()
    for position, annotation in enumerate(annotations):
        if not isinstance(annotation, dict):
            bad.add(
                "no object",
                f"entry {position} of annotations: expected an object, got {short(annotation)}; "
                "left out",
            )
            continue
        name = f"annotation {short(annotation.get('id', f'at position {position}'))}"
        entry = _entry(name, annotation.get("image_id"), entries, bad)
        if entry is None:
            continue
        name = f"{name} of {entry}"
        category = as_id(annotation.get("category_id"))
        if category not in classes:
            what = _unknown(annotation.get("category_id"), classes)
            bad.add("unknown category", f"{name}: unknown category {what}; left out")
            continue
        box = _cut_box(name, annotation.get("bbox"), entry.size, bad)
        if box is None:
            continue
        if (number := as_id(annotation.get("id"))) in seen:
            bad.add("repeated annotation", f"{name}: this id occurs again; all of them count")
        elif number is not None:
            seen.add(number)
        bbox = tuple(map(float, annotation["bbox"]))
        crowd, area = _crowd(name, annotation, bad), _area(name, annotation, bad)
        area = bbox[2] * bbox[3] if area is None else area
        found[entry.id].append(Object(box, classes[category], crowd, bbox, area))
    if annotations and not found:
        raise DataError(
            f"{path}: expected usable annotations, got none of {len(annotations):,}{bad.first()}."
        )
    problems.extend(bad)
    return found


def _check_frame(
    path: Path, annotations: list, entries: Mapping[Id, Entry], problems: Problems
) -> None:
    boxes, sizes = [], []
    for annotation in annotations:
        if not isinstance(annotation, dict) or not _is_box(annotation.get("bbox")):
            continue
        entry = entries.get(as_id(annotation.get("image_id")))
        if entry is not None:
            boxes.append(annotation["bbox"])
            sizes.append(entry.size)
    if boxes:
        word = check_frame(path, np.array(boxes, dtype=np.float64), np.array(sizes))
        if word is not None:
            problems.add("frame", word, whole_file=True)


def _entry(
    name: str, value: object, entries: Mapping[Id, Entry], problems: Problems
) -> Entry | None:
    number = as_id(value)
    if number in entries:
        return entries[number]
    what = _unknown(value, entries)
    problems.add("unknown image", f"{name}: there is no usable image {what}; left out")
    return None


def _unknown(value: object, known: Collection[Id]) -> str:
    """An id for a sentence; where the number is known for a text, or the text for a number, so."""
    number = as_id(value)
    if isinstance(number, str) and len(number) < 20 and number.isdecimal():
        other: Id = int(number)
    else:
        other = short(number)
    hint = f" (there is {short(other)}, which is another id)" if other in known else ""
    return short(value) + hint


def _crowd(name: str, annotation: dict, problems: Problems) -> bool:
    value = annotation.get("iscrowd")
    if value in (1, "1"):  # and 1.0 and True
        return True
    if value not in (0, "0", None):
        problems.add(
            "no crowd", f"{name}: expected 0 or 1 as iscrowd, got {short(value)}; taken for 0"
        )
    return False


def _area(name: str, annotation: dict, problems: Problems) -> float | None:
    value = annotation.get("area")
    if is_number(value, 0):
        return float(value)
    if value is not None:
        problems.add(
            "no area",
            f"{name}: expected an area of at least 0, got {short(value)}; that of its box counts",
        )
    return None


def _is_box(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 4
        and all(is_number(number) and abs(number) <= LONGEST for number in value)
    )


def _cut_box(
    name: str, bbox: object, size: tuple[int, int], problems: Problems
) -> tuple[float, float, float, float] | None:
    """xyxy, cut at the image's border, or None for a box that is left out."""
    if not _is_box(bbox):
        problems.add(
            "no box",
            f"{name}: expected a box of four numbers [left, top, width, height], got "
            f"{short(bbox)}; left out",
        )
        return None
    left, top, width, height = map(float, bbox)
    if _too_thin(width, height, size):
        problems.add(
            "no size",
            f"{name}: expected a box of some size, got {width:g} x {height:g}; left out",
        )
        return None
    right, bottom = left + width, top + height
    where = f"the box ({left:g}, {top:g}, {right:g}, {bottom:g})"
    cut = max(left, 0.0), max(top, 0.0), min(right, size[0]), min(bottom, size[1])
    if _too_thin(cut[2] - cut[0], cut[3] - cut[1], size):
        problems.add(
            "outside",
            f"{name}: {where} lies outside the image of {size[0]} x {size[1]} pixels; left out",
        )
        return None
    if max(abs(a - b) for a, b in zip(cut, (left, top, right, bottom), strict=True)) > ROUNDING:
        problems.add(
            "cut",
            f"{name}: {where} reaches out of the image of {size[0]} x {size[1]} pixels; cut at "
            "its border",
        )
    return cut


def _too_thin(width: float, height: float, size: tuple[int, int]) -> bool:
    return width <= _THIN * size[0] or height <= _THIN * size[1]
