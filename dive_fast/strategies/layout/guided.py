"""``guided``: a discrete search that adds, moves, names and removes objects.

Every step is measured exactly on common probes; what is measured is proposed by a coarse grid of
boxes, by the steps of the sides, and, where there are many classes, by a gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import ClassVar

import torch
from torch import Tensor

from dive_fast.errors import DiveFastError
from dive_fast.requests import Gradients
from dive_fast.strategies.layout.board import (
    ANY,
    Board,
    Box,
    Item,
    Items,
    LayoutProbes,
    Steps,
    measure,
    overlap,
)
from dive_fast.strategies.layout.settle import settle, with_class

# First steps of a side, as a share of the canvas; at least 2 lines and 1 line of the grid.
FAR, NEAR = 8, 16
EXPLAINED = 0.5  # a coarse box that overlaps an object more is not proposed again


@dataclass(frozen=True)
class Guided(LayoutProbes):
    """Adds one object after the other, each where it lowers the loss most.

    1. Coarse boxes, all with corners on every n-th line of the grid, are measured once in an empty
       layout, with the mean of the classes' embeddings for a class.
    2. The best ``proposals`` of them that are not explained yet are measured again, beside the
       objects found so far. The best one is moved side by side as long as that helps, gets a class,
       and is moved again; it stays if the loss falls by more than ``margin`` of it.
    3. When ``patience`` proposals in a row were refused, every object is moved and decided once
       more, with all others in place.

    Attributes:
        lines: of the coarse grid, per axis.
        coarse_probes, step_probes, final_probes: of the three kinds of measurements.
        proposals: coarse boxes that are measured again before an object is added.
        names: classes that are measured for an object; the first of a gradient's ranking where the
            model has more.
        margin: share of the loss that an object has to explain.
        patience: refused proposals until the search ends.
        loss: "l2", "l1" or "huber".
    """

    name: ClassVar[str] = "guided"
    lines: int = 6
    coarse_probes: int = 4
    step_probes: int = 12
    final_probes: int = 24
    proposals: int = 16
    names: int = 16
    margin: float = 0.02
    patience: int = 2
    loss: str = "l2"

    def __post_init__(self) -> None:
        least = {"lines": 2, "proposals": 1, "names": 1, "patience": 1}
        least |= {"coarse_probes": 1, "step_probes": 1, "final_probes": 1}
        for key, bound in least.items():
            if getattr(self, key) < bound:
                raise DiveFastError(f"{key} must be at least {bound}, got {getattr(self, key)}.")
        if not 0 <= self.margin < 1:
            raise DiveFastError(f"margin must be in [0, 1), got {self.margin}.")

    def search(self, board: Board) -> Steps:
        k = len(board.probes)
        coarse, steps, final = (
            torch.arange(min(n, k))
            for n in (self.coarse_probes, self.step_probes, self.final_probes)
        )
        boxes = coarse_boxes(board.format.grid, self.lines)
        alone = yield from measure(board, [(Item(ANY, box),) for box in boxes], coarse)
        ranked = [boxes[i] for i in alone.argsort().tolist()]

        items: Items = ()
        loss = float((yield from measure(board, [items], steps))[0])
        refused: set[Box] = set()
        path = []
        while len(items) < board.format.max_objects and len(refused) < self.patience:
            free = [box for box in ranked if box not in refused and not _explained(box, items)]
            if not free:
                break
            layouts = [(*items, Item(ANY, box)) for box in free[: self.proposals]]
            found = yield from measure(board, layouts, steps)
            start = layouts[int(found.argmin())]
            layout, better = yield from self._place(board, start, float(found.min()), steps)
            path.append((start[-1].box, layout[-1], loss, better))
            if better < loss * (1 - self.margin):
                items, loss, refused = layout, better, set()
            else:
                refused.add(start[-1].box)
        for i in range(len(items)):
            items, loss = yield from move(board, items, i, loss, steps, 1)
        answer = yield from settle(board, items, final, self.margin)
        answer.trace["path"] = path
        return answer

    def _place(self, board: Board, items: Items, loss: float, probe_ids: Tensor) -> Steps:
        """The last object moved, named, and moved again; returns layout and loss."""
        i = len(items) - 1
        lines = board.format.grid - 1
        far, near = max(2, lines // FAR), max(1, lines // NEAR)
        items, loss = yield from move(board, items, i, loss, probe_ids, far)
        classes = yield from self._likely_classes(board, items, i, probe_ids)
        layouts = [with_class(items, i, c) for c in classes]
        losses = yield from measure(board, layouts, probe_ids)
        best = int(losses.argmin())
        return (yield from move(board, layouts[best], i, float(losses[best]), probe_ids, near))

    def _likely_classes(self, board: Board, items: Items, i: int, probe_ids: Tensor) -> Steps:
        """All classes, or those that the gradient at their mean puts in front."""
        rows = board.table[slice(*board.format.class_range)]
        if len(rows) <= self.names:
            return list(range(len(rows)))
        embeddings = board.conditions([items])
        reply = yield Gradients(embeddings.flatten(1), probe_ids)
        gradient = reply.gradients.view(embeddings.shape)[0, 3 * i]
        return ((rows - rows.mean(dim=0)) @ gradient).argsort()[: self.names].tolist()


def move(board: Board, items: Items, i: int, loss: float, probe_ids: Tensor, step: int) -> Steps:
    """Moves the sides of object i while that lowers the loss; returns layout and loss.

    Every side is tried ``step`` lines out and in, and the whole box in four directions; when
    nothing helps, half of the step, down to one line.
    """
    while step >= 1:
        layouts = [
            (*items[:i], items[i]._replace(box=box), *items[i + 1 :])
            for box in neighbours(items[i].box, step, board.format.grid)
        ]
        losses = yield from measure(board, layouts, probe_ids)
        best = int(losses.argmin())
        if losses[best] < loss:
            items, loss = layouts[best], float(losses[best])
        else:
            step //= 2
    return items, loss


def neighbours(box: Box, step: int, grid: int) -> list[Box]:
    """Boxes with one side moved, or shifted as a whole, that lie on the grid and have a size."""
    moved = []
    for sign in (-step, step):
        moved += [box._replace(**{side: getattr(box, side) + sign}) for side in box._fields]
        moved.append(box._replace(left=box.left + sign, right=box.right + sign))
        moved.append(box._replace(top=box.top + sign, bottom=box.bottom + sign))
    return [b for b in moved if 0 <= b.left < b.right < grid and 0 <= b.top < b.bottom < grid]


def coarse_boxes(grid: int, lines: int) -> list[Box]:
    """All boxes whose sides lie on ``lines`` evenly spread lines of the grid."""
    places = sorted({round(i * (grid - 1) / (lines - 1)) for i in range(lines)})
    spans = list(combinations(places, 2))
    return [Box(left, top, right, bottom) for left, right in spans for top, bottom in spans]


def _explained(box: Box, items: Items) -> bool:
    return any(overlap(box, item.box) > EXPLAINED for item in items)
