"""Windows of the usual sizes of objects, tried everywhere: for what no error map shows.

An object of faint contrast hardly stands out in the error map of a layout without it, and yet the
layout with it explains the image better. So one window of each usual size is put beside the layout,
at every place of a lattice, and the best ones are where an object may be:

    gain(b) = L(y) - L(y + an object of no known class in b)
"""

from __future__ import annotations

from collections.abc import Sequence

from dive_fast.core.detection import Size
from dive_fast.strategies.layout.board import ANY, Item, Items, Steps, measure
from dive_fast.strategies.layout.boxes import Box, overlap
from dive_fast.strategies.layout.state import State

STRIDE = 3  # of a window's side, one in so many
MOST_WINDOWS = 128
TAKEN = 0.5  # intersection over union with an object beyond which a window is that object
APART = 0.3  # of two windows that may both be tried, at most


def windows(sizes: Sequence[Size], grid: int) -> list[Box]:
    """Windows of the sizes over the whole grid, up to a third of each beyond the image cut off.

    Sizes of which there would be more than ``MOST_WINDOWS`` in all are left out: small objects
    would take too many.
    """
    found: dict[Box, None] = {}
    for size in sizes:
        across, down = (_places(share, grid) for share in size)
        if len(found) + len(across) * len(down) <= MOST_WINDOWS:
            found |= {
                Box(left, top, right, bottom): None
                for left, right in across
                for top, bottom in down
            }
    return list(found)


def scanned(sizes: Sequence[Size], grid: int) -> tuple[Size, ...]:
    """Those of the sizes that ``windows`` does not leave out."""
    kept: tuple[Size, ...] = ()
    for size in sizes:
        if len(windows((*kept, size), grid)) > len(windows(kept, grid)):
            kept = (*kept, size)
    return kept


def _places(share: float, grid: int) -> list[tuple[int, int]]:
    """First and last line of a window at each place along an axis, in order."""
    last = grid - 1
    side = min(max(1, round(share * last)), last)
    stride = max(1, side // STRIDE)
    first = range(-stride, last - side + stride + 1, stride)
    places = {(max(0, low), min(last, low + side)) for low in first}
    return sorted((low, high) for low, high in places if low < high)


def promising(state: State, sizes: Sequence[Size], most: int) -> Steps:
    """The windows beside the layout that lower the loss most, the best first.

    Each by more than half of ``margin``, as its sides are still to be moved.

    Args:
        most: windows at most, no two in nearly the same place.
    """
    boxes = [
        box
        for box in windows(sizes, state.board.layout_format.grid)
        if all(overlap(box, item.box) < TAKEN for item in state.items)
    ]
    if not boxes:
        return []
    few = state.probe_ids[: max(1, len(state.probe_ids) // 2)]
    layouts: list[Items] = [state.items, *((*state.items, Item(ANY, box)) for box in boxes)]
    losses = yield from measure(state.board, layouts, few)
    enough = losses[0] * (1 - state.margin / 2)
    chosen: list[Box] = []
    for i in losses[1:].argsort(stable=True).tolist():
        if len(chosen) == most or not losses[1 + i] < enough:
            break
        if all(overlap(boxes[i], other) < APART for other in chosen):
            chosen.append(boxes[i])
    return chosen
