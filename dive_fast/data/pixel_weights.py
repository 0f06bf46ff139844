"""What the pixels of a picture count, brought to the grid of x0 through the picture's own crop.

w(i, j) = mean of the given weights over the area of the picture that place (i, j) of x0 covers
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from PIL import Image

from dive_fast.data.image_files import by
from dive_fast.data.images import as_image, center_crop, crop_box, to_mode
from dive_fast.errors import ImageError, shown


def as_pixel_weights(given: Any, size: tuple[int, int]) -> torch.Tensor:
    """What each pixel of a picture counts, float64 [h, w].

    Args:
        given: [h, w] numbers of at least 0, or bools, as an array or a tensor; or a picture of
            grey levels, as PIL image or path: white counts 1, black 0.
        size: (w, h) of the picture, upright and not cropped.

    Raises:
        ImageError: it is none of these, of another size, or all zero; or the file cannot be read.
    """
    if isinstance(given, str | os.PathLike | Image.Image):
        grey = np.asarray(to_mode(as_image(given), 1), dtype=np.float64) / 255
        weights = torch.from_numpy(grey)
    else:
        weights = _numbers(given)
    width, height = size
    if tuple(weights.shape) != (height, width):
        got = by((weights.shape[1], weights.shape[0])) if weights.ndim == 2 else [*weights.shape]
        raise ImageError(
            f"expected pixel weights of the picture's own size, {by(size)}, got {got}."
        )
    if not bool((weights.isfinite() & (weights >= 0)).all()):
        wrong = weights[~(weights.isfinite() & (weights >= 0))][0].item()
        raise ImageError(f"pixel weights must be finite and at least 0, got {wrong:.4g}.")
    if not weights.any():
        raise ImageError("expected pixel weights with one above 0, got zeros only.")
    return weights


def cropped(
    picture: Image.Image, given: Any, size: int, channels: int
) -> tuple[Image.Image, torch.Tensor | None]:
    """A picture as a model sees it, ``size`` by ``size``, and what its pixels then count.

    Args:
        picture: upright, whole.
        given: see ``as_pixel_weights``; None where all pixels count the same.

    Raises:
        ImageError: the picture or the weights cannot be used.
    """
    weights = None
    if given is not None:
        weights = on_grid(as_pixel_weights(given, picture.size), size, (size, size))
    return center_crop(to_mode(picture, channels), size), weights


def on_grid(weights: torch.Tensor, size: int, grid: tuple[int, int]) -> torch.Tensor | None:
    """The weights of x0's places: the mean over each one's area of what ``center_crop`` keeps.

    Args:
        weights: float64 [h, w], at least 0, of the picture as it is before its crop.
        size: side of the crop.
        grid: (h, w) of x0.

    Returns:
        float32 [h, w] of the grid, at most 1; None where all places count the same.

    Raises:
        ImageError: the central square, which is all that the model sees, has zeros only.
    """
    # Weights have no unit; the largest first, as sums of large numbers may be infinite.
    weights = weights / weights.max()
    height, width = weights.shape
    left, top, right, bottom = crop_box((width, height), size)
    rows, columns = _shares(height, top, bottom, grid[0]), _shares(width, left, right, grid[1])
    places = (rows @ weights @ columns.T).float()
    if not places.any():
        raise ImageError(
            "expected pixel weights above 0 within the picture's central square, which is what "
            "the model sees, got zeros only."
        )
    return None if bool((places == places[0, 0]).all()) else places


def _shares(n: int, start: float, end: float, places: int) -> torch.Tensor:
    """Of each pixel in each place's stretch of [start, end], float64 [places, n]."""
    edges = torch.linspace(start, end, places + 1, dtype=torch.float64)
    low, high = edges[:-1, None], edges[1:, None]
    pixel = torch.arange(n, dtype=torch.float64)
    overlap = (torch.minimum(high, pixel + 1) - torch.maximum(low, pixel)).clamp(min=0)
    return overlap / overlap.sum(dim=1, keepdim=True)


def _numbers(given: Any) -> torch.Tensor:
    """float64 of any shape."""
    expected = "expected pixel weights as numbers [h, w] or a picture of grey levels"
    try:
        weights = torch.as_tensor(given)
        if weights.is_complex() or weights.layout != torch.strided:
            raise TypeError
        return weights.detach().double().cpu()
    # Whatever torch meets in texts, objects and ragged lists.
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ImageError(f"{expected}, got {shown(given)}.") from error
