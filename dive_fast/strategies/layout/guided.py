"""``guided``: places read off the error map, then moves that are measured exactly.

What the layout without objects does not explain is where objects are. One error map so gives the
places of all objects that stand apart, for a few evaluations; of those that touch, discrete steps
find the borders.
"""

from __future__ import annotations

from dataclasses import dataclass
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
)
from dive_fast.strategies.layout.invert import InvertLayout
from dive_fast.strategies.layout.moves import (
    join,
    join_as_class,
    recut,
    slide,
    split,
    split_as_classes,
    unit,
)
from dive_fast.strategies.layout.residual import height, regions, residual
from dive_fast.strategies.layout.settle import best_classes, drop_duplicates, settle

LEVELS = (0.05, 0.2, 0.4)  # shares of the map's height; where regions begin
CONTENT = 0.1  # share of the map's height; what holds something
FINALISTS = 8  # layouts of the relaxed search that are compared
PROPOSALS = 6  # regions that are measured before an object is added
DOUBTFUL = 0.1  # share of the error in an object's place that it leaves, if it may be two
FAR = 2  # first steps of a new object's sides, in small steps


@dataclass(frozen=True)
class Guided(LayoutProbes):
    """Places read off an error map, then discrete steps, each measured exactly.

    1. The error map of the layout without objects, cut at several heights, gives regions; the
       layout of a region each that explains the image best is the beginning. Until step 4 every
       object has the mean of the classes' embeddings.
    2. Objects are split where that helps, joined with others or removed where that costs no more
       than ``margin`` of the loss, and their sides are moved as long as that helps; for ``rounds``
       rounds or until nothing changes. Two that touch are cut elsewhere where that helps.
    3. While a slot is free, the error map of the layout so far gives regions that are not explained
       yet; the best one is added if the loss falls by more than ``margin`` of it. Then 2 again.
    4. On more probes every object gets a class, two that touch become one of any class where that
       costs no more than ``margin``, one that leaves much of its place unexplained two of any
       classes where that helps by more; sides are moved once more, and every object is decided: of
       another class, or not there (``settle``).

    Attributes:
        starts: of a relaxed search (``InvertLayout``) whose best layouts compete with the regions;
            for models whose error maps do not show objects.
        relaxed_steps, relaxed_probes, learning_rate: of the relaxed search.
        rough_probes: of the maps and the measurements until step 4.
        rounds: of step 2 at most.
        step_probes, final_probes: of step 4 until the decisions, and of the decisions.
        margin: share of the loss that an object has to explain.
        loss: "l2", "l1" or "huber".
    """

    name: ClassVar[str] = "guided"
    starts: int = 0
    relaxed_steps: int = 60
    relaxed_probes: int = 8
    learning_rate: float = 0.1
    rough_probes: int = 6
    rounds: int = 2
    step_probes: int = 12
    final_probes: int = 24
    margin: float = 0.05
    loss: str = "l2"

    def __post_init__(self) -> None:
        least = {"starts": 0, "relaxed_steps": 1, "relaxed_probes": 1, "rough_probes": 1}
        least |= {"rounds": 0, "step_probes": 1, "final_probes": 1}
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
        unexplained = yield from residual(board, (), rough)
        peak = height(unexplained)
        content = unexplained > CONTENT * peak
        begun, loss = yield from self._begin(board, unexplained, rough)
        items, loss = yield from self._revise(board, begun, loss, rough, content)
        placed, loss = yield from self._add(board, items, loss, rough, peak)
        if placed != items:
            placed, loss = yield from self._revise(board, placed, loss, rough, content)
        items = yield from best_classes(board, placed, steps)
        loss = float((yield from measure(board, [items], steps))[0])
        items, loss = yield from join_as_class(board, items, loss, steps, self.margin)
        items, loss = yield from self._divide(board, items, loss, steps, unexplained)
        for i in range(len(items)):
            items, loss = yield from slide(board, items, i, loss, steps, 1)
        answer = yield from settle(board, items, final, self.margin)
        answer.trace.update(begun=begun, placed=placed)
        return answer

    def _begin(self, board: Board, unexplained: Tensor, rough: Tensor) -> Steps:
        """The best layout of regions, or of a relaxed search; and its loss."""
        most = board.format.max_objects
        layouts = [
            tuple(
                Item(ANY, box) for box in regions(unexplained, share * height(unexplained))[:most]
            )
            for share in LEVELS
        ]
        if self.starts:
            layouts += yield from self._relaxed(board)
        layouts = list(dict.fromkeys(layouts))
        losses = yield from measure(board, layouts, rough)
        best = int(losses.argmin())
        return layouts[best], float(losses[best])

    def _relaxed(self, board: Board) -> Steps:
        """The best layouts of a relaxed search, without their classes."""
        relaxed = InvertLayout(
            starts=self.starts,
            steps=self.relaxed_steps,
            step_probes=self.relaxed_probes,
            learning_rate=self.learning_rate,
        )
        met, _ = yield from relaxed.relax(board)
        likely = sorted(met, key=met.__getitem__)[:FINALISTS]
        return [
            drop_duplicates(tuple(item._replace(class_id=ANY) for item in items))
            for items in likely
        ]

    def _revise(
        self, board: Board, items: Items, loss: float, rough: Tensor, content: Tensor
    ) -> Steps:
        """Objects split, joined, removed and moved, with all others in place; and the loss."""
        step = unit(board.format.grid)
        for _ in range(self.rounds):
            before = items
            items, loss = yield from join(board, items, loss, rough, self.margin)
            items, loss = yield from self._split(board, items, loss, rough, content)
            items, loss = yield from join(board, items, loss, rough, self.margin)
            for i in range(len(items)):
                items, loss = yield from slide(board, items, i, loss, rough, step)
            if set(items) == set(before):
                break
        return (yield from recut(board, items, loss, rough, content))

    def _split(
        self, board: Board, items: Items, loss: float, rough: Tensor, content: Tensor
    ) -> Steps:
        """Every object in as many parts as explain more than fewer do; layout and loss."""
        todo = list(range(len(items)))
        while todo:
            i = todo.pop()
            parts, better = yield from split(board, items, i, loss, rough, self.margin, content)
            if parts != items:
                items, loss = parts, better
                todo = [j + 1 if j > i else j for j in todo] + [i, i + 1]
        return items, loss

    def _divide(
        self, board: Board, items: Items, loss: float, probe_ids: Tensor, unexplained: Tensor
    ) -> Steps:
        """Objects that leave much of their place unexplained, as two with classes."""
        content = unexplained > CONTENT * height(unexplained)
        tried: set[Item] = set()
        while True:
            left = (yield from residual(board, items, probe_ids)) if items else unexplained
            todo = [
                i
                for i, item in enumerate(items)
                if item not in tried and _share(left, unexplained, item.box) > DOUBTFUL
            ]
            if not todo:
                return items, loss
            i = max(todo, key=lambda i: _share(left, unexplained, items[i].box))
            tried.add(items[i])
            items, loss = yield from split_as_classes(
                board, items, i, loss, probe_ids, self.margin, content
            )

    def _add(self, board: Board, items: Items, loss: float, rough: Tensor, peak: float) -> Steps:
        """Objects where the layout does not explain the image yet; layout and loss."""
        while len(items) < board.format.max_objects:
            left = yield from residual(board, items, rough)
            boxes = regions(left, LEVELS[1] * peak)[:PROPOSALS]
            if not boxes:
                break
            layouts = [(*items, Item(ANY, box)) for box in boxes]
            losses = yield from measure(board, layouts, rough)
            best = int(losses.argmin())
            layout, better = yield from slide(
                board,
                layouts[best],
                len(items),
                float(losses[best]),
                rough,
                FAR * unit(board.format.grid),
            )
            if not better < loss * (1 - self.margin):
                break
            items, loss = layout, better
        return items, loss


def _share(left: Tensor, unexplained: Tensor, box: Box) -> float:
    """The part of the error in a box that is left."""
    inside = slice(box.top, box.bottom), slice(box.left, box.right)
    return float(left[inside].sum() / unexplained[inside].sum())
