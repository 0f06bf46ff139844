"""The files of a task, in a folder or a zip archive, by the names that its items call them."""

from __future__ import annotations

import os
import posixpath
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image

from dive_fast.data.image_files import decode_image
from dive_fast.errors import DataError, ImageError, shown, some


class Store:
    """All files of a folder or a zip archive. Nothing outside is read, whatever a name says.

    A name is a path inside; or else the end of exactly one path; or, of images, the same without
    its suffix: tasks name images of well-known sets, which lie in other folders, and in other
    formats, with everyone.

    Args:
        path: a folder or a .zip file.

    Raises:
        DataError: there is nothing, or no such thing.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        if not isinstance(path, str | os.PathLike):
            raise DataError(f"expected a folder or a .zip file, got {shown(path)}.")
        self.path = os.fspath(path)
        self._zip: zipfile.ZipFile | None = None
        if os.path.isdir(path):
            self.names = tuple(_walk(Path(path)))
        else:
            self._zip = _open_zip(self.path)
            self.names = tuple(i.filename for i in self._zip.infolist() if not i.is_dir())
        self._known = frozenset(self.names)
        self._by_end: dict[str, list[str]] = defaultdict(list)
        self._by_stem: dict[str, list[str]] = defaultdict(list)
        for name in self.names:
            base = posixpath.basename(name)
            self._by_end[base].append(name)
            self._by_stem[_stem(base)].append(name)

    def find(self, name: str, any_suffix: bool = False) -> str:
        """The path inside of the file that a name means.

        Args:
            any_suffix: also take a file of the same name with another suffix.

        Raises:
            DataError: there is none, or there are several.
        """
        name = name.replace("\\", "/").removeprefix("./")
        if name in self._known:
            return name
        base = posixpath.basename(name)
        found = [path for path in self._by_end[base] if path.endswith(f"/{name}")]
        if not found and any_suffix:
            stem = _stem(name)
            found = [
                path for path in self._by_stem[_stem(base)]
                if _stem(path) == stem or _stem(path).endswith(f"/{stem}")
            ]  # fmt: skip
        if len(found) == 1:
            return found[0]
        if not found:
            raise DataError(f"{self.path}: has no file {name!r}.")
        raise DataError(f"{self.path}: {name!r} may be {some(sorted(found))}: name its folder.")

    def read(self, path: str) -> bytes:
        """The content of the file at a path inside.

        Raises:
            DataError: it cannot be read, or the archive is damaged there.
        """
        try:
            if self._zip is None:
                return Path(self.path, path).read_bytes()
            return self._zip.read(path)
        except (OSError, zipfile.BadZipFile, zlib.error, EOFError) as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise DataError(f"{self.path}: {path} cannot be read ({reason}).") from error
        except (NotImplementedError, RuntimeError) as error:  # encrypted, or packed otherwise
            raise DataError(f"{self.path}: {path} cannot be unpacked ({error}).") from error

    def image(self, name: str) -> Image.Image:
        """The image that a name means, upright.

        Raises:
            ImageError: there is none, there are several, or it cannot be read.
        """
        try:
            path = self.find(name, any_suffix=True)
            content = self.read(path)
        except DataError as error:
            raise ImageError(str(error)) from error
        return decode_image(content, f"{self.path}: {path}")


def _stem(path: str) -> str:
    return posixpath.splitext(path)[0]


def _walk(folder: Path) -> Iterable[str]:
    """The regular files below a folder, with slashes, in order; no hidden ones."""
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith("."):
                path = Path(place, name)
                if path.is_file():
                    yield path.relative_to(folder).as_posix()


def _open_zip(path: str) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except FileNotFoundError as error:
        raise DataError(
            f"{path}: expected a folder or a .zip file, but nothing is there."
        ) from error
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise DataError(f"{path}: expected a folder or a .zip file, got neither.") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"{path}: cannot be read ({reason}).") from error


def identity(stores: Iterable[tuple[Store, str]]) -> list[Any]:
    """What tells that files are the same ones another day: their paths inside and digests."""
    return [[path, f"{zlib.crc32(store.read(path)):08x}"] for store, path in stores]
