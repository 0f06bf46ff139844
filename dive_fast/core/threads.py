"""How many threads torch gets: as many as there are cores that nobody else uses.

OpenMP cuts every operation into as many equal parts as there are threads, and all wait for the
last one. Beside another busy process the last part lies on a core that is shared, and the waiting
threads spin on the others. docs/threads.md has the figures.

    free = cores that this process may use - cores that others were busy on

Only a command that has a process of its own chooses; a library must not change its caller's.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, MutableMapping
from pathlib import Path
from typing import NamedTuple, TypeVar

from dive_fast.core.numbers import whole

T = TypeVar("T")

# What the user may have said to OpenMP himself.
COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_WAITS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
INTERVAL = 0.1  # seconds of the first look; the system counts in hundredths
AGAIN = 10.0  # seconds between looks during a run
# A core counts as free with this much of it taken: what the system does beside is no other work.
_TOLERANCE = 0.3
_STAT = Path("/proc/stat")
_CGROUP = Path("/sys/fs/cgroup")


class _Seen(NamedTuple):
    """Seconds since the start: of the clock, that cores of ours were busy, that we used."""

    clock: float
    busy: float
    own: float


def wait_without_spinning(environment: MutableMapping[str, str] = os.environ) -> None:
    """Tells OpenMP that threads which wait shall sleep; before torch is imported, or to no effect.

    What the user said of it stands.
    """
    if not any(name in environment for name in _WAITS):
        environment["OMP_WAIT_POLICY"] = "PASSIVE"


def cores() -> int:
    """How many this process may use, by its affinity and the quota of its container; at least 1."""
    if hasattr(os, "sched_getaffinity"):
        allowed = len(os.sched_getaffinity(0))
    else:
        allowed = os.cpu_count() or 1
    quota = _quota()
    return allowed if quota is None else max(1, min(allowed, int(quota)))


def free_cores(interval: float = INTERVAL) -> float | None:
    """Cores of ours that nobody else used during the next ``interval`` seconds.

    None where the system does not say (it has no /proc/stat).
    """
    before = _look()
    if before is None:
        return None
    time.sleep(interval)
    return _free(before, _look())


def choose_threads(count: int | None = None) -> int:
    """Sets how many threads torch computes with on the CPU, and returns the number.

    Args:
        count: that many. None: as many as cores are free now, at least 1 and at most as many as
            torch has; where OMP_NUM_THREADS or MKL_NUM_THREADS is set, what they say.

    Looking takes a tenth of a second. Another number of threads sums in another order: the last
    bits of the losses may differ.

    Raises:
        DiveFastError: ``count`` is no whole number of at least 1.

    Example:
        >>> import dive_fast
        >>> dive_fast.choose_threads(1)
        1
    """
    import torch

    if count is not None:
        torch.set_num_threads(whole("threads", count, 1))
    elif not any(name in os.environ for name in COUNTS):
        _set(free_cores(), torch.get_num_threads())
    return torch.get_num_threads()


def keep_choosing(items: Iterable[T], most: int, every: float = AGAIN) -> Iterator[T]:
    """Hands on ``items``; between them, looks again how many cores are free.

    The threads of this process count as its own, so that a core which another process has left is
    taken, and one that another needs is given back.

    Args:
        most: threads, however many cores are free.
        every: seconds between two looks.
    """
    seen = _look()
    for item in items:
        now = _look() if seen is not None and time.monotonic() - seen.clock >= every else None
        if now is not None:
            _set(_free(seen, now), most)
            seen = now
        yield item


def _set(free: float | None, most: int) -> None:
    import torch

    if free is None:
        return
    count = max(1, min(most, int(free + _TOLERANCE)))
    if count != torch.get_num_threads():
        torch.set_num_threads(count)


def _free(before: _Seen, now: _Seen | None) -> float | None:
    if now is None:
        return None
    seconds = now.clock - before.clock
    others = (now.busy - before.busy) - (now.own - before.own)
    return cores() - max(0.0, others) / seconds


def _look() -> _Seen | None:
    """None where there is no /proc/stat, or one of another kind."""
    try:
        # The cores of a container's neighbours are in it too: only ours count.
        ours = {f"cpu{n}" for n in os.sched_getaffinity(0)}
        lines = [line.split() for line in _STAT.read_text().splitlines()]
        ticks = os.sysconf("SC_CLK_TCK")
        # user nice system idle iowait irq softirq steal; guests are in user and nice already.
        rows = [[int(n) for n in line[1:9]] for line in lines if line and line[0] in ours]
        busy = sum(sum(row) - row[3] - row[4] for row in rows) / ticks
    except (OSError, ValueError, IndexError, AttributeError):
        return None
    used = os.times()
    return _Seen(time.monotonic(), busy, used.user + used.system) if rows else None


def _quota() -> float | None:
    """Cores that the container may use on average; None where it has no bound."""
    try:
        most, period = (_CGROUP / "cpu.max").read_text().split()
        return int(most) / int(period)
    except (OSError, ValueError, ZeroDivisionError):  # none, "max", or the older kind
        pass
    try:
        most, period = (
            int((_CGROUP / "cpu" / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period")
        )
        return most / period if most > 0 else None
    except (OSError, ValueError, ZeroDivisionError):
        return None
