"""Which files the arguments of a command mean."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path

from dive_fast.data.formats import IMAGE_SUFFIXES
from dive_fast.errors import ImageError


def expand_inputs(arguments: Sequence[str]) -> list[tuple[str, ImageError | None]]:
    """Files from command-line arguments: files, folders and glob patterns, in the given order.

    A folder gives the images directly in it, sorted by name; a pattern gives its files, sorted.

    Returns:
        (path, None) for each file; (argument, what is wrong) for an argument that gives none.
    """
    found: list[tuple[str, ImageError | None]] = []
    for argument in arguments:
        try:
            found += [(str(path), None) for path in _expand(argument)]
        except ImageError as error:
            found.append((argument, error))
    return found


def _expand(argument: str) -> list[Path]:
    if os.path.isdir(argument):
        found, none = list_images(argument), "expected images in this folder, got none"
    elif os.path.exists(argument):
        return [Path(argument)]
    elif glob.has_magic(argument):
        found = sorted(Path(p) for p in glob.glob(argument) if os.path.isfile(p))
        none = "expected files of this pattern, got none"
    else:
        found, none = [], "no such file or folder"
    if not found:
        raise ImageError(f"{argument}: {none}.")
    return found


def list_images(folder: str | os.PathLike[str], recursive: bool = False) -> list[Path]:
    """The files with an image's suffix in a folder, sorted; hidden files are left out.

    Raises:
        ImageError: the folder cannot be read.
    """
    found = []
    try:
        for directory, subfolders, files in os.walk(folder, onerror=_raise):
            subfolders[:] = [s for s in subfolders if recursive and not s.startswith(".")]
            found += [
                Path(directory, name)
                for name in files
                if not name.startswith(".") and Path(name).suffix.lower() in IMAGE_SUFFIXES
            ]
    except OSError as error:
        raise ImageError(f"{folder}: cannot be read ({error.strerror or error}).") from error
    return sorted(found)


def _raise(error: OSError) -> None:
    raise error
