"""``guided``: places read off the error map, then moves that are measured exactly.

What the layout without objects does not explain is where objects are. One error map so gives the
places of all objects that stand apart, for a few evaluations; of those that touch, discrete steps
find the borders.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from dive_fast.core.detection import Size, as_sizes
from dive_fast.errors import DiveFastError
from dive_fast.strategies.layout.board import ANY, Board, Item, LayoutProbes, Steps
from dive_fast.strategies.layout.boxes import Box
from dive_fast.strategies.layout.invert import InvertLayout
from dive_fast.strategies.layout.nothing import nothing_found
from dive_fast.strategies.layout.residual import regions, residual
from dive_fast.strategies.layout.scan import promising
from dive_fast.strategies.layout.settle import drop_duplicates, settle
from dive_fast.strategies.layout.state import State

LEVELS = (0.05, 0.2, 0.4)  # shares of the map's height; where regions begin
FINALISTS = 8  # layouts of the relaxed search that are compared
PROPOSALS = 6  # regions that are measured before an object is added
DOUBTFUL = 0.1  # share of the error in an object's place that it leaves, if it may be two
SHARES = {"rough_probes": 8, "step_probes": 4, "final_probes": 2}  # of the list, one in so many
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
       classes where that helps by more. Where ``sizes`` are known, windows of these sizes all over
       the image are tried beside what was found, and added as in 3 (``scan``). Sides are moved
       once more, and every object is decided: of another class, or not there (``settle``).

    Attributes:
        starts: of a relaxed search (``InvertLayout``) whose best layouts compete with the regions;
            for models whose error maps do not show objects.
        relaxed_steps, relaxed_probes, learning_rate: of the relaxed search.
        rough_probes: of the maps and the measurements until step 4; an eighth of the list if None.
        rounds: of step 2 at most.
        step_probes, final_probes: of step 4 until the decisions, and of the decisions; a quarter
            and a half of the list if None.
        margin: share of the loss that an object has to explain; None for what was fitted to the
            model, else 0.05.
        final_margin: share that it has to explain in the last decision, where a search that looks
            for little shall not answer with it; None for what was fitted, else ``margin``.
        max_objects: of an answer, where the model's own number is larger; None for the model's.
            Layouts beyond it are not looked at, so that it bounds what an image costs.
        sizes: usual widths and heights of objects, shares of the image, of which windows are
            scanned; None for what was fitted to the model, () for no scan.
        loss: "l2", "l1" or "huber".
    """

    name: ClassVar[str] = "guided"
    usual_margin: ClassVar[float] = 0.05
    starts: int = 0
    relaxed_steps: int = 60
    relaxed_probes: int = 8
    learning_rate: float = 0.1
    rough_probes: int | None = None
    rounds: int = 2
    step_probes: int | None = None
    final_probes: int | None = None
    margin: float | None = None
    max_objects: int | None = None
    sizes: tuple[Size, ...] | None = None
    final_margin: float | None = None
    loss: str = "l2"

    def __post_init__(self) -> None:
        least = {"starts": 0, "relaxed_steps": 1, "relaxed_probes": 1, "rough_probes": 1}
        least |= {"rounds": 0, "step_probes": 1, "final_probes": 1}
        for key, bound in least.items():
            if (value := getattr(self, key)) is not None and value < bound:
                raise DiveFastError(f"{key} must be at least {bound}, got {getattr(self, key)}.")
        if self.max_objects is not None and self.max_objects < 1:
            raise DiveFastError(f"max_objects must be at least 1, got {self.max_objects}.")
        if not self.learning_rate > 0:
            raise DiveFastError(f"learning_rate must be above 0, got {self.learning_rate}.")
        if self.sizes is not None:
            object.__setattr__(self, "sizes", as_sizes(self.sizes))
        self.check_margin()
        if self.final_margin is not None and not 0 <= self.final_margin < 1:
            raise DiveFastError(f"final_margin must be in [0, 1), got {self.final_margin}.")

    def counted(self, k: int) -> Guided:
        """With numbers of probes in place of None, for a list of k."""
        unsaid = {name: part for name, part in SHARES.items() if getattr(self, name) is None}
        return replace(self, **{name: max(1, k // part) for name, part in unsaid.items()})

    def search(self, board: Board) -> Steps:
        k = len(board.probes)
        counted = self.counted(k)
        rough, steps, final = (torch.arange(min(getattr(counted, name), k)) for name in SHARES)
        # 1. Regions of the error map.
        unexplained = yield from residual(board, (), rough)
        state = State(board, rough, self.least_share, unexplained, most=self._most(board))
        yield from self._begin(state)
        begun = state.items
        # 2. Objects that explain more.
        yield from self._revise(state)
        # 3. What is not explained yet.
        if (yield from self._add(state)):
            yield from self._revise(state)
        placed = state.items
        # 4. Classes, on more probes.
        state.probe_ids = steps
        yield from state.classify()
        yield from state.join_as_class()
        yield from self._divide(state)
        if (yield from self._scan(state)):
            yield from state.classify()
        for i in range(len(state.items)):
            yield from state.slide(i, step=1)
        least = self.least_share if self.final_margin is None else self.final_margin
        answer = yield from settle(board, state.items, final, least)
        answer.trace.update(begun=begun, placed=placed)
        if not answer.items:
            boxes = regions(unexplained, LEVELS[1] * state.peak)[:PROPOSALS]
            answer.trace["nothing"] = yield from nothing_found(board, boxes, steps, least)
        return answer

    def _most(self, board: Board) -> int:
        """Objects of a layout at most."""
        slots = board.layout_format.max_objects
        return slots if self.max_objects is None else min(slots, self.max_objects)

    def _begin(self, state: State) -> Steps:
        """The best layout of regions, or of a relaxed search."""
        found = [regions(state.unexplained, share * state.peak) for share in LEVELS]
        layouts = [tuple(Item(ANY, box) for box in boxes[: state.most]) for boxes in found]
        if self.starts:
            relaxed = yield from self._relaxed(state.board)
            layouts += [items[: state.most] for items in relaxed]
        yield from state.choose(list(dict.fromkeys(layouts)))

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

    def _revise(self, state: State) -> Steps:
        """Objects split, joined, removed and moved, with all others in place."""
        for _ in range(self.rounds):
            before = set(state.items)
            yield from state.join()
            yield from state.split_all()
            yield from state.join()
            for i in range(len(state.items)):
                yield from state.slide(i, state.small_step)
            if set(state.items) == before:
                break
        yield from state.recut()

    def _add(self, state: State) -> Steps:
        """Objects where the layout does not explain the image yet; whether there were any."""
        before = len(state.items)
        while not state.is_full:
            left = yield from state.residual()
            boxes = regions(left, LEVELS[1] * state.peak)[:PROPOSALS]
            if not boxes or not (yield from state.add(boxes, FAR * state.small_step)):
                break
        return len(state.items) > before

    def _scan(self, state: State) -> Steps:
        """Objects in windows all over the image; whether there were any."""
        before = len(state.items)
        if self.sizes and not state.is_full:
            for box in (yield from promising(state, self.sizes, PROPOSALS)):
                if not state.is_full:
                    yield from state.add([box], FAR * state.small_step)
        return len(state.items) > before

    def _divide(self, state: State) -> Steps:
        """Objects that leave much of their place unexplained, as two with classes."""
        tried: set[Item] = set()
        while state.items:
            left = yield from state.residual()
            shares = {
                i: share
                for i, item in enumerate(state.items)
                if item not in tried
                and (share := _share(left, state.unexplained, item.box)) > DOUBTFUL
            }
            if not shares:
                break
            worst = max(shares, key=shares.__getitem__)
            tried.add(state.items[worst])
            yield from state.split_as_classes(worst)


def _share(left: Tensor, unexplained: Tensor, box: Box) -> float:
    """The part of the error in a box that is left."""
    inside = slice(box.top, box.bottom), slice(box.left, box.right)
    return float(left[inside].sum() / unexplained[inside].sum())
