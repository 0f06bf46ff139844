"""How much memory there is, to say so before it runs out: a process that fills it is killed."""

from __future__ import annotations

import os
from pathlib import Path

from dive_fast.errors import ModelError

_FREE = Path("/proc/meminfo")
_LIMIT = Path("/sys/fs/cgroup/memory.max")  # of a container


def available_bytes() -> int | None:
    """What can be taken without swapping; None where the system does not say."""
    known = [n for n in (_free(), _limit()) if n is not None]
    return min(known) if known else None


def check_table(n_rows: int, dim: int, itemsize: int, n_classes: int) -> None:
    """That there is memory for the embeddings of so many classes.

    Args:
        n_rows, dim: of the table.
        itemsize: bytes of a number.

    Raises:
        ModelError: there is not.
    """
    needed, free = n_rows * dim * itemsize, available_bytes()
    if free is not None and needed > free:
        raise ModelError(
            f"the embeddings of {n_classes} classes take {needed / 1e9:.1f} GB ({n_rows} rows of "
            f"{dim} numbers), and {free / 1e9:.1f} GB of memory are available; ask about fewer "
            f"classes at a time."
        )


def _free() -> int | None:
    try:
        for line in _FREE.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError, AttributeError):  # not a Linux, or one without /proc
        return None


def _limit() -> int | None:
    try:
        return int(_LIMIT.read_text())
    except (OSError, ValueError):  # no container, or "max"
        return None
