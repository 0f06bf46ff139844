"""``guided``: a relaxed search for where to begin, then moves that are measured exactly.

A relaxed layout puts objects near their places, all slots at once, where adding one object after
the other would begin with a box around several. What is wrong with it, discrete steps mend.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import ClassVar

import torch
from torch import Tensor

from dive_fast.errors import DiveFastError
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
from dive_fast.strategies.layout.invert import InvertLayout
from dive_fast.strategies.layout.moves import join, slide, split
from dive_fast.strategies.layout.settle import best_classes, drop_duplicates, settle

FAR = 8  # first steps of a new object's sides, as a share of the canvas; at least 2 lines
FINALISTS = 8  # layouts of the relaxed search that are compared
EXPLAINED = 0.5  # a coarse box that overlaps an object more is not proposed again


@dataclass(frozen=True)
class Guided(LayoutProbes):
    """A relaxed search for where to begin, then discrete steps, each measured exactly.

    1. ``InvertLayout`` with few steps gives a layout whose objects are near their places, with
       slivers and objects that cover two things among them. Its classes are forgotten: until step
       4 every object has the mean of the classes' embeddings.
    2. The sides of every object are moved as long as that helps; it is split where that helps, and
       joined with another or removed where that costs no more than ``margin`` of the loss; for
       ``rounds`` rounds or until nothing changes.
    3. Where a slot is free, coarse boxes, all with corners on every n-th line of the grid, are
       measured alone. The best ``proposals`` of them that are not explained yet are measured again
       beside the objects found. The best one is moved and split; it stays if the loss falls by
       more than ``margin`` of it. ``patience`` refusals in a row end this. Then 2 again.
    4. On more probes every object gets a class, its sides are moved once more, and it is decided:
       of another class, or not there (``settle``).

    Attributes:
        starts, relaxed_steps, relaxed_probes, learning_rate: of the relaxed search; without starts
            the search begins with no object, at step 3.
        rough_probes: of the measurements in 2 and 3.
        rounds: of step 2 at most.
        lines: of the coarse grid, per axis.
        coarse_probes: of the coarse boxes alone.
        proposals: coarse boxes that are measured again before an object is added.
        patience: refused proposals until no more are made.
        step_probes, final_probes: of the moves in 4, and of the decisions.
        margin: share of the loss that an object has to explain.
        loss: "l2", "l1" or "huber".
    """

    name: ClassVar[str] = "guided"
    starts: int = 1
    relaxed_steps: int = 60
    relaxed_probes: int = 8
    learning_rate: float = 0.1
    rough_probes: int = 6
    rounds: int = 2
    lines: int = 6
    coarse_probes: int = 2
    proposals: int = 16
    patience: int = 2
    step_probes: int = 12
    final_probes: int = 24
    margin: float = 0.05
    loss: str = "l2"

    def __post_init__(self) -> None:
        least = {"starts": 0, "relaxed_steps": 1, "relaxed_probes": 1, "rough_probes": 1}
        least |= {"rounds": 0, "lines": 2, "coarse_probes": 1, "proposals": 1, "patience": 1}
        least |= {"step_probes": 1, "final_probes": 1}
        for key, bound in least.items():
            if getattr(self, key) < bound:
                raise DiveFastError(f"{key} must be at least {bound}, got {getattr(self, key)}.")
        if not self.learning_rate > 0:
            raise DiveFastError(f"learning_rate must be above 0, got {self.learning_rate}.")
        if not 0 <= self.margin < 1:
            raise DiveFastError(f"margin must be in [0, 1), got {self.margin}.")

    def search(self, board: Board) -> Steps:
        k = len(board.probes)
        rough, steps, final = (
            torch.arange(min(n, k))
            for n in (self.rough_probes, self.step_probes, self.final_probes)
        )
        begun = items = yield from self._begin(board, rough)
        loss = float((yield from measure(board, [items], rough))[0])
        whole: set[Box] = set()
        items, loss = yield from self._revise(board, items, loss, rough, whole)
        placed, loss = yield from self._add(board, items, loss, rough)
        if placed != items:
            placed, loss = yield from self._revise(board, placed, loss, rough, whole)
        items = yield from best_classes(board, placed, steps)
        loss = float((yield from measure(board, [items], steps))[0])
        for i in range(len(items)):
            items, loss = yield from slide(board, items, i, loss, steps, 1)
        answer = yield from settle(board, items, final, self.margin)
        answer.trace.update(begun=begun, placed=placed)
        return answer

    def _begin(self, board: Board, rough: Tensor) -> Steps:
        """The best layout of a relaxed search, without its classes."""
        if self.starts == 0:
            return ()
        relaxed = InvertLayout(
            starts=self.starts,
            steps=self.relaxed_steps,
            step_probes=self.relaxed_probes,
            learning_rate=self.learning_rate,
        )
        met, _ = yield from relaxed.relax(board)
        likely = sorted(met, key=met.__getitem__)[:FINALISTS]
        losses = yield from measure(board, likely, rough)
        best = likely[int(losses.argmin())]
        return drop_duplicates(tuple(item._replace(class_id=ANY) for item in best))

    def _add(self, board: Board, items: Items, loss: float, rough: Tensor) -> Steps:
        """Objects where coarse boxes explain what is not explained yet; layout and loss."""
        if len(items) == board.format.max_objects:
            return items, loss
        boxes = coarse_boxes(board.format.grid, self.lines)
        coarse = rough[: self.coarse_probes]
        alone = yield from measure(board, [(Item(ANY, box),) for box in boxes], coarse)
        ranked = [boxes[i] for i in alone.argsort().tolist()]
        refused: set[Box] = set()
        while len(items) < board.format.max_objects and len(refused) < self.patience:
            free = [box for box in ranked if box not in refused and not _explained(box, items)]
            if not free:
                break
            layouts = [(*items, Item(ANY, box)) for box in free[: self.proposals]]
            found = yield from measure(board, layouts, rough)
            best = int(found.argmin())
            start = float(found[best])
            layout, better = yield from slide(
                board, layouts[best], len(items), start, rough, _far(board)
            )
            if not better < loss * (1 - self.margin):
                refused.add(free[best])
                continue
            refused.clear()
            items, loss = yield from self._split(board, layout, len(items), better, rough)
        return items, loss

    def _split(self, board: Board, items: Items, i: int, loss: float, rough: Tensor) -> Steps:
        """Object i in as many parts as explain more than fewer do; layout and loss."""
        todo = [i]
        while todo:
            i = todo.pop()
            parts, better = yield from split(board, items, i, loss, rough, self.margin)
            if parts == items:
                continue
            for j in (i, i + 1):
                parts, better = yield from slide(board, parts, j, better, rough, 1)
            items, loss = parts, better
            todo = [j + 1 if j > i else j for j in todo] + [i, i + 1]
        return items, loss

    def _revise(
        self, board: Board, items: Items, loss: float, rough: Tensor, whole: set[Box]
    ) -> Steps:
        """All objects moved, split, joined and removed, with all others in place; and the loss.

        Args:
            whole: boxes that were not worth splitting; those found here are added.
        """
        far = _far(board)
        for _ in range(self.rounds):
            before = items
            for i in range(len(items)):
                items, loss = yield from slide(board, items, i, loss, rough, far)
            items, loss = yield from join(board, items, loss, rough, self.margin)
            for box in [item.box for item in items if item.box not in whole]:
                places = [j for j, item in enumerate(items) if item.box == box]
                if places:
                    items, loss = yield from self._split(board, items, places[0], loss, rough)
                    whole.add(box)
            if set(items) == set(before):
                break
            far = 1
        return items, loss


def coarse_boxes(grid: int, lines: int) -> list[Box]:
    """All boxes whose sides lie on ``lines`` evenly spread lines of the grid."""
    places = sorted({round(i * (grid - 1) / (lines - 1)) for i in range(lines)})
    spans = list(combinations(places, 2))
    return [Box(left, top, right, bottom) for left, right in spans for top, bottom in spans]


def _far(board: Board) -> int:
    """The first step of a side."""
    return max(2, (board.format.grid - 1) // FAR)


def _explained(box: Box, items: Items) -> bool:
    return any(overlap(box, item.box) > EXPLAINED for item in items)
