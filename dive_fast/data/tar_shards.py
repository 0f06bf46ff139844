"""Labelled images in tar files, as webdataset writes them, read at random without unpacking.

The headers are read once; after that an image is ``size`` bytes at ``offset`` of its shard. Members
whose names agree up to the first dot of the file name are one sample: ``n01/0007.jpg`` and
``n01/0007.cls``.
"""

from __future__ import annotations

import functools
import glob
import itertools
import json
import logging
import os
import re
import tarfile
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from dive_fast.data.columns import Column, ColumnBuilder, facts_among
from dive_fast.data.examples import NO_FACTS, DataSet, Examples, Fact, rows_digest
from dive_fast.data.formats import IMAGE_SUFFIXES
from dive_fast.data.image_files import decode_image
from dive_fast.data.matching import label_rows, named_labels
from dive_fast.data.spec import LABEL_COLUMNS, find_column
from dive_fast.errors import DataError, ImageError, some

log = logging.getLogger(__name__)

MAX_LABEL_BYTES = 2**20
_SAMPLE = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class _Member(NamedTuple):
    offset: int
    size: int


@dataclass(frozen=True)
class TarPictures:
    """Images that are members of tar files.

    Attributes:
        shards: paths of the tar files.
        shard, offset, size: integers [n]: which file, and where in it, in bytes.
        json_offset, json_size: the same of the samples' ``.json``; size 0 where there is none.
        label: what the user called the label.
        in_json: bool [n], whether the label is an entry of the ``.json``.
    """

    shards: tuple[str, ...]
    shard: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    json_offset: np.ndarray
    json_size: np.ndarray
    in_json: np.ndarray
    label: str | None

    def loader(self, row: int, example_id: str) -> Callable[[], Image.Image]:
        path = self.shards[self.shard[row]]
        return partial(_read_member, path, int(self.offset[row]), int(self.size[row]), example_id)

    def facts(self, row: int, example_id: str) -> Mapping[str, Fact]:
        if not self.json_size[row]:
            return NO_FACTS
        path = self.shards[self.shard[row]]
        member = _Member(int(self.json_offset[row]), int(self.json_size[row]))
        try:
            with open(path, "rb") as file:
                content = _json_of(example_id, {"json": member}, file)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror or error}).") from error
        if self.in_json[row]:
            del content[find_column(example_id, list(content), LABEL_COLUMNS, self.label)]
        return facts_among(content.items())

    def __reduce__(self) -> tuple[type, tuple]:
        # Another process may work elsewhere.
        shards, *rest = (getattr(self, f.name) for f in fields(self))
        return TarPictures, (tuple(map(os.path.abspath, shards)), *rest)


class _Index(NamedTuple):
    ids: list[str]
    labels: Column
    pictures: TarPictures


def open_tar_shards(
    pattern: str, class_names: Sequence[str], options: Mapping[str, str]
) -> DataSet:
    """The samples of the tar files that a pattern means; ``open_dataset`` says which.

    Raises:
        DataError: there is no such file, one is compressed, damaged or has no samples, or a sample
            has no label, several images, or a label that the model does not know.
    """
    ids, labels, pictures = _indexed(pattern, options)
    rows = np.array(label_rows(f"wds:{pattern}", labels.values, class_names))
    return DataSet(
        name=os.path.basename(pattern.rstrip("/")),
        examples=Examples(ids, rows[labels.codes], pictures),
        names=tuple(named_labels(labels.values) or ()) or None,
        content=rows_digest(zip(ids, pictures.size.tolist(), strict=True)),
    )


def tar_shard_classes(pattern: str, options: Mapping[str, str]) -> list[str] | None:
    """The different names among the labels, sorted; None where they are numbers.

    Raises:
        DataError: as ``open_tar_shards``.
    """
    return named_labels(_indexed(pattern, options).labels.values)


def shard_paths(pattern: str) -> list[str]:
    """The tar files that a pattern means, in its order, each of them there.

    ``{000..099}`` counts, ``{a,b}`` lists, ``*``, ``?`` and ``[...]`` match names, a folder means
    the tar files in it, and ``::`` stands between patterns.

    Raises:
        DataError: there is none, or one occurs twice.
    """
    found: list[str] = []
    for part in pattern.split("::"):
        for path in expand_braces(part):
            if os.path.isdir(path):
                path = os.path.join(glob.escape(path), "*.tar")
            matches = [path] if os.path.exists(path) else sorted(glob.glob(path))
            if not matches:
                raise DataError(f"wds:{pattern}: expected tar files, but {path} is not there.")
            found += matches
    if twice := [path for i, path in enumerate(found) if path in found[:i]]:
        raise DataError(f"wds:{pattern}: expected each tar file once, got {twice[0]} twice.")
    return found


def expand_braces(pattern: str) -> list[str]:
    """As shells do: ``{08..11}`` gives 08, 09, 10, 11, and ``{a,b}`` gives a, b."""
    parts = re.split(r"\{([^{}]*)\}", pattern)
    choices = [_choices(part) if i % 2 else [part] for i, part in enumerate(parts)]
    return ["".join(chosen) for chosen in itertools.product(*choices)]


def _choices(inner: str) -> list[str]:
    if (ends := re.fullmatch(r"(\d+)\.\.(\d+)", inner)) is None:
        return inner.split(",") if "," in inner else [f"{{{inner}}}"]
    first, last = ends.groups()
    width = max(len(end) if end.startswith("0") else 0 for end in (first, last))
    step = 1 if int(first) <= int(last) else -1
    return [f"{i:0{width}d}" for i in range(int(first), int(last) + step, step)]


def _indexed(pattern: str, options: Mapping[str, str]) -> _Index:
    paths = shard_paths(pattern)
    try:
        state = tuple((path, (s := os.stat(path)).st_size, s.st_mtime_ns) for path in paths)
    except OSError as error:
        raise DataError(f"wds:{pattern}: cannot be read ({error}).") from error
    return _index(state, options.get("image"), options.get("label"))


@functools.lru_cache(maxsize=1)  # first the classes are asked for, then the images
def _index(state: tuple[tuple[str, int, int], ...], image: str | None, label: str | None) -> _Index:
    paths = [path for path, _, _ in state]
    common = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
    ids: list[str] = []
    labels = ColumnBuilder()
    # shard; offset and size of the image; of the .json; whether the label is there
    places = [array("i"), array("q"), array("q"), array("q"), array("q"), array("b")]
    without = 0
    for number, path in enumerate(paths):
        before = len(ids)
        name = Path(os.path.relpath(path, common)).as_posix()
        for key, members, file in _samples(path):
            where = f"{path}: sample {key!r}"
            if (picture := _image_of(where, members, image)) is None:
                without += 1
                continue
            truth, in_json = _label_of(where, members, file, label)
            labels.add(truth)
            described = members.get("json", _Member(0, 0))
            place = (number, *members[picture], *described, in_json)
            for values, value in zip(places, place, strict=True):
                values.append(value)
            ids.append(f"{name}/{key}")
        if len(ids) == before:
            raise DataError(f"{path}: expected samples with an image (such as .jpg), got none.")
    if without:
        log.warning("%s: left out %d samples without an image.", common, without)
    pictures = TarPictures(tuple(paths), *map(np.array, places), label)
    return _Index(ids, labels.made(), pictures)


def _samples(path: str) -> Iterator[tuple[str, dict[str, _Member], BinaryIO]]:
    """The key of every sample of a tar file, its members by their extension, and the open file."""
    samples: dict[str, dict[str, _Member]] = {}
    try:
        with open(path, "rb") as file:
            head = file.read(6)
            if kind := next((k for m, k in _COMPRESSED.items() if head.startswith(m)), None):
                raise DataError(
                    f"{path}: expected a tar file that is not compressed, got {kind}: its images "
                    "could not be read at random, so decompress it."
                )
            file.seek(0)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    tar.members.clear()  # they would all be kept
                    found = _SAMPLE.fullmatch(member.name.removeprefix("./"))
                    if not member.isreg() or found is None:
                        continue
                    key, extension = found[1], found[2].lower()
                    members = samples.setdefault(key, {})
                    if extension in members:
                        raise DataError(
                            f"{path}: expected each member once, got {member.name!r} twice."
                        )
                    members[extension] = _Member(member.offset_data, member.size)
            for key, members in samples.items():
                yield key, members, file
    except (OSError, tarfile.TarError) as error:
        raise DataError(f"{path}: no tar file, or cut off or damaged ({error}).") from error


def _image_of(where: str, members: Mapping[str, _Member], named: str | None) -> str | None:
    """The extension of the sample's image; None if it has none."""
    if named is not None:
        return named if named in members else None
    found = [extension for extension in members if f".{extension}" in IMAGE_SUFFIXES]
    if len(found) > 1:
        raise DataError(
            f"{where}: expected one image, got {some(found)}: name one by '?image=EXTENSION'."
        )
    return found[0] if found else None


def _label_of(
    where: str, members: Mapping[str, _Member], file: BinaryIO, named: str | None
) -> tuple[str | int, bool]:
    """The sample's label, a name or a row, and whether it is an entry of its ``.json``."""
    text = "cls" if named is None else named
    content = _json_of(where, members, file)
    if text in members:
        return _text_label(f"{where}, .{text}", _content(members[text], file)), False
    if not content:
        expected = "a label (.cls, or .json with a label)" if named is None else f"a label .{named}"
        raise DataError(f"{where}: expected {expected}, got {some(list(members))}.")
    key = find_column(f"{where}, .json", list(content), LABEL_COLUMNS, named)
    label = content[key]
    if isinstance(label, bool) or not isinstance(label, (str, int)) or label == "":
        raise DataError(f"{where}, .json: expected the name or index of a class in {key!r}.")
    return label, True


def _json_of(where: str, members: Mapping[str, _Member], file: BinaryIO) -> dict[str, object]:
    if "json" not in members:
        return {}
    try:
        content = json.loads(_content(members["json"], file))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}, .json: expected JSON ({error}).") from error
    if not isinstance(content, dict):
        raise DataError(f"{where}, .json: expected an object, got another value.")
    return content


def _text_label(where: str, content: bytes) -> str | int:
    try:
        text = content.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        text = ""
    if not text:
        raise DataError(f"{where}: expected the name or index of a class, got none.")
    return int(text) if text.isascii() and text.isdigit() else text


def _content(member: _Member, file: BinaryIO) -> bytes:
    file.seek(member.offset)
    return file.read(min(member.size, MAX_LABEL_BYTES))


def _read_member(path: str, offset: int, size: int, name: str) -> Image.Image:
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            content = file.read(size)
    except OSError as error:
        raise ImageError(f"{name}: {path} cannot be read ({error.strerror or error}).") from error
    return decode_image(content, name)
