"""The published classification loops, rewritten plainly: oracle for tests, baseline for timings.

``one_stage`` is the baseline of detection instead, a plain discriminative detector.

Nothing here imports ``dive_fast``: agreement between the two is then evidence.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple, TypeVar

Result = TypeVar("Result")


class Run(NamedTuple):
    """What one image took.

    Attributes:
        answer: the class.
        evaluations: forwards plus backwards of rows (image, probe, condition).
        seconds: of the loop, for one image alone.
    """

    answer: int
    evaluations: int
    seconds: float


def timed(function: Callable[[], Result]) -> tuple[Result, float]:
    """Calls the function; its result and seconds. All loops end with their results on the CPU."""
    start = time.perf_counter()
    return function(), time.perf_counter() - start
