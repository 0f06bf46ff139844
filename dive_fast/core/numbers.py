"""What counts as a number in settings and files: True and False do not."""

from __future__ import annotations

import math
from numbers import Integral

from dive_fast.errors import DiveFastError, shown

MOST = 2**63 - 1  # of torch's whole numbers


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


def whole(name: str, value: object, at_least: int, at_most: int = MOST) -> int:
    """The whole number that an argument is; numpy's count, True and 2.0 do not.

    Raises:
        DiveFastError: it is none, or out of range.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise DiveFastError(
            f"{name} must be a whole number of at least {at_least}, got {shown(value)}."
        )
    if value < at_least:
        raise DiveFastError(f"{name} must be at least {at_least}, got {shown(value)}.")
    if value > at_most:
        raise DiveFastError(f"{name} must be at most {at_most}, got {shown(value)}.")
    return int(value)


def whole_seed(value: object) -> int:
    """A seed that every generator of random numbers takes, from 0 to 2^63 - 1.

    Raises:
        DiveFastError: it is none.
    """
    return whole("seed", value, 0)
