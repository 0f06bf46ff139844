"""Layouts as a search sees them: objects on the grid, their conditions, and what they cost."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from dive_fast.core.layouts import LayoutFormat
from dive_fast.core.probes import ProbeList, low_discrepancy_probes
from dive_fast.core.projection import SLOTS_PER_OBJECT
from dive_fast.core.requests import Losses, Request
from dive_fast.errors import DiveFastError
from dive_fast.strategies.base import Strategy
from dive_fast.strategies.layout.boxes import Box

DEFAULT_PROBES = 48
T_RANGE = (0.1, 0.6)
ANY = -1  # the mean of all classes' embeddings, in place of a class


class Item(NamedTuple):
    """An object: a class, or ANY, and where it is."""

    class_id: int
    box: Box


Items = tuple[Item, ...]
# A search: yields requests, is sent what the engine found, returns an answer.
Steps = Generator[Request, Any, Any]


class LayoutStrategy(Strategy, Protocol):
    """A ``Strategy`` that searches for layouts."""

    def search(self, board: Board) -> Steps:
        """A generator that yields requests for one image and returns a ``LayoutAnswer``."""
        ...


class Penalty(Protocol):
    """What a search asks of a prior."""

    def __call__(self, v: Tensor) -> Tensor:
        """Token embeddings [N, S, D] to [N], differentiable."""
        ...

    def of_tokens(self, tokens: Tensor) -> Tensor:
        """Tokens int64 [N, S], -1 for one that is not known, to float64 [N]."""
        ...


class LayoutProbes:
    """Mixin: K probes (48 unless said), low-discrepancy in the middle of the schedule; the margin.

    t lies in [0.1, 0.6) T: below, the layout says little that x_t does not show; above, x_t shows
    too little.

    Attributes:
        margin: share of the loss that an object has to explain; None for the usual one.
    """

    usual_margin: ClassVar[float]
    margin: float | None

    @property
    def least_share(self) -> float:
        """The margin, or the usual one."""
        return self.usual_margin if self.margin is None else self.margin

    def check_margin(self) -> None:
        """Raises a DiveFastError where it is none."""
        if self.margin is not None and not 0 <= self.margin < 1:
            raise DiveFastError(f"margin must be in [0, 1), got {self.margin}.")

    def probes(
        self, k: int | None, n_timesteps: int, shape: tuple[int, ...], seed: int
    ) -> ProbeList:
        k = DEFAULT_PROBES if k is None else k
        whole = low_discrepancy_probes(k, 1000, shape, seed, antithetic=False)
        low, high = (share * n_timesteps for share in T_RANGE)
        return replace(whole, timesteps=(low + whole.timesteps / 1000 * (high - low)).long())


@dataclass(frozen=True)
class LayoutAnswer:
    """What a search found for one image.

    Attributes:
        items: the objects.
        losses: float64 [n, C + 1], for each object the mean loss (with the prior's part) of the
            layout when it is of class c, and last when it is not there, all on common probes.
        loss: of the layout as it is, on the same probes.
        trace: what the search saw on its way.
    """

    items: Items
    losses: Tensor
    loss: float
    trace: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Board:
    """What a search knows of the one image it works for.

    Attributes:
        table: float32 [V, D], the tokens' embeddings.
        layout_format: how layouts are written as tokens.
        probes: the probe list; requests name its rows.
        seed: for searches that draw at random.
        penalty: the prior's part of the loss (``dive_fast.priors.LayoutPenalty``); None for no
            prior.
    """

    table: Tensor
    layout_format: LayoutFormat
    probes: ProbeList
    seed: int = 0
    penalty: Penalty | None = None

    def conditions(self, layouts: Sequence[Items]) -> Tensor:
        """Token embeddings of layouts, float32 [N, S, D]."""
        return torch.stack([self._condition(items) for items in layouts])

    def price(self, layouts: Sequence[Items]) -> Tensor:
        """What the prior adds to the mean loss of layouts, float64 [N]."""
        if self.penalty is None:
            return torch.zeros(len(layouts), dtype=torch.float64)
        return self.penalty.of_tokens(torch.stack([self._tokens(items) for items in layouts]))

    def items(self, tokens: Tensor) -> Items:
        """The objects that tokens [S] mean; triples that are no valid box are left out."""
        objects = zip(*(each.tolist() for each in self.layout_format.read(tokens)), strict=True)
        items = (Item(c, Box(*sides)) for c, sides in objects if c >= 0)
        return tuple(
            item
            for item in items
            if item.box.left < item.box.right and item.box.top < item.box.bottom
        )

    def _condition(self, items: Items) -> Tensor:
        tokens = self._tokens(items)
        found = self.table[tokens.clamp_min(0)]
        found[tokens < 0] = self.table[slice(*self.layout_format.class_range)].mean(dim=0)
        return found

    def _tokens(self, items: Items) -> Tensor:
        """int64 [S]; -1 for the class of an object of ANY class."""
        classes = torch.tensor([item.class_id for item in items], dtype=torch.int64)
        sides = torch.tensor([item.box for item in items], dtype=torch.int64).view(-1, 4)
        tokens = self.layout_format.write(classes.clamp_min(0), sides)
        of_any = (classes == ANY).nonzero()[:, 0]
        tokens[SLOTS_PER_OBJECT * of_any] = -1
        return tokens


def measure(board: Board, layouts: Sequence[Items], probe_ids: Tensor) -> Steps:
    """The mean loss of each layout with the prior's part, float64 [N]."""
    losses = yield Losses(board.conditions(layouts).flatten(1), probe_ids)
    return losses.double().mean(dim=1) + board.price(layouts)


def replaced(items: Items, i: int, *new: Item) -> Items:
    """The layout with others in place of object i."""
    return (*items[:i], *new, *items[i + 1 :])


def without(items: Items, i: int) -> Items:
    return replaced(items, i)


def with_box(items: Items, i: int, box: Box) -> Items:
    return replaced(items, i, items[i]._replace(box=box))


def with_class(items: Items, i: int, class_id: int) -> Items:
    return replaced(items, i, items[i]._replace(class_id=class_id))
