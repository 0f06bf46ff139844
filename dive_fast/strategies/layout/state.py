"""Changes of a layout that a discrete search tries: sides that move, boxes that split and join."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from torch import Tensor

from dive_fast.strategies.layout.board import (
    ANY,
    Board,
    Box,
    Item,
    Items,
    Steps,
    measure,
)
from dive_fast.strategies.layout.residual import tightened

SMALLEST_PART = 2  # lines of the grid; what a cut leaves at least
UNITS = 16  # small steps from one end of the grid to the other
CUTS = 16  # of a box along an axis at most
FINAL_CUTS = 2  # that are measured with classes


def replaced(items: Items, i: int, *new: Item) -> Items:
    """The layout with others, or none, in place of object i."""
    return (*items[:i], *new, *items[i + 1 :])


def moved(items: Items, i: int, box: Box) -> Items:
    return replaced(items, i, items[i]._replace(box=box))


def slide(board: Board, items: Items, i: int, loss: float, probe_ids: Tensor, step: int) -> Steps:
    """Moves the sides of object i while that lowers the loss; returns layout and loss.

    Every side is tried ``step`` lines out and in, and the whole box in four directions. Sides
    hardly depend on each other: all that help alone are moved together where that helps more.
    When nothing helps, half of the step, down to one line.
    """
    while step >= 1:
        box = items[i].box
        boxes = neighbours(box, step, board.format.grid)
        if not boxes:  # no room on a small grid
            step //= 2
            continue
        losses = yield from measure(board, [moved(items, i, b) for b in boxes], probe_ids)
        best = int(losses.argmin())
        if not losses[best] < loss:  # NaN ends it too
            step //= 2
            continue
        better, found = boxes[best], float(losses[best])
        together = _together(box, boxes, losses, loss)
        if together is not None and together != better:
            (joint,) = yield from measure(board, [moved(items, i, together)], probe_ids)
            if joint < found:
                better, found = together, float(joint)
        items, loss = moved(items, i, better), found
    return items, loss


def split(
    board: Board,
    items: Items,
    i: int,
    loss: float,
    probe_ids: Tensor,
    margin: float,
    content: Tensor,
) -> Steps:
    """Object i as two, cut where that lowers the loss most, if by more than ``margin`` of it.

    Args:
        content: bool [G - 1, G - 1], cells that hold something; both parts shrink to theirs.
    """
    if len(items) >= board.format.max_objects:
        return items, loss
    layouts = [
        replaced(items, i, *(items[i]._replace(box=part) for part in parts))
        for parts in halves(items[i].box, content)
    ]
    return (yield from _best(board, layouts, items, loss, probe_ids, margin))


def recut(board: Board, items: Items, loss: float, probe_ids: Tensor, content: Tensor) -> Steps:
    """Two objects that touch, cut elsewhere, while that lowers the loss; layout and loss."""
    tried: set[tuple[Item, Item]] = set()
    while True:
        layouts = []
        for i, j in touching(items, board.format.grid):
            if (items[i], items[j]) in tried:
                continue
            tried.add((items[i], items[j]))
            for first, second in halves(union(items[i].box, items[j].box), content):
                layouts.append(moved(moved(items, i, first), j, second))
        found, better = yield from _best(board, layouts, items, loss, probe_ids, 0.0)
        if found == items:
            return items, loss
        items, loss = found, better


def join(board: Board, items: Items, loss: float, probe_ids: Tensor, margin: float) -> Steps:
    """Two objects as one, or one object less, while that costs no more than ``margin``."""
    while items:
        layouts = [replaced(items, i) for i in range(len(items))]
        for i, j in combinations(range(len(items)), 2):
            whole = items[i]._replace(box=union(items[i].box, items[j].box))
            layouts.append(replaced(replaced(items, j), i, whole))
        found, better = yield from _best(board, layouts, items, loss, probe_ids, -margin)
        if found == items:
            break
        items, loss = found, better
    return items, loss


def join_as_class(
    board: Board, items: Items, loss: float, probe_ids: Tensor, margin: float
) -> Steps:
    """Two objects that touch as one of any class, while that costs no more than ``margin``."""
    while True:
        layouts = [
            replaced(replaced(items, j), i, Item(c, union(items[i].box, items[j].box)))
            for i, j in touching(items, board.format.grid)
            for c in range(len(board.format.names))
        ]
        found, better = yield from _best(board, layouts, items, loss, probe_ids, -margin)
        if found == items:
            return items, loss
        items, loss = found, better


def split_as_classes(
    board: Board,
    items: Items,
    i: int,
    loss: float,
    probe_ids: Tensor,
    margin: float,
    content: Tensor,
) -> Steps:
    """Object i as two of any classes, if that lowers the loss by more than ``margin`` of it.

    The best ``FINAL_CUTS``, of two objects of no known class, get classes: the first part beside
    such a second one, then the second.
    """
    if len(items) >= board.format.max_objects:
        return items, loss
    cuts = [
        replaced(items, i, *(Item(ANY, part) for part in parts))
        for parts in halves(items[i].box, content)
    ]
    if not cuts:
        return items, loss
    losses = yield from measure(board, cuts, probe_ids[: max(1, len(probe_ids) // 2)])
    best: list[Items] = [cuts[k] for k in losses.argsort()[:FINAL_CUTS].tolist()]
    for part in (i, i + 1):
        layouts = [
            replaced(cut, part, cut[part]._replace(class_id=c))
            for cut in best
            for c in range(len(board.format.names))
        ]
        losses = (yield from measure(board, layouts, probe_ids)).view(len(best), -1)
        n = losses.shape[1]
        best = [layouts[r * n + k] for r, k in enumerate(losses.argmin(dim=1).tolist())]
    return (yield from _best(board, best, items, loss, probe_ids, margin))


def _best(
    board: Board,
    layouts: Sequence[Items],
    items: Items,
    loss: float,
    probe_ids: Tensor,
    margin: float,
) -> Steps:
    """The best of some layouts if it beats ``items`` by ``margin``; layout and loss."""
    if not layouts:
        return items, loss
    losses = yield from measure(board, layouts, probe_ids)
    best = int(losses.argmin())
    if losses[best] < loss * (1 - margin):
        return layouts[best], float(losses[best])
    return items, loss


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


def _cuts(low: int, high: int) -> range:
    """Places between two sides, all of them or evenly spread ones."""
    step = max(1, (high - low) // CUTS)
    return range(low + step, high, step)


def touching(items: Items, grid: int) -> list[tuple[int, int]]:
    """Pairs of objects with nearly no space between them."""
    pairs = combinations(range(len(items)), 2)
    return [(i, j) for i, j in pairs if _gap(items[i].box, items[j].box) <= unit(grid)]


def unit(grid: int) -> int:
    """What counts as a small step on a grid, in lines."""
    return max(1, (grid - 1) // UNITS)


def _gap(a: Box, b: Box) -> int:
    across = max(a.left, b.left) - min(a.right, b.right)
    return max(across, max(a.top, b.top) - min(a.bottom, b.bottom))


def _is_object(box: Box) -> bool:
    return min(box.right - box.left, box.bottom - box.top) >= SMALLEST_PART


def union(a: Box, b: Box) -> Box:
    """The smallest box around both."""
    return Box(
        min(a.left, b.left), min(a.top, b.top), max(a.right, b.right), max(a.bottom, b.bottom)
    )


def _together(box: Box, boxes: Sequence[Box], losses: Tensor, loss: float) -> Box | None:
    """The box with every side where the best of its own moves that help puts it."""
    best: dict[str, tuple[float, int]] = {}
    for other, value in zip(boxes, losses.tolist(), strict=True):
        sides = [side for side in box._fields if getattr(other, side) != getattr(box, side)]
        if len(sides) == 1 and value < min(loss, best.get(sides[0], (loss,))[0]):
            best[sides[0]] = (value, getattr(other, sides[0]))
    if len(best) < 2:
        return None
    found = box._replace(**{side: place for side, (_, place) in best.items()})
    return found if found.left < found.right and found.top < found.bottom else None
