"""Why a search found nothing: what its best place would have explained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from dive_fast.strategies.layout.board import ANY, Board, Item, Steps, measure
from dive_fast.strategies.layout.boxes import Box


@dataclass(frozen=True)
class Nothing:
    """What stood against an object at the places where the layout without any errs most.

    Attributes:
        places: how many were measured.
        share: of the loss, what an object of any class at the best of them explains; below 0 if it
            makes the loss higher.
        with_prior: the same with what the prior takes for it; None without a prior.
        margin: what an object has to explain.
    """

    places: int
    share: float
    with_prior: float | None
    margin: float

    def __str__(self) -> str:
        if self.places == 0:
            return "no place stands out in the error map of the layout without objects"
        best = f"the best of {self.places} places explains {self.share:.2%} of the loss"
        if self.share <= self.margin or self.with_prior is None:
            return f"{best}, and the margin asks for {self.margin:.2%}"
        return f"{best}, but {self.with_prior:.2%} after what the prior takes for an object"


def nothing_found(board: Board, boxes: Sequence[Box], probe_ids: Tensor, margin: float) -> Steps:
    """Measures an object of any class at each of some places, and returns a ``Nothing``.

    Args:
        boxes: the places, on the grid.
        probe_ids: int64 [k], rows of the board's probe list.
        margin: share of the loss that an object has to explain.
    """
    if not boxes:
        return Nothing(0, 0.0, None, margin)
    alone = replace(board, penalty=None)
    layouts = [(), *((Item(ANY, box),) for box in boxes)]
    losses = yield from measure(alone, layouts, probe_ids)
    share = float(1 - losses[1:].min() / losses[0])
    if board.penalty is None:
        return Nothing(len(boxes), share, None, margin)
    whole = losses + board.price(layouts)
    return Nothing(len(boxes), share, float(1 - whole[1:].min() / whole[0]), margin)
