"""What counts as a number in settings and files: True and False do not."""

from __future__ import annotations

import math


def is_whole(value: object, at_least: float = -math.inf) -> bool:
    """Whether it is an int in range, and neither True nor False."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= at_least


def is_number(value: object, at_least: float = -math.inf) -> bool:
    """Whether it is an int or a float, finite and in range, and neither True nor False."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value) and value >= at_least
    except OverflowError:  # a whole number beyond any float
        return False
