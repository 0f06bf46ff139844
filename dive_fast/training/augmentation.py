"""Pictures seen a little differently each time, so that few teach more."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

GREY = (0.299, 0.587, 0.114)  # shares of red, green and blue, ITU-R BT.601


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """What may happen to a picture; the default is nothing.

    Attributes:
        flip: half of the pictures are mirrored, left to right.
        crop: a square part is enlarged to the whole whose side is at most this share smaller.
        colour: brightness, contrast and saturation are multiplied by 1 - colour to 1 + colour.
    """

    flip: bool = False
    crop: float = 0.0
    colour: float = 0.0

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Pictures float32 [B, c, h, w] in [-1, 1], and so afterwards."""
        if self.flip or self.crop:
            x = _moved(x, self.flip, self.crop, generator)
        return _coloured(x, self.colour, generator) if self.colour else x


def _moved(x: Tensor, flip: bool, crop: float, generator: torch.Generator) -> Tensor:
    """A square of side f of each, f uniform in [1 - crop, 1], anywhere inside; bicubic."""
    n = len(x)
    mirrored = torch.rand(n, generator=generator) < (0.5 if flip else 0.0)
    side = 1 - crop * torch.rand(n, generator=generator)
    right, down = (torch.rand(2, n, generator=generator) * 2 - 1) * (1 - side)
    if not crop:
        return torch.where(mirrored[:, None, None, None], x.flip(3), x)
    zero = torch.zeros(n)
    rows = [torch.where(mirrored, -side, side), zero, right, zero, side, down]
    theta = torch.stack(rows, dim=1).view(n, 2, 3)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    # Bicubic overshoots at edges.
    moved = F.grid_sample(x, grid, "bicubic", padding_mode="border", align_corners=False)
    return moved.clamp(-1, 1)


def _coloured(x: Tensor, colour: float, generator: torch.Generator) -> Tensor:
    """Brightness, then contrast about the mean grey, then saturation about each pixel's grey."""
    factors = 1 + colour * (torch.rand(3, len(x), 1, 1, 1, generator=generator) * 2 - 1)
    x = (x + 1) / 2 * factors[0]
    mean = _grey(x).mean(dim=(2, 3), keepdim=True)
    x = mean + (x - mean) * factors[1]
    if x.shape[1] == len(GREY):
        grey = _grey(x)
        x = grey + (x - grey) * factors[2]
    return (x * 2 - 1).clamp(-1, 1)


def _grey(x: Tensor) -> Tensor:
    """[B, 1, h, w]."""
    if x.shape[1] != len(GREY):
        return x.mean(dim=1, keepdim=True)
    return (x * torch.tensor(GREY).view(1, -1, 1, 1)).sum(dim=1, keepdim=True)
