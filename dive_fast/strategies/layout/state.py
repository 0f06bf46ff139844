"""Where a discrete search is, and its moves: boxes that slide, split, join, and get classes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from torch import Tensor

from dive_fast.strategies.layout.board import (
    ANY,
    Board,
    Item,
    Items,
    Steps,
    measure,
    replaced,
    with_box,
    with_class,
    without,
)
from dive_fast.strategies.layout.boxes import Box, halves, neighbours, small_step, touching, union
from dive_fast.strategies.layout.residual import height, residual

CONTENT = 0.1  # share of the error map's height; what holds something
FINAL_CUTS = 2  # that are measured with classes


@dataclass
class State:
    """The layout that a search is at. Its moves are generators of requests that change it.

    A move measures a few layouts and goes to the best one if the loss says so; all measurements
    are on the same probes.

    Attributes:
        board: the image's.
        probe_ids: int64 [k], rows of the probe list.
        margin: share of the loss that an object has to explain.
        unexplained: float32 [G - 1, G - 1], the error map of the layout without objects.
        most: objects of a layout at most; the model's number of slots unless said.
        items: the layout.
        loss: its mean loss on the probes, with the prior's part; infinite before the first
            measurement.
    """

    board: Board
    probe_ids: Tensor
    margin: float
    unexplained: Tensor
    items: Items = ()
    loss: float = math.inf
    most: int | None = None

    @property
    def peak(self) -> float:
        """The height of ``unexplained``."""
        return height(self.unexplained)

    @property
    def content(self) -> Tensor:
        """Cells that hold something, bool [G - 1, G - 1]."""
        return self.unexplained > CONTENT * self.peak

    @property
    def small_step(self) -> int:
        """What counts as a small step of a side, in lines of the grid."""
        return small_step(self.board.layout_format.grid)

    @property
    def is_full(self) -> bool:
        """Whether there may be no further object."""
        slots = self.board.layout_format.max_objects
        return len(self.items) >= (slots if self.most is None else self.most)

    def measure(self, layouts: Sequence[Items]) -> Steps:
        """The mean loss of each layout with the prior's part, float64 [N]."""
        return measure(self.board, layouts, self.probe_ids)

    def residual(self) -> Steps:
        """The error map of the layout, float32 [G - 1, G - 1]."""
        return residual(self.board, self.items, self.probe_ids)

    def choose(self, layouts: Sequence[Items]) -> Steps:
        """Goes to the best of some layouts, whatever the loss was."""
        losses = yield from self.measure(layouts)
        best = int(losses.argmin())
        self.items, self.loss = layouts[best], float(losses[best])

    def slide(self, i: int, step: int) -> Steps:
        """Moves the sides of object i while that lowers the loss.

        Every side is tried ``step`` lines out and in, and the whole box in four directions. Sides
        hardly depend on each other: all that help alone are moved together where that helps more.
        When nothing helps, half of the step, down to one line.
        """
        while step >= 1:
            box = self.items[i].box
            boxes = neighbours(box, step, self.board.layout_format.grid)
            if not boxes:  # no room on a small grid
                step //= 2
                continue
            losses = yield from self.measure([with_box(self.items, i, b) for b in boxes])
            best = int(losses.argmin())
            if not losses[best] < self.loss:  # NaN ends it too
                step //= 2
                continue
            better, loss = boxes[best], float(losses[best])
            together = _together(box, boxes, losses, self.loss)
            if together is not None and together != better:
                (joint,) = yield from self.measure([with_box(self.items, i, together)])
                if joint < loss:
                    better, loss = together, float(joint)
            self.items, self.loss = with_box(self.items, i, better), loss

    def split(self, i: int) -> Steps:
        """Object i as two, cut where that lowers the loss most, if by more than ``margin`` of it.

        Both parts shrink to their content.

        Returns:
            whether it is two now, i and i + 1.
        """
        if self.is_full:
            return False
        layouts = [
            replaced(self.items, i, *(self.items[i]._replace(box=part) for part in parts))
            for parts in halves(self.items[i].box, self.content)
        ]
        return (yield from self._improve(layouts, self.margin))

    def split_all(self) -> Steps:
        """Every object in as many parts as explain more than fewer do."""
        todo = list(range(len(self.items)))
        while todo:
            # The last one first: a split moves none that are still to do.
            i = todo.pop()
            if (yield from self.split(i)):
                todo += [i, i + 1]

    def recut(self) -> Steps:
        """Two objects that touch, cut elsewhere, while that lowers the loss."""
        tried: set[tuple[Item, Item]] = set()
        better = True
        while better:
            layouts = []
            for i, j in self._touching():
                first, second = pair = self.items[i], self.items[j]
                if pair in tried:
                    continue
                tried.add(pair)
                for a, b in halves(union(first.box, second.box), self.content):
                    layouts.append(with_box(with_box(self.items, i, a), j, b))
            better = yield from self._improve(layouts, 0.0)

    def join(self) -> Steps:
        """Two objects as one, or one object less, while that costs no more than ``margin``."""
        better = True
        while better and self.items:
            layouts = [without(self.items, i) for i in range(len(self.items))]
            for i, j in combinations(range(len(self.items)), 2):
                layouts.append(self._joined(i, j, self.items[i].class_id))
            better = yield from self._improve(layouts, -self.margin)

    def join_as_class(self) -> Steps:
        """Two objects that touch as one of any class, while that costs no more than ``margin``."""
        better = True
        while better:
            layouts = [self._joined(i, j, c) for i, j in self._touching() for c in self._classes()]
            better = yield from self._improve(layouts, -self.margin)

    def split_as_classes(self, i: int) -> Steps:
        """Object i as two of any classes, if that lowers the loss by more than ``margin`` of it.

        The best ``FINAL_CUTS``, of two objects of no known class, get classes: the first part
        beside such a second one, then the second.
        """
        if self.is_full:
            return
        cuts = [
            replaced(self.items, i, *(Item(ANY, part) for part in parts))
            for parts in halves(self.items[i].box, self.content)
        ]
        if not cuts:
            return
        few = self.probe_ids[: max(1, len(self.probe_ids) // 2)]
        losses = yield from measure(self.board, cuts, few)
        best = [cuts[k] for k in losses.argsort()[:FINAL_CUTS].tolist()]
        for part in (i, i + 1):
            named = [[with_class(cut, part, c) for c in self._classes()] for cut in best]
            losses = yield from self.measure([layout for row in named for layout in row])
            chosen = losses.view(len(best), -1).argmin(dim=1).tolist()
            best = [row[c] for row, c in zip(named, chosen, strict=True)]
        yield from self._improve(best, self.margin)

    def add(self, boxes: Sequence[Box], step: int) -> Steps:
        """Another object in the best of some boxes, if that lowers the loss by over ``margin``.

        Args:
            step: the first one of its sides, in lines of the grid.

        Returns:
            whether there is one more now, the last one.
        """
        tried = replace(self)
        yield from tried.choose([(*self.items, Item(ANY, box)) for box in boxes])
        yield from tried.slide(len(self.items), step)
        if not tried.loss < self.loss * (1 - self.margin):
            return False
        self.items, self.loss = tried.items, tried.loss
        return True

    def classify(self) -> Steps:
        """The best class for each object, one after the other, all others in place."""
        for i in range(len(self.items)):
            yield from self.choose([with_class(self.items, i, c) for c in self._classes()])
        yield from self.choose([self.items])

    def _improve(self, layouts: Sequence[Items], margin: float) -> Steps:
        """Goes to the best of some layouts if it is another one and better by ``margin``.

        Returns:
            whether it did.
        """
        if not layouts:
            return False
        losses = yield from self.measure(layouts)
        best = int(losses.argmin())
        if layouts[best] == self.items or not losses[best] < self.loss * (1 - margin):
            return False
        self.items, self.loss = layouts[best], float(losses[best])
        return True

    def _joined(self, i: int, j: int, class_id: int) -> Items:
        """The layout with objects i < j as one of a class."""
        whole = Item(class_id, union(self.items[i].box, self.items[j].box))
        return replaced(without(self.items, j), i, whole)

    def _touching(self) -> list[tuple[int, int]]:
        return touching([item.box for item in self.items], self.board.layout_format.grid)

    def _classes(self) -> range:
        return range(len(self.board.layout_format.names))


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
