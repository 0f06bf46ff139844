"""Reads COCO annotation files; bad entries are left out and named."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dive_fast.core.numbers import is_number, is_whole
from dive_fast.data.coco.dataset import CocoDataset, CocoImage
from dive_fast.errors import DataError

_THIN = 1e-6  # of the image's side: less is no size, and could vanish in float32
_LONGEST = 2**31 - 1  # pixels of a side that a file may state
_ROUNDING = 1.0  # pixels that a box may reach over the border unmentioned: annotation tools round


def read_coco(
    annotations: str | os.PathLike[str], images: str | os.PathLike[str] | None = None
) -> CocoDataset:
    """Read an annotation file of COCO's object detection task.

    Left out, each with a sentence in ``problems``: images without a usable id or size; boxes of
    unknown images or categories, without area, not of four finite numbers, or outside their image.
    A box that reaches over the border is cut there. An image whose file is missing keeps its
    boxes and has no ``path``.

    Args:
        annotations: the JSON file.
        images: the folder of the images; None reads the boxes alone.

    Raises:
        DataError: the file or the folder cannot be used at all: missing, not JSON, without the
            lists of a COCO file, without a usable category or image, or none of the images is
            in the folder.
    """
    path = Path(annotations)
    content = _read_json(path)
    for key in ("images", "annotations", "categories"):
        if not isinstance(content.get(key), list):
            raise DataError(
                f"{path}: expected a COCO annotation file with the lists images, annotations and "
                f"categories, got one without {key}."
            )
    problems: list[str] = []
    names, category_ids = _categories(path, content["categories"])
    entries = _image_entries(content["images"], problems)
    if not entries:
        reason = f" ({problems[0]})" if problems else ""
        raise DataError(f"{path}: expected at least one usable image, got none{reason}.")
    paths = _find_files(path, entries, None if images is None else Path(images), problems)
    classes = {number: index for index, number in enumerate(category_ids)}
    objects = _objects(content["annotations"], entries, classes, problems)
    return CocoDataset(
        names=names,
        category_ids=category_ids,
        images=tuple(
            _coco_image(entry, paths[number], objects[number]) for number, entry in entries.items()
        ),
        source=path.name,
        problems=tuple(f"{path.name}: {problem}." for problem in problems),
    )


@dataclass(frozen=True)
class _Entry:
    id: int
    size: tuple[int, int]
    file_name: object

    def __str__(self) -> str:
        named = f" ({self.file_name})" if isinstance(self.file_name, str) else ""
        return f"image {self.id}{named}"


class _Object(NamedTuple):
    """One annotation: ``box`` is xyxy, cut at the border."""

    box: tuple[float, float, float, float]
    class_id: int
    crowd: bool
    bbox: tuple[float, float, float, float]
    area: float


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes().decode())
    except FileNotFoundError as error:
        raise DataError(f"{path}: expected an annotation file, but nothing is there.") from error
    except IsADirectoryError as error:
        raise DataError(f"{path}: expected an annotation file, got a directory.") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}).") from error
    except (ValueError, RecursionError) as error:  # ValueError: no UTF-8, no JSON, a NUL in a name
        raise DataError(f"{path}: expected a JSON file ({str(error).rstrip('.')}).") from error
    if not isinstance(content, dict):
        raise DataError(
            f"{path}: expected a COCO annotation file, a JSON object, got a "
            f"{type(content).__name__}."
        )
    return content


def _categories(path: Path, entries: list) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Without its categories a file means nothing, so a bad one is no single problem."""
    for entry in entries:
        good = isinstance(entry, dict) and is_whole(entry.get("id"))
        if not (good and isinstance(entry.get("name"), str)):
            raise DataError(
                f"{path}: expected categories with a whole number as id and a name, got "
                f"{_short(entry)}."
            )
    if not entries:
        raise DataError(f"{path}: expected at least one category, got none.")
    return tuple(e["name"] for e in entries), tuple(e["id"] for e in entries)


def _image_entries(entries: list, problems: list[str]) -> dict[int, _Entry]:
    found: dict[int, _Entry] = {}
    for position, entry in enumerate(entries):
        number = entry.get("id") if isinstance(entry, dict) else None
        if not is_whole(number):
            problems.append(
                f"entry {position} of images: expected a whole number as id, got {_short(number)}; "
                "left out"
            )
            continue
        size = entry.get("width"), entry.get("height")
        if not all(is_whole(side, 1) and side <= _LONGEST for side in size):
            problems.append(
                f"image {number}: expected a width and a height in pixels, got {_short(size[0])} "
                f"and {_short(size[1])}; left out with its boxes"
            )
        elif number in found:
            problems.append(f"image {number}: this id occurs again; the first counts")
        else:
            found[number] = _Entry(number, size, entry.get("file_name"))
    return found


def _find_files(
    path: Path, entries: dict[int, _Entry], folder: Path | None, problems: list[str]
) -> dict[int, Path | None]:
    if folder is None:
        return dict.fromkeys(entries)
    if not folder.is_dir():
        raise DataError(f"{folder}: expected the folder of the images, but there is none.")
    found: dict[int, Path | None] = {}
    for number, entry in entries.items():
        found[number] = None
        if not isinstance(entry.file_name, str) or not entry.file_name:
            problems.append(f"{entry}: expected a file_name, got {_short(entry.file_name)}")
        elif _exists(folder / entry.file_name):
            found[number] = folder / entry.file_name
        else:
            problems.append(f"{entry}: the file is not in {folder}")
    if not any(found.values()):
        first = next(iter(entries.values()))
        raise DataError(
            f"{folder}: expected the images of {path.name}, got none of {len(entries)}; the "
            f"first would be {_short(first.file_name)}."
        )
    return found


def _objects(
    annotations: list, entries: dict[int, _Entry], classes: dict[int, int], problems: list[str]
) -> defaultdict[int, list[_Object]]:
    """The usable annotations by image, in the file's order."""
    found: defaultdict[int, list[_Object]] = defaultdict(list)
    for position, annotation in enumerate(annotations):
        if not isinstance(annotation, dict):
            problems.append(
                f"entry {position} of annotations: expected an object, got {_short(annotation)}; "
                "left out"
            )
            continue
        name = f"annotation {_short(annotation.get('id', f'at position {position}'))}"
        number, category = annotation.get("image_id"), annotation.get("category_id")
        if not is_whole(number) or number not in entries:
            problems.append(f"{name}: there is no usable image {_short(number)}; left out")
            continue
        name = f"{name} of {entries[number]}"
        if not is_whole(category) or category not in classes:
            problems.append(f"{name}: unknown category {_short(category)}; left out")
            continue
        box = _cut_box(name, annotation.get("bbox"), entries[number].size, problems)
        if box is not None:
            left, top, width, height = bbox = tuple(map(float, annotation["bbox"]))
            area = annotation.get("area")
            found[number].append(
                _Object(
                    box=box,
                    class_id=classes[category],
                    crowd=annotation.get("iscrowd") in (1, "1"),
                    bbox=bbox,
                    area=float(area) if is_number(area, 0) else width * height,
                )
            )
    return found


def _cut_box(
    name: str, bbox: object, size: tuple[int, int], problems: list[str]
) -> tuple[float, float, float, float] | None:
    """xyxy, cut at the image's border, or None for a box that is left out."""
    if not isinstance(bbox, list) or len(bbox) != 4 or not all(map(is_number, bbox)):
        problems.append(
            f"{name}: expected a box of four numbers [left, top, width, height], got "
            f"{_short(bbox)}; left out"
        )
        return None
    left, top, width, height = map(float, bbox)
    if _too_thin(width, height, size):
        problems.append(
            f"{name}: expected a box of some size, got {width:g} x {height:g}; left out"
        )
        return None
    right, bottom = left + width, top + height
    where = f"the box ({left:g}, {top:g}, {right:g}, {bottom:g})"
    cut = max(left, 0.0), max(top, 0.0), min(right, size[0]), min(bottom, size[1])
    if _too_thin(cut[2] - cut[0], cut[3] - cut[1], size):
        problems.append(
            f"{name}: {where} lies outside the image of {size[0]} x {size[1]} pixels; left out"
        )
        return None
    if max(abs(a - b) for a, b in zip(cut, (left, top, right, bottom), strict=True)) > _ROUNDING:
        problems.append(
            f"{name}: {where} reaches out of the image of {size[0]} x {size[1]} pixels; cut at "
            "its border"
        )
    return cut


def _too_thin(width: float, height: float, size: tuple[int, int]) -> bool:
    return width <= _THIN * size[0] or height <= _THIN * size[1]


def _coco_image(entry: _Entry, path: Path | None, objects: list[_Object]) -> CocoImage:
    return CocoImage(
        id=entry.id,
        path=path,
        size=entry.size,
        boxes=torch.tensor([o.box for o in objects], dtype=torch.float32).reshape(-1, 4),
        class_ids=torch.tensor([o.class_id for o in objects], dtype=torch.int64),
        crowd=torch.tensor([o.crowd for o in objects], dtype=torch.bool),
        bbox=torch.tensor([o.bbox for o in objects], dtype=torch.float64).reshape(-1, 4),
        area=torch.tensor([o.area for o in objects], dtype=torch.float64),
    )


def _exists(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name too long, or with a NUL
        return False


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
