"""Images that lie in files of their own."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image

from dive_fast.data.examples import NO_FACTS, Fact
from dive_fast.data.image_files import read_image


@dataclass(frozen=True)
class FilePictures:
    """Files whose ids are their paths, seen from a folder.

    Attributes:
        folder: where the paths start.
    """

    folder: str

    def loader(self, row: int, example_id: str) -> Callable[[], Image.Image]:
        return partial(read_image, Path(self.folder, example_id))

    def facts(self, row: int, example_id: str) -> Mapping[str, Fact]:
        return NO_FACTS

    def __reduce__(self) -> tuple[type, tuple[str]]:
        # Another process may work elsewhere.
        return FilePictures, (os.path.abspath(self.folder),)


def file_size(path: Path) -> int | None:
    """Bytes; None where nothing is: that is one record's error, when it is loaded."""
    try:
        return path.stat().st_size
    except (OSError, ValueError):  # ValueError: a NUL in the name
        return None
