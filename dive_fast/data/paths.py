"""Which files are images: those that the arguments of a command mean, and those in a folder.

One rule for every folder (docs/models.md tells it to users):

- A file counts by its suffix (``formats.IMAGE_SUFFIXES``, in any case).
- Hidden files and folders (``.x``, so also macOS's ``._x.jpg``) and the service files and folders
  of file managers, archives and network drives (``SERVICE``) do not count.
- Folders that are linked are followed, unless the link leads back to a folder that contains it. A
  file that can be reached in several ways counts once, by the path without links if there is one.
- What is left out is told: ``LeftOut`` says how much of what in one line.
"""

from __future__ import annotations

import glob
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dive_fast.data.formats import IMAGE_SUFFIXES
from dive_fast.errors import ImageError

log = logging.getLogger(__name__)

# Made by systems beside what people put there; compared in lower case.
SERVICE = frozenset(
    (
        "__macosx", "__pycache__", "lost+found", "thumbs.db", "ehthumbs.db", "desktop.ini",
        "icon\r", "@eadir", "@recycle", "@__thumb", "#recycle", "#snapshot", "$recycle.bin",
        "recycler", "system volume information",
    )
)  # fmt: skip


def is_service(name: str) -> bool:
    """Whether a file or folder of that name is a system's own, hidden or not."""
    return name.lower() in SERVICE


@dataclass
class LeftOut:
    """How many files and folders do not count, by the reason."""

    reasons: Counter[str] = field(default_factory=Counter)
    suffixes: Counter[str] = field(default_factory=Counter)

    def hides(self, name: str) -> bool:
        """Whether a hidden or service file or folder is left out; it is counted."""
        if is_service(name):
            self.reasons["the system's own"] += 1
        elif name.startswith("."):
            self.reasons["hidden"] += 1
        else:
            return False
        return True

    def refuses(self, path: str) -> bool:
        """Whether a file is left out by its suffix; it is counted.

        A link to nothing may have an image's suffix: then its error is told when it is read.
        """
        suffix = os.path.splitext(path)[1].lower()
        if suffix in IMAGE_SUFFIXES:
            return False
        if os.path.islink(path) and not os.path.exists(path):
            self.reasons["linked to nothing"] += 1
        else:
            self.suffixes[suffix] += 1
        return True

    def add(self, other: LeftOut) -> None:
        self.reasons += other.reasons
        self.suffixes += other.suffixes

    def __str__(self) -> str:
        """Such as "3 without an image's suffix (.txt, .json), 1 hidden"; empty for nothing."""
        parts = []
        if self.suffixes:
            kinds = [suffix or "no suffix" for suffix, _ in self.suffixes.most_common(4)]
            kinds += ["..."] if len(self.suffixes) > 4 else []
            parts = [f"{self.suffixes.total()} without an image's suffix ({', '.join(kinds)})"]
        return ", ".join(parts + [f"{n} {reason}" for reason, n in self.reasons.items() if n])

    def warn(self, folder: str | os.PathLike[str]) -> None:
        """Tells in one line what of a folder does not count, if there is something."""
        if text := str(self):
            log.warning("%s: left out %s.", os.fspath(folder), text)


def expand_inputs(arguments: Sequence[str]) -> list[tuple[str, ImageError | None]]:
    """Files from command-line arguments: files, folders and glob patterns, in the given order.

    A folder gives the images directly in it, sorted by name, and a line says what else is there; a
    pattern gives its files, sorted.

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
    left = LeftOut()
    if os.path.isdir(argument):
        found = list_images(argument, left=left)
        none = "expected images in this folder, got none"
        none += f" ({left} left out)" if str(left) else ""
    elif os.path.lexists(argument):
        return [Path(argument)]
    elif glob.has_magic(argument):
        found = []
        for path in sorted(glob.glob(argument)):
            if os.path.isdir(path):
                left.reasons["folder(s)"] += 1
            else:
                found.append(Path(path))
        none = "expected files of this pattern, got none"
    else:
        found, none = [], "no such file or folder"
    if not found:
        raise ImageError(f"{argument}: {none}.")
    left.warn(argument)
    return found


def list_images(
    folder: str | os.PathLike[str], recursive: bool = False, left: LeftOut | None = None
) -> list[Path]:
    """The images in a folder by the rule above, sorted.

    Args:
        recursive: also those in its sub-folders.
        left: counts what is left out; told by nobody if None.

    Raises:
        ImageError: the folder cannot be read.
    """
    left = LeftOut() if left is None else left
    try:
        found = list(_files(os.fspath(folder), recursive, left))
    except OSError as error:
        raise ImageError(f"{folder}: cannot be read ({error.strerror or error}).") from error
    return sorted(once(found, left))


def once(paths: Sequence[Path], left: LeftOut) -> list[Path]:
    """The paths in their order; of several to the same file the first that is no link stays."""
    ordered = sorted(paths, key=os.path.islink)
    chosen: dict[str, Path] = {}
    for path, real in zip(ordered, real_paths(ordered), strict=True):
        if chosen.setdefault(real, path) is not path:
            left.reasons["linked to files that are there already"] += 1
    kept = set(chosen.values())
    return [path for path in paths if path in kept]


def real_paths(paths: Sequence[Path]) -> list[str]:
    """Where files lie, without links."""
    # Of millions of files only the few folders are looked up.
    folders = {folder: os.path.realpath(folder) for folder in {path.parent for path in paths}}
    return [
        os.path.realpath(path)
        if path.is_symlink()
        else os.path.join(folders[path.parent], path.name)
        for path in paths
    ]


def _files(folder: str, recursive: bool, left: LeftOut) -> Iterator[Path]:
    """The files with an image's suffix; folders that are no link come first, each folder once."""
    seen: set[str] = set()
    outside = _with_parents(os.path.realpath(folder))
    linked = [folder]
    while linked:
        start = linked.pop(0)
        real = os.path.realpath(start)
        if start is not folder and real in outside:
            left.reasons["linked back to a folder that contains them"] += 1
        elif real in seen:
            left.reasons["linked to folders that are there already"] += 1
        else:
            yield from _files_below(start, recursive, left, seen, linked)


def _files_below(
    start: str, recursive: bool, left: LeftOut, seen: set[str], linked: list[str]
) -> Iterator[Path]:
    """Without following links to folders, which are put into ``linked``."""
    for directory, subfolders, files in os.walk(start, onerror=_raise):
        seen.add(os.path.realpath(directory))
        inner = [name for name in sorted(subfolders) if not left.hides(name)]
        subfolders.clear()
        if not recursive and inner:
            left.reasons["sub-folder(s)"] += len(inner)
            inner = []
        for name in inner:
            path = os.path.join(directory, name)
            if os.path.islink(path):
                linked.append(path)
            elif os.path.realpath(path) not in seen:
                subfolders.append(name)
        for name in sorted(files):
            path = os.path.join(directory, name)
            if not left.hides(name) and not left.refuses(path):
                yield Path(path)


def _with_parents(path: str) -> set[str]:
    return {path, *map(str, Path(path).parents)}


def _raise(error: OSError) -> None:
    raise error
