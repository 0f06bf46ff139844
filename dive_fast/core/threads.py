"""How many threads torch gets: as many as there are cores that nobody else uses.

OpenMP cuts every operation into as many equal parts as there are threads, and all wait for the
last one. Beside another busy process the last part lies on a core that is shared, and the waiting
threads spin on the others. docs/caching.md has the figures.

    free = cores that this process may use - cores that others were busy on

Only a command that has a process of its own chooses; a library must not change its caller's.
"""

from __future__ import annotations

import os
import time
from collections.abc import MutableMapping
from pathlib import Path
from typing import NamedTuple

from dive_fast.core.numbers import whole

# What the user may have said to OpenMP himself.
COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_WAITS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
# Turns of a waiting thread before it sleeps: about a tenth of a millisecond, which outlasts what
# lies between two operations. libgomp's own are 300,000.
SPINS = 10_000
INTERVAL = 0.1  # seconds of the first look; the system counts in hundredths
AGAIN = 10.0  # seconds between the looks of a command
# A core counts as free with this much of it taken: what the system does beside is no other work.
_TOLERANCE = 0.3
_STAT = Path("/proc/stat")
_CGROUP = Path("/sys/fs/cgroup")


class _Seen(NamedTuple):
    """Seconds since the start: of the clock, that cores of ours were busy, that we used."""

    clock: float
    busy: float
    own: float


def spin_shortly(environment: MutableMapping[str, str] = os.environ) -> None:
    """Tells OpenMP that threads which wait shall soon sleep; to effect before torch is imported.

    What the user said of it stands. It is for libgomp, which torch has on Linux.
    """
    if not any(name in environment for name in _WAITS):
        environment["GOMP_SPINCOUNT"] = str(SPINS)


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


def choose_threads(count: int | None = None, *, again: float | None = None) -> int:
    """Sets how many threads torch computes with on the CPU, and returns the number.

    Args:
        count: that many. None: as many as cores are free now, at least 1 and at most as many as
            torch has; where OMP_NUM_THREADS or MKL_NUM_THREADS is set, what they say.
        again: with None for ``count``, seconds after which ``classify``, ``detect`` and
            ``evaluate`` look again as they come to their next image, in this thread. Threads of
            this process count as its own, so that a core which another process has left is taken,
            and one that another needs is given back. None: never. Ends with the next call, or when
            somebody else sets the number of threads.

    Looking takes a tenth of a second. Another number of threads sums in another order: the last
    bits of the losses may differ.

    Raises:
        DiveFastError: ``count`` is no whole number of at least 1.

    Example:
        >>> import dive_fast
        >>> dive_fast.choose_threads(1)
        1
    """
    global _choice
    import torch

    _choice = None
    if count is not None:
        torch.set_num_threads(whole("threads", count, 1))
    elif not any(name in os.environ for name in COUNTS):
        most = torch.get_num_threads()
        _set(free_cores(), most)
        if again is not None and (seen := _look()) is not None:
            _choice = _Choice(most, again, seen, torch.get_num_threads())
    return torch.get_num_threads()


def choose_again() -> None:
    """Looks again, if it is time and ``choose_threads`` was told to."""
    if _choice is None or time.monotonic() - _choice.seen.clock < _choice.every:
        return
    _choose_again(_choice)


class _Choice(NamedTuple):
    """What was chosen: of at most so many threads, every so many seconds; and what was seen."""

    most: int
    every: float
    seen: _Seen
    threads: int


_choice: _Choice | None = None  # threads belong to the process, and so does this


def _choose_again(last: _Choice) -> None:
    global _choice
    import torch

    now = _look()
    if now is None or torch.get_num_threads() != last.threads:
        _choice = None
        return
    _set(_free(last.seen, now), last.most)
    _choice = last._replace(seen=now, threads=torch.get_num_threads())


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
            int((_CGROUP / "cpu" / f"cpu.cfs_{name}_us").read_text())
            for name in ("quota", "period")
        )
        return most / period if most > 0 else None
    except (OSError, ValueError, ZeroDivisionError):
        return None
