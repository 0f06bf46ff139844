"""The ids of images and categories: whole numbers or texts."""

from __future__ import annotations

import numbers

Id = int | str


def as_id(value: object) -> Id | None:
    """An id in the form in which it is kept, None for what is none.

    Ids are compared by value, as pycocotools does: 1.0 is 1, and the text "1" is not. True and
    False are no ids.
    """
    if isinstance(value, str):
        return str(value)
    if isinstance(value, bool):
        return None
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return None


def in_order(ids: object) -> list[Id]:
    """Sorted: numbers by value, then texts."""
    return sorted(ids, key=lambda value: (isinstance(value, str), value))
