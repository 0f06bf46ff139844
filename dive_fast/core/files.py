"""Files that are there whole or as they were, whatever happens while they are written."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

CACHE_VARIABLE = "DIVE_FAST_CACHE"


def cache_folder() -> Path | None:
    """Where what was computed once is kept; None where nobody's home is known.

    ``DIVE_FAST_CACHE`` names the folder; else it is ``dive_fast`` in ``XDG_CACHE_HOME`` or
    ``~/.cache``.
    """
    try:
        if stated := os.environ.get(CACHE_VARIABLE):
            return Path(stated).expanduser()
        # As the XDG specification has it, a relative path is none.
        base = Path(os.environ.get("XDG_CACHE_HOME", ""))
        return (base if base.is_absolute() else Path.home() / ".cache") / "dive_fast"
    except RuntimeError:  # nobody's home
        return None


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write into, which takes the place of ``path`` when the block ends without an error.

    The content is on the disk before it takes the name, and an old file's permissions are kept. Two
    writers at once each leave a whole file, because the names of their temporary ones differ.

    Raises:
        OSError: it cannot be written.
    """
    start, end = _around(path)
    handle, temporary = tempfile.mkstemp(end, start, path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes private files; a folder may be shared.
        mode = path.stat().st_mode if path.exists() else 0o666 & ~_umask()
        os.chmod(temporary, mode & 0o777)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def leftovers(path: Path) -> list[Path]:
    """The temporary files of writers of ``path`` that were killed, or are still at work."""
    start, end = _around(path)
    return [
        other
        for other in path.parent.iterdir()
        if other.name.startswith(start) and other.name.endswith(end)
    ]


def _around(path: Path) -> tuple[str, str]:
    """How the names of its temporary files begin and end."""
    return f".{path.name}.", ".tmp"


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
