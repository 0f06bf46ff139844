"""The discrete projection of slot-structured embeddings: layouts, and the single class.

A relaxed condition is a sequence of slots, each of which must become a row of one table. Slots that
belong to one object are tied: either all of them are the row "none", or each is a row of its own
range. Because slots and objects do not interact otherwise, taking the cheaper of the two for every
object is the exact projection on the set of valid sequences.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dive_fast import ops
from dive_fast.errors import DiveFastError

SLOTS_PER_OBJECT = 3  # class, top-left token, bottom-right token
ROWS_AT_ONCE = 4096  # of a table in float64


@dataclass(frozen=True)
class DiscreteProjection:
    """Projects relaxed embeddings [B, S, D] on the rows that each slot may take.

    Attributes:
        table: the vocabulary, [V, D], shared by all slots.
        ranges: the rows `start <= r < stop` of each slot, int64 [S, 2].
        none: the row that means "no object", outside all ranges of objects' slots; or None.
        objects: the slots of each object, int64 [O, n], all none or none of them none; or None.
        metric: "l2" or "cosine". What is minimised over a sequence is the sum over its slots of
            the squared Euclidean distance, or of 1 - cosine similarity.
        min_size: if given, the last two slots of every object are the corners of a box on a square
            grid, tokens y * G + x, whose ranges have G * G rows; they are then projected jointly,
            on the boxes at least `min_size` steps high and wide (`ops.nearest_box`).

    Raises:
        DiveFastError: the parts do not fit together.
    """

    table: Tensor
    ranges: Tensor
    none: int | None = None
    objects: Tensor | None = None
    metric: str = "l2"
    min_size: int | tuple[int, int] | None = None

    def __post_init__(self) -> None:
        rows = self.table.shape[0] if self.table.dim() == 2 else 0
        if rows == 0:
            _fail("table must have shape [V, D] with V at least 1", list(self.table.shape))
        if self.metric not in ops.METRICS:
            _fail(f"metric must be one of {', '.join(ops.METRICS)}", repr(self.metric))
        _check_ranges(self.ranges, rows)
        if (self.none is None) != (self.objects is None):
            _fail("none and objects must be given together", "one of them")
        if self.objects is not None:
            self._check_objects(rows)
        if self.min_size is not None:
            self._check_boxes()

    @classmethod
    def single(cls, table: Tensor, metric: str = "l2") -> DiscreteProjection:
        """One slot that may be any row: a class condition."""
        return cls(table, torch.tensor([[0, len(table)]]), metric=metric)

    @classmethod
    def layout(
        cls,
        table: Tensor,
        n_objects: int,
        classes: tuple[int, int],
        coordinates: tuple[int, int],
        none: int,
        *,
        extra_coordinates: int = 0,
        metric: str = "l2",
        min_size: int | tuple[int, int] | None = None,
    ) -> DiscreteProjection:
        """Triples (class, top-left, bottom-right), then `extra_coordinates` slots never none.

        Args:
            classes, coordinates: the rows [start, stop) of the table that mean them.
            extra_coordinates: such as the two crop tokens of layout-to-image models.
        """
        if n_objects < 1 or extra_coordinates < 0:
            _fail("n_objects must be at least 1", f"{n_objects} and {extra_coordinates} extra")
        triple = [classes, coordinates, coordinates]
        ranges = torch.tensor(triple * n_objects + [coordinates] * extra_coordinates)
        objects = torch.arange(SLOTS_PER_OBJECT * n_objects).view(n_objects, SLOTS_PER_OBJECT)
        return cls(table, ranges, none, objects, metric, min_size)

    def __call__(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """Projects, with a straight-through gradient.

        Args:
            v: relaxed embeddings, [B, S, D], of the dtype and device of the table.

        Returns:
            the rows, [B, S, D], differentiable in `v` (dP/dv = 1), and their index, int64 [B, S].

        Raises:
            DiveFastError: `v` has another shape, dtype or device.
        """
        index = self.index(v)
        return self.table[index] + (v - v.detach()), index

    def index(self, v: Tensor) -> Tensor:
        """The row of every slot of `v` [B, S, D], int64 [B, S]."""
        slots, dim = self.ranges.shape[0], self.table.shape[1]
        if v.dim() != 3 or tuple(v.shape[1:]) != (slots, dim):
            _fail(f"v must have shape [B, {slots}, {dim}]", list(v.shape))
        v = v.detach()
        index = torch.empty(v.shape[:2], dtype=torch.int64, device=v.device)
        alone = self._alone().to(v.device)
        index[:, alone], cost = self._nearest(v[:, alone], alone)
        if self.objects is None:
            return index
        objects = self.objects.to(v.device)
        costs = cost.new_zeros(index.shape)
        costs[:, alone] = cost
        present = costs[:, objects].sum(dim=2)  # [B, O]
        if self.min_size is not None:
            index[:, objects[:, -2:]], box_cost = self._boxes(v, objects)
            present = present + box_cost
        absent = self._cost_of_none(v)[:, objects].sum(dim=2)  # [B, O]
        # An equal cost keeps the object.
        is_absent = (absent < present)[:, :, None].expand(-1, -1, objects.shape[1])
        index[:, objects] = torch.where(is_absent, self.none, index[:, objects])
        return index

    def _alone(self) -> Tensor:
        """The slots that are projected by themselves: all but the corners of joint boxes."""
        slots = torch.ones(len(self.ranges), dtype=torch.bool)
        if self.min_size is not None:
            slots[self.objects[:, -2:]] = False
        return slots.nonzero()[:, 0]

    def _nearest(self, v: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest row of every embedding `v` [B, n, D] of n slots, and its cost, [B, n]."""
        allowed = self.ranges.to(v.device)[slots].repeat(v.shape[0], 1)
        flat, distance = ops.nearest_row(
            v.flatten(0, 1), self.table, allowed=allowed, metric=self.metric
        )
        return flat.view(v.shape[:2]), self._cost(distance).view(v.shape[:2])

    def _cost(self, distance: Tensor) -> Tensor:
        return distance.square() if self.metric == "l2" else distance

    def _cost_of_none(self, v: Tensor) -> Tensor:
        """The cost of the row "none" in every slot, [B, S]."""
        _, distance = ops.nearest_row(
            v.flatten(0, 1), self.table[self.none : self.none + 1], metric=self.metric
        )
        return self._cost(distance).view(v.shape[:2])

    def _boxes(self, v: Tensor, objects: Tensor) -> tuple[Tensor, Tensor]:
        """The rows [B, O, 2] of the nearest valid boxes, and their cost [B, O]."""
        start, stop = self.ranges[self.objects[0, -1]].tolist()
        grid, rows = math.isqrt(stop - start), self.table[start:stop]
        both = torch.cat([v[:, objects[:, i]].flatten(0, 1) for i in (-2, -1)])
        tl, br = self._costs_of_rows(both, rows).view(2, -1, grid, grid)
        tokens_tl, tokens_br, cost = ops.nearest_box(tl, br, self.min_size)
        corners = torch.stack([tokens_tl, tokens_br], dim=1) + start
        return corners.view(*v.shape[:1], len(objects), 2), cost.view(v.shape[0], len(objects))

    def _costs_of_rows(self, v: Tensor, rows: Tensor) -> Tensor:
        """The cost of every row [G G, D] for every embedding of `v` [N, D], float64 [N, G G].

            |v - r|^2 = |v|^2 - 2 v . r + |r|^2

        In float64, where this form loses no digits that `v` and the rows have.
        """
        v = v.double()
        length = v.norm(dim=1)[:, None]
        parts = []
        for chunk in rows.split(ROWS_AT_ONCE):
            r = chunk.double()
            products, lengths = v @ r.T, r.norm(dim=1)
            if self.metric == "l2":
                parts.append((length.square() - 2 * products + lengths.square()).clamp(min=0))
            else:
                both = length * lengths
                parts.append(1 - torch.where(both == 0, 0, products / both))
        return torch.cat(parts, dim=1)

    def _check_objects(self, rows: int) -> None:
        objects, slots = self.objects, self.ranges.shape[0]
        if objects.dtype != torch.int64 or objects.dim() != 2 or objects.numel() == 0:
            _fail("objects must be int64 of shape [O, n]", f"{objects.dtype} {list(objects.shape)}")
        flat = objects.flatten()
        if flat.min() < 0 or flat.max() >= slots or flat.unique().numel() != flat.numel():
            _fail(f"objects must hold different slots in [0, {slots})", flat.tolist())
        if not 0 <= self.none < rows:
            _fail(f"none must be in [0, {rows})", self.none)
        ranges = self.ranges[flat]
        if ((ranges[:, 0] <= self.none) & (self.none < ranges[:, 1])).any():
            _fail("none must be outside the ranges of the objects' slots", self.none)

    def _check_boxes(self) -> None:
        if self.objects is None or self.objects.shape[1] < 2:
            _fail("min_size needs objects of at least two slots", self.objects)
        corners = self.ranges[self.objects[:, -2:].flatten()]
        rows = int(corners[0, 1] - corners[0, 0])
        if (corners != corners[0]).any() or math.isqrt(rows) ** 2 != rows:
            _fail("the corners' ranges must be one square grid of rows", corners[0].tolist())


def _check_ranges(ranges: Tensor, rows: int) -> None:
    if ranges.dtype != torch.int64 or ranges.dim() != 2 or ranges.shape[1] != 2 or len(ranges) < 1:
        _fail("ranges must be int64 of shape [S, 2]", f"{ranges.dtype} {list(ranges.shape)}")
    if (ranges[:, 0] < 0).any() or (ranges[:, 0] >= ranges[:, 1]).any() or ranges.max() > rows:
        _fail(f"ranges must be non-empty and within [0, {rows})", ranges.tolist())


def _fail(expected: str, got: object) -> None:
    raise DiveFastError(f"DiscreteProjection: {expected}, but got {got}")
