"""A layout as channels beside x_t: where its boxes lie, drawn on the grid.

A transformer has to learn from tokens alone which patches a box covers, which takes it long; drawn,
it sees that at once. Channels, for C classes:

    mask_c = 1 - prod over objects of (1 - w_c inside)
    border = 1 - prod over objects of (1 - w (inside - inner)),  inner: a line of the grid less
    count  = 1/2 sum over objects of w inside

w_c is how much the object is of class c, w = sum_c w_c whether it is there, and

    inside(x, y) = P(left <= x) P(right > x) P(top <= y) P(bottom > y)

For rows of the token table all are 0 or 1; between them they are differentiable, so that relaxed
layouts are drawn, too: corners by a softmax over the nearest rows, classes linearly, so that the
mean of all classes' embeddings is drawn as 1 / C of each.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dive_fast.core.layouts import LayoutFormat
from dive_fast.core.projection import SLOTS_PER_OBJECT
from dive_fast.errors import ModelError

BESIDES = 2  # channels that are no class's mask
SHARPNESS = 30.0  # of the softmax: exp(-15) for the nearest other row
ROWS_AT_ONCE = 512  # of corners whose distances are asked


class LayoutRaster(nn.Module):
    """Token embeddings to channels.

    Args:
        layout: what the tokens mean.
        table: float32 [V, D], the tokens' embeddings.

    Raises:
        ModelError: the rows of the classes do not tell them apart.
    """

    def __init__(self, layout: LayoutFormat, table: Tensor) -> None:
        super().__init__()
        self.layout = layout
        start, stop = layout.class_range
        rows = torch.cat([table[start:stop], table[layout.none : layout.none + 1]]).double()
        inverse = torch.linalg.pinv(rows)  # [D, C + 1]
        identity = torch.eye(len(rows), dtype=rows.dtype)
        if not torch.allclose(rows @ inverse, identity, atol=1e-3):
            raise ModelError(
                f"expected embeddings of {len(rows)} classes (and none) that are linearly "
                f"independent, got rows of width {table.shape[1]}."
            )
        corners = table[slice(*layout.coordinate_range)].float()
        apart = torch.cdist(corners, corners) + torch.full((len(corners),), torch.inf).diag()
        self.register_buffer("inverse", inverse.float(), persistent=False)
        self.register_buffer("corners", corners, persistent=False)
        self.scale = SHARPNESS / float(apart.min().square())

    def forward(self, slots: Tensor, side: int) -> Tensor:
        """Embeddings [N, S, D] to float32 [N, C + 2, side, side]; differentiable."""
        objects = slots[:, : SLOTS_PER_OBJECT * self.layout.max_objects]
        with torch.autocast(slots.device.type, enabled=False):
            triples = objects.float().unflatten(1, (-1, SLOTS_PER_OBJECT))
            weights = (triples[:, :, 0] @ self.inverse).clamp(0, 1)[..., :-1]
            places = self._places(triples[:, :, 1:].flatten(0, 2))
            grid = self.layout.grid
            corners = places.view(*triples.shape[:2], 2, grid, grid)
            return drawn(weights, corners.sum(dim=3), corners.sum(dim=4), side)

    def _places(self, rows: Tensor) -> Tensor:
        """p(corner | row) [R, G^2] of embeddings [R, D]."""
        half = self.corners.square().sum(dim=1) / 2
        found = [
            (self.scale * (part @ self.corners.T - half)).softmax(dim=1)
            for part in rows.split(ROWS_AT_ONCE)
        ]
        return torch.cat(found)


def n_channels(layout: LayoutFormat) -> int:
    """How many channels a layout is drawn in."""
    return len(layout.names) + BESIDES


def drawn_tokens(layout: LayoutFormat, tokens: Tensor, side: int) -> Tensor:
    """The same of tokens int64 [N, S]; -1 stands for a class that is not known."""
    triples = tokens[:, : SLOTS_PER_OBJECT * layout.max_objects].unflatten(1, (-1, 3))
    start, stop = layout.class_range
    n, classes = stop - start, triples[..., 0]
    known = F.one_hot((classes - start).clamp(0, n - 1), n).float()
    weights = torch.where((classes < 0)[..., None], 1 / n, known)
    present = (classes < 0) | (
        (classes >= start) & (classes < stop) & (triples[..., 1] != layout.none)
    )
    weights = weights * present[..., None]
    x, y = layout.corner_place(triples[..., 1:])
    x, y = (place.clamp(0, layout.grid - 1) for place in (x, y))
    return drawn(weights, *(F.one_hot(place, layout.grid).float() for place in (x, y)), side)


def drawn(weights: Tensor, x: Tensor, y: Tensor, side: int) -> Tensor:
    """Channels of objects.

    Args:
        weights: w_c, [N, O, C].
        x, y: probabilities of the corners' places, [N, O, 2, G], the top left one first.
        side: of the picture.

    Returns:
        [N, C + 2, side, side].
    """
    inside, inner = (_within(x, y, less) for less in (0, 1))  # [N, O, G - 1, G - 1]
    there = weights.sum(dim=2)[..., None, None]
    masks = 1 - (1 - weights[..., None, None] * inside[:, :, None]).prod(dim=1)
    border = 1 - (1 - there * (inside - inner)).prod(dim=1)
    count = (there * inside).sum(dim=1) / 2
    channels = torch.cat([masks, border[:, None], count[:, None]], dim=1)
    return F.interpolate(channels, (side, side), mode="nearest")


def _within(x: Tensor, y: Tensor, less: int) -> Tensor:
    """``inside`` of boxes that are so many lines smaller on each side, [N, O, G - 1, G - 1]."""
    along = []
    for places in (x, y):
        reached = places[:, :, 0].cumsum(dim=2)[..., :-1]  # P(left <= x), at the cells
        beyond = 1 - places[:, :, 1].cumsum(dim=2)[..., :-1]  # P(right > x)
        if less:
            reached = F.pad(reached, (less, 0))[..., :-less]
            beyond = F.pad(beyond, (0, less))[..., less:]
        along.append(reached * beyond)
    return along[1][..., :, None] * along[0][..., None, :]
