"""A layout-to-image model whose denoiser is known, with GLIGEN's tokens: for counting evaluations.

    x0(v) = grey with each object's box in the colour of its class, the first object on top
    eps_theta(x_t, t, v) = (x_t - a_t x0(v)) / s_t

An image is such a picture plus a texture that no layout explains, as photographs have one. What a
search asks of it is what it would ask of a network that knows the classes as well; that of an
object whose class is open is the mean of all colours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dive_fast.core.layouts import LayoutFormat
from dive_fast.core.schedule import Schedule, make_betas
from dive_fast.core.vocabulary import Vocabulary
from dive_fast.strategies.layout import Box, Item

GRID = 33  # of GLIGEN
TEXTURE = 0.15  # standard deviation; colours are in [-1, 1]
SHARED = 0.5  # part of a colour that all classes have: without it their mean is no object


class PaintedLayouts:
    """See ``dive_fast.models.protocol.Model``; a pixel is a cell of the grid."""

    def __init__(
        self, n_classes: int, max_objects: int, texture: float = TEXTURE, shared: float = SHARED
    ) -> None:
        self.texture = texture
        names = [f"class {c}" for c in range(n_classes)]
        self.layout_format = LayoutFormat.compact(names, max_objects, GRID)
        self.name = "painted layouts"
        self.schedule = Schedule.from_betas(make_betas("scaled_linear", 1000))
        self.vocabulary = Vocabulary(self._table(), self.layout_format.token_names())
        self.latent_shape = self.image_shape = (3, GRID - 1, GRID - 1)
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.inverse_temperature = 1000.0
        generator = torch.Generator().manual_seed(n_classes)
        colours = torch.rand(n_classes, 3, generator=generator) * 2 - 1
        own = colours / colours.norm(dim=1, keepdim=True)
        self.colours = shared + (1 - shared) * own

    def _table(self) -> Tensor:
        """Rows as ``dive_fast.models.gligen`` has them: one at the class, or the corner's place."""
        n, form = len(self.layout_format.names), self.layout_format
        table = torch.zeros(form.vocabulary_size, n + 2)
        table[:n, :n] = torch.eye(n)
        y, x = torch.meshgrid(torch.arange(GRID), torch.arange(GRID), indexing="ij")
        corners = slice(*form.coordinate_range)
        table[corners, n:] = torch.stack([x, y], dim=2).flatten(0, 1).float()
        return table

    def identity(self) -> dict[str, Any]:
        return {"name": self.name}

    def encode(self, images: Tensor) -> Tensor:
        return images

    def picture(self, condition: Tensor) -> Tensor:
        """x0 [M, 3, h, w] of conditions [M, S D]."""
        n = len(self.layout_format.names)
        objects = condition.view(len(condition), -1, 3, n + 2)
        places = torch.arange(GRID - 1) + 0.5
        x0 = torch.zeros(len(condition), *self.latent_shape)
        for i in reversed(range(objects.shape[1])):
            weights, corners = objects[:, i, 0, :n], objects[:, i, 1:, n:]
            low, high = corners[:, 0, :, None], corners[:, 1, :, None]
            across, down = ((low < places) & (places < high)).unbind(dim=1)
            inside = (down[:, :, None] & across[:, None]) & (weights.sum(1) > 0.5)[:, None, None]
            colour = (weights @ self.colours)[:, :, None, None]
            x0 = torch.where(inside[:, None], colour, x0)
        return x0

    def predict(self, x_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        a, s = (x[t].view(-1, 1, 1, 1).to(x_t) for x in (self.schedule.a, self.schedule.s))
        return (x_t - a * self.picture(condition)) / s

    def scene(self, n_objects: int, seed: int) -> tuple[tuple[Item, ...], Tensor]:
        """Boxes of a quarter to a half of the side, apart from each other, and their image."""
        generator = torch.Generator().manual_seed(seed)

        def draw(low: int, high: int) -> int:
            return int(torch.randint(low, high, (), generator=generator))

        items: list[Item] = []
        while len(items) < n_objects:
            largest = 14 if n_objects < 4 else 9
            width, height = draw(5, largest), draw(5, largest)
            left, top = draw(0, GRID - width), draw(0, GRID - height)
            box = Box(left, top, left + width, top + height)
            if all(_apart(box, other.box) for other in items):
                items.append(Item(draw(0, len(self.layout_format.names)), box))
        texture = torch.randn(self.latent_shape, generator=generator) * self.texture
        return tuple(items), self.picture(self._condition(items))[0] + texture

    def _condition(self, items: list[Item]) -> Tensor:
        tokens = self.layout_format.write(
            torch.tensor([item.class_id for item in items], dtype=torch.int64),
            torch.tensor([item.box for item in items], dtype=torch.int64).view(-1, 4),
        )
        return self.vocabulary.table[tokens].flatten()[None]


def _apart(a: Box, b: Box) -> bool:
    return a.right < b.left or b.right < a.left or a.bottom < b.top or b.bottom < a.top
