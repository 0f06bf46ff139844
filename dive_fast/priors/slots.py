"""The two kinds of slots of a layout: some hold classes, the others corners.

A slot holds one token of its kind or none, which counts as the last: C + 1 or G G + 1
possibilities. A corner is a column and a row, so what is learned of corners is learned of their
sides, 2 G + 1 possibilities, and neighbours on the grid share it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dive_fast.core.layouts import LayoutFormat
from dive_fast.core.projection import SLOTS_PER_OBJECT

CORNERS = 1  # in pairs; classes are 0


@dataclass(frozen=True)
class SlotKinds:
    """What the slots of a format hold; everything comes in pairs (of classes, of corners).

    Layouts may have fewer objects than the format, or more.
    """

    layout_format: LayoutFormat

    @property
    def ranges(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """The tokens of each kind, (start, stop)."""
        return self.layout_format.class_range, self.layout_format.coordinate_range

    @property
    def sizes(self) -> tuple[int, int]:
        """C + 1 and G G + 1."""
        classes, corners = (stop - start + 1 for start, stop in self.ranges)
        return classes, corners

    def slots(self, layouts: Tensor) -> tuple[Tensor, Tensor]:
        """Where each kind stands in layouts [B, S] or [B, S, D], int64, on their device."""
        slots = torch.arange(layouts.shape[1], device=layouts.device)
        is_crop = slots >= len(slots) - self.layout_format.crop_slots
        is_class = (slots % SLOTS_PER_OBJECT == 0) & ~is_crop
        return slots[is_class], slots[~is_class]

    def rows(self, table: Tensor) -> tuple[Tensor, Tensor]:
        """The rows [C + 1, D] and [G G + 1, D] of a table [V, D] that each kind can hold."""
        none = table[self.layout_format.none : self.layout_format.none + 1]
        classes, corners = (torch.cat([table[slice(*each)], none]) for each in self.ranges)
        return classes, corners

    def positions(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens [B, S] as numbers among the possibilities of their slots, int64 [B, n]."""
        found = []
        for slots, (start, stop) in zip(self.slots(tokens), self.ranges, strict=True):
            part = tokens[:, slots]
            found.append(torch.where(part == self.layout_format.none, stop - start, part - start))
        return found[0], found[1]

    def side_probabilities(self, corners: Tensor) -> Tensor:
        """Probabilities of corners [..., G G + 1] as those of sides [..., 2 G + 1]."""
        grid = self.layout_format.grid
        board = corners[..., :-1].unflatten(-1, (grid, grid))
        return torch.cat([board.sum(dim=-2), board.sum(dim=-1), corners[..., -1:]], dim=-1)

    def corner_logits(self, sides: Tensor) -> Tensor:
        """Logits of corners [..., G G + 1]: the sum of those of their sides [..., 2 G + 1]."""
        grid = self.layout_format.grid
        columns, rows, none = sides.split([grid, grid, 1], dim=-1)
        board = rows[..., :, None] + columns[..., None, :]
        return torch.cat([board.flatten(-2), none], dim=-1)
