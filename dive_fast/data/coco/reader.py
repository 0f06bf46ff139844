"""Reads COCO annotation files; bad entries are left out and named."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch

from dive_fast.core.numbers import is_number
from dive_fast.data.coco.categories import read_categories
from dive_fast.data.coco.content import read_content
from dive_fast.data.coco.dataset import CocoDataset, CocoImage
from dive_fast.data.coco.files import find_files
from dive_fast.data.coco.ids import Id, as_id
from dive_fast.data.coco.objects import LONGEST, Entry, Object, read_objects
from dive_fast.data.coco.problems import Problems, short
from dive_fast.errors import DataError


def read_coco(
    annotations: str | os.PathLike[str], images: str | os.PathLike[str] | None = None
) -> CocoDataset:
    """Read an annotation file of COCO's object detection task.

    Left out, each with a sentence in ``problems``: images without a usable id or size; boxes of
    unknown images or categories, without area, not of four finite numbers, or outside their image.
    A box that reaches over the border is cut there. An image whose file is missing keeps its
    boxes and has no ``path``.

    Ids are whole numbers or texts, compared by value as pycocotools does. A file without any
    annotation is read; ``CocoDataset.expect_objects`` refuses it where objects are needed.

    Args:
        annotations: the JSON file.
        images: the folder of the images; None reads the boxes alone. Nothing outside is read.

    Raises:
        DataError: the file or the folder cannot be used at all: missing, not JSON, without the
            lists of a COCO file, without a usable category or image, with annotations of which
            none is usable, with boxes in another frame (fractions, corners, centres), with two
            images or categories of one name or id, or none of the images is in the folder.
    """
    path = Path(annotations)
    content = read_content(path)
    problems = Problems(path.name)
    names = read_categories(path, content["categories"], content["annotations"], problems)
    entries = _image_entries(path, content["images"], problems)
    paths = _paths(path, entries, None if images is None else Path(images), problems)
    classes = {number: index for index, number in enumerate(names)}
    objects = read_objects(path, content["annotations"], entries, classes, problems)
    return CocoDataset(
        names=tuple(names.values()),
        category_ids=tuple(names),
        images=tuple(
            _coco_image(entry, paths[number], objects.get(number, []))
            for number, entry in entries.items()
        ),
        source=path.name,
        notes=tuple(problems),
        where={
            name: os.path.abspath(given)
            for name, given in (("annotations", annotations), ("images", images))
            if given is not None
        },
    )


def _image_entries(path: Path, entries: list, problems: Problems) -> dict[Id, Entry]:
    found: dict[Id, Entry] = {}
    bad, twice = Problems(problems.source), set()
    for position, entry in enumerate(entries):
        value = entry.get("id") if isinstance(entry, dict) else None
        if (number := as_id(value)) is None:
            bad.add(
                "image without id",
                f"entry {position} of images: expected a whole number or a text as id, got "
                f"{short(value)}; left out",
            )
            continue
        size = _size(entry)
        if size is None:
            width, height = short(entry.get("width")), short(entry.get("height"))
            bad.add(
                "image without size",
                f"image {short(number)}: expected a width and a height in pixels, got {width} and "
                f"{height}; left out with its boxes",
            )
        elif number not in found:
            found[number] = Entry(number, size, entry.get("file_name"))
        elif entry.get("file_name") in (None, found[number].file_name):
            bad.add("image twice", f"image {short(number)}: this id occurs again; the first counts")
        else:
            twice.add(number)
            name = short(entry.get("file_name"))
            bad.add(
                "two images of one id",
                f"{found[number]}: {name} has this id too, so that its boxes may be of either; "
                "left out with its boxes",
            )
    found = {number: entry for number, entry in found.items() if number not in twice}
    if not found:
        raise DataError(f"{path}: expected at least one usable image, got none{bad.first()}.")
    problems.extend(bad)
    return found


def _size(entry: dict) -> tuple[int, int] | None:
    """Width and height; whole floats are taken, texts are not."""
    size = entry.get("width"), entry.get("height")
    if not all(is_number(side, 1) and side <= LONGEST and side == int(side) for side in size):
        return None
    return int(size[0]), int(size[1])


def _paths(
    path: Path, entries: Mapping[Id, Entry], folder: Path | None, problems: Problems
) -> dict[Id, Path | None]:
    if folder is None:
        return dict.fromkeys(entries)
    if not folder.is_dir():
        raise DataError(f"{folder}: expected the folder of the images, but there is none.")
    names = {
        number: entry.file_name
        for number, entry in entries.items()
        if isinstance(entry.file_name, str) and entry.file_name
    }
    found = find_files(names, folder)
    if not any(found.paths.values()):
        first = next(iter(entries.values()))
        raise DataError(
            f"{folder}: expected the images of {path.name}, got none of {len(entries)}; the "
            f"first would be {short(first.file_name)}."
        )
    if found.dropped:
        problems.add(
            "dropped folders",
            f"all file names begin with {short(found.dropped)}, which is not in {folder}; they "
            "are taken without it",
            whole_file=True,
        )
    owners: dict[Path, Entry] = {}
    for number, entry in entries.items():
        there = found.paths.get(number)
        if number not in names:
            problems.add(
                "no file name", f"{entry}: expected a file_name, got {short(entry.file_name)}"
            )
        elif number in found.outside:
            problems.add(
                "outside the folder", f"{entry}: the name leads out of {folder}; it is not read"
            )
        elif there is None:
            problems.add("missing file", f"{entry}: the file is not in {folder}")
        elif there in owners:
            problems.add("one file twice", f"{entry}: its file is that of {owners[there]} too")
        else:
            owners[there] = entry
    return {number: found.paths.get(number) for number in entries}


def _coco_image(entry: Entry, path: Path | None, objects: list[Object]) -> CocoImage:
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
