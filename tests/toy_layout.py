"""A layout-to-image model whose denoiser is analytic: it knows the image of every layout.

    x0(v) = 1 - prod over objects of (1 - colour(class) inside(tl, br))
    eps_theta(x_t, t, v) = (x_t - a_t x0(v)) / s_t

Token embeddings are one-hot, so that relaxed layouts have images too: ``inside`` is the product
of two cumulative sums over the grid. The true layout has loss 0.
"""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dive_fast.core.layouts import LayoutFormat
from dive_fast.core.schedule import Schedule, make_betas
from dive_fast.core.vocabulary import Vocabulary
from dive_fast.strategies.layout import Board, Box, Item

SCENE = (Item(1, Box(1, 0, 3, 2)), Item(2, Box(3, 3, 6, 6)))


class ToyLayoutModel:
    """Cells of the grid are pixels: [C, G - 1, G - 1]; a class lights its own channel."""

    def __init__(self, n_classes: int = 3, max_objects: int = 3, grid: int = 7) -> None:
        names = [f"class {c}" for c in range(n_classes)]
        self.layout_format = LayoutFormat.compact(names, max_objects, grid)
        self.name = "toy layout"
        self.schedule = Schedule.from_betas(make_betas("linear", 1000))
        table = torch.eye(self.layout_format.vocabulary_size)
        self.vocabulary = Vocabulary(table, self.layout_format.token_names())
        self.latent_shape = self.image_shape = (n_classes, grid - 1, grid - 1)
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.inverse_temperature = 100.0

    def identity(self) -> dict[str, Any]:
        return {"name": self.name}

    def encode(self, images: Tensor) -> Tensor:
        return images

    def picture(self, condition: Tensor) -> Tensor:
        """x0 [M, C, h, w] of relaxed layouts [M, S * V]."""
        form = self.layout_format
        slots = condition.view(len(condition), form.max_objects, 3, form.vocabulary_size)
        colour = slots[:, :, 0, slice(*form.class_range)]  # [M, O, C]
        shape = (len(condition), form.max_objects, form.grid, form.grid)
        tl, br = (slots[:, :, i, slice(*form.coordinate_range)].reshape(shape) for i in (1, 2))
        after = tl.cumsum(2).cumsum(3)[:, :, :-1, :-1]
        before = br.flip(2, 3).cumsum(2).cumsum(3).flip(2, 3)[:, :, 1:, 1:]
        inside = (after * before)[:, :, None]
        return 1 - (1 - colour[..., None, None] * inside).prod(dim=1)

    def predict(self, x_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        a, s = (x[t].view(-1, 1, 1, 1).to(x_t) for x in (self.schedule.a, self.schedule.s))
        return (x_t - a * self.picture(condition).to(x_t)) / s


class PictureModel(ToyLayoutModel):
    """The toy with images: channel values 0 and 1 are the grey levels 0 and 255."""

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        return (images + 1) / 2

    def draw(self, *scenes: tuple[Item, ...]) -> list[Image.Image]:
        board = Board(self.vocabulary.table, self.layout_format, None)
        x0 = self.picture(board.conditions(scenes).flatten(1))
        return [Image.fromarray((255 * x.permute(1, 2, 0)).byte().numpy()) for x in x0]
