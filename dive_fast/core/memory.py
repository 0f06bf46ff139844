"""How much memory there is, to say so before it runs out: a process that fills it is killed."""

from __future__ import annotations

import os
from pathlib import Path

_FREE = Path("/proc/meminfo")
_LIMIT = Path("/sys/fs/cgroup/memory.max")  # of a container


def available_bytes() -> int | None:
    """What can be taken without swapping; None where the system does not say."""
    known = [n for n in (_free(), _limit()) if n is not None]
    return min(known) if known else None


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
