"""What counts as a number."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dive_fast.core.numbers import is_number, is_whole


@pytest.mark.parametrize(
    ("value", "whole", "number"),
    [
        (0, True, True),
        (-3, True, True),
        (10**400, True, False),
        (1.0, False, True),
        (np.float64(0.5), False, True),
        (True, False, False),
        (False, False, False),
        (math.nan, False, False),
        (-math.inf, False, False),
        ("1", False, False),
        (None, False, False),
        ([1], False, False),
        (1j, False, False),
    ],
)
def test_numbers(value: object, whole: bool, number: bool) -> None:
    assert is_whole(value) is whole and bool(is_number(value)) is number


@pytest.mark.parametrize(("value", "in_range"), [(1, False), (2, True), (3, True)])
def test_the_least(value: int, in_range: bool) -> None:
    assert is_whole(value, 2) is in_range and is_number(value, 2) is in_range
    assert is_number(value + 0.0, 2) is in_range
