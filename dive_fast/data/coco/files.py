"""Finds the image files that an annotation file names, in one folder and never outside it."""

from __future__ import annotations

import functools
import os
import posixpath
import re
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from dive_fast.data.coco.ids import Id

_DRIVE = re.compile(r"^[A-Za-z]:")


class Found(NamedTuple):
    """Where the images lie.

    Attributes:
        paths: of each image, None where it is not in the folder.
        dropped: leading folders that all names have and that are not in the folder, "" for none.
        outside: images whose names lead out of the folder, where nothing is read.
    """

    paths: dict[Id, Path | None]
    dropped: str
    outside: frozenset[Id]


def find_files(names: Mapping[Id, str], folder: Path) -> Found:
    """The files of one folder that names mean.

    A name is taken as it is, or else with backslashes as separators, and in whichever Unicode form
    (composed, decomposed) the name on disk has. Where none of the names is found so, the leading
    folders that all of them share are dropped, as few as give a file: "images/a.png" is "a.png" of
    the folder images. An absolute name, or one that begins with "..", is looked for inside the
    folder alone; links in the folder are followed.

    Args:
        names: by the images' ids, not empty.
    """
    parts = {key: _parts(name, folder) for key, name in names.items()}
    shared = os.path.commonprefix([each[:-1] for each in parts.values()])
    dropped, paths = "", _look(folder, names, parts, 0)
    for drop in range(1, len(shared) + 1):
        if any(paths.values()):
            break
        dropped, paths = posixpath.join(*shared[:drop]), _look(folder, names, parts, drop)
    if not any(paths.values()):
        dropped = ""
    outside = (key for key, each in parts.items() if paths[key] is None and _leads_out(each))
    return Found(paths, dropped, frozenset(outside))


def _look(
    folder: Path, names: Mapping[Id, str], parts: Mapping[Id, tuple[str, ...]], drop: int
) -> dict[Id, Path | None]:
    paths: dict[Id, Path | None] = {}
    for key, name in names.items():
        paths[key] = None
        if _leads_out(parts[key][drop:]):
            continue
        # As it is: a backslash may be part of a name.
        if drop == 0 and ".." not in name.split("/") and not name.startswith("/"):
            paths[key] = _file(folder / name)
        paths[key] = paths[key] or _find(folder, parts[key][drop:])
    return paths


def _parts(name: str, folder: Path) -> tuple[str, ...]:
    """The parts of a name; of one that leads out of the folder the first is "/" or ".."."""
    name = _DRIVE.sub("", name.replace("\\", "/"))
    name = posixpath.normpath(name.removeprefix(os.path.abspath(folder).rstrip("/") + "/"))
    parts = tuple(part for part in name.split("/") if part not in ("", "."))
    # "/a.png" is how some tools write a.png; what has folders of its own is a place.
    return ("/", *parts) if name.startswith("/") and len(parts) > 1 else parts


def _leads_out(parts: tuple[str, ...]) -> bool:
    return not {"/", ".."}.isdisjoint(parts[:1])


def _find(folder: Path, parts: tuple[str, ...]) -> Path | None:
    path = folder.joinpath(*parts)
    if (found := _file(path)) is not None or all(part.isascii() for part in parts):
        return found
    path = folder
    for part in parts:
        there = path / part
        if not _exists(there):
            there = _by_form(path).get(unicodedata.normalize("NFC", part))
        if there is None:
            return None
        path = there
    return _file(path)


@functools.lru_cache(maxsize=64)
def _listed(folder: Path, changed: int) -> dict[str, Path]:
    return {
        unicodedata.normalize("NFC", name): folder / name for name in sorted(os.listdir(folder))
    }


def _by_form(folder: Path) -> dict[str, Path]:
    """The entries of a folder by their names' composed form."""
    try:
        return _listed(folder, folder.stat().st_mtime_ns)
    except (OSError, ValueError):
        return {}


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def _file(path: Path) -> Path | None:
    try:
        return path if path.is_file() else None
    except (OSError, ValueError):  # a name too long, or with a NUL
        return None
