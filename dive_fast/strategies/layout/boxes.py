"""Boxes on the grid: beside each other, in two, as one, and around what they hold."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

from scipy import ndimage
from torch import Tensor

SMALLEST_PART = 2  # lines of the grid; what a cut leaves at least
UNITS = 16  # small steps from one end of the grid to the other
CUTS = 16  # of a box along an axis at most


class Box(NamedTuple):
    """Sides in steps of the grid, left < right and top < bottom."""

    left: int
    top: int
    right: int
    bottom: int


def overlap(a: Box, b: Box) -> float:
    """Intersection over union."""
    width = min(a.right, b.right) - max(a.left, b.left)
    height = min(a.bottom, b.bottom) - max(a.top, b.top)
    inside = max(width, 0) * max(height, 0)
    return inside / (_area(a) + _area(b) - inside)


def union(a: Box, b: Box) -> Box:
    """The smallest box around both."""
    return Box(
        min(a.left, b.left), min(a.top, b.top), max(a.right, b.right), max(a.bottom, b.bottom)
    )


def touching(boxes: Sequence[Box], grid: int) -> list[tuple[int, int]]:
    """Pairs with nearly no space between them."""
    pairs = combinations(range(len(boxes)), 2)
    return [(i, j) for i, j in pairs if _gap(boxes[i], boxes[j]) <= small_step(grid)]


def small_step(grid: int) -> int:
    """What counts as a small step on a grid, in lines."""
    return max(1, (grid - 1) // UNITS)


def neighbours(box: Box, step: int, grid: int) -> list[Box]:
    """Boxes with one side moved, or shifted as a whole, that lie on the grid and have a size."""
    found = []
    for sign in (-step, step):
        found += [box._replace(**{side: getattr(box, side) + sign}) for side in box._fields]
        found.append(box._replace(left=box.left + sign, right=box.right + sign))
        found.append(box._replace(top=box.top + sign, bottom=box.bottom + sign))
    return [b for b in found if 0 <= b.left < b.right < grid and 0 <= b.top < b.bottom < grid]


def halves(box: Box, content: Tensor) -> list[tuple[Box, Box]]:
    """A box cut in two along lines of the grid, both parts shrunk to their content.

    Args:
        content: bool [G - 1, G - 1], cells that hold something.
    """
    upright = [(box._replace(right=x), box._replace(left=x)) for x in _cuts(box.left, box.right)]
    level = [(box._replace(bottom=y), box._replace(top=y)) for y in _cuts(box.top, box.bottom)]
    shrunk = dict.fromkeys(
        (tightened(first, content), tightened(second, content)) for first, second in upright + level
    )
    return [parts for parts in shrunk if all(part and _is_object(part) for part in parts)]


def tightened(box: Box, mask: Tensor) -> Box | None:
    """The smallest box around the marked cells in a box; None if there are none."""
    inside = labelled_boxes(mask[box.top : box.bottom, box.left : box.right].int())
    if not inside:
        return None
    left, top, right, bottom = inside[0]
    return Box(left + box.left, top + box.top, right + box.left, bottom + box.top)


def labelled_boxes(labels: Tensor) -> list[Box]:
    """The boxes around the cells of each label 1, 2 ... of an integer map [h, w]."""
    return [
        Box(columns.start, rows.start, columns.stop, rows.stop)
        for rows, columns in ndimage.find_objects(labels.numpy())
    ]


def _cuts(low: int, high: int) -> range:
    """Places between two sides, all of them or evenly spread ones."""
    step = max(1, (high - low) // CUTS)
    return range(low + step, high, step)


def _gap(a: Box, b: Box) -> int:
    across = max(a.left, b.left) - min(a.right, b.right)
    return max(across, max(a.top, b.top) - min(a.bottom, b.bottom))


def _area(box: Box) -> int:
    return (box.right - box.left) * (box.bottom - box.top)


def _is_object(box: Box) -> bool:
    return min(box.right - box.left, box.bottom - box.top) >= SMALLEST_PART
