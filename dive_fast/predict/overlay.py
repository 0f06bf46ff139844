"""A map of signed numbers over a picture: smoothed, and drawn in red and blue."""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter

RED, BLUE = (220, 38, 38), (37, 99, 235)
LONG_SIDE = 384  # pixels that a smaller picture is enlarged to
_SMOOTHED = 1 / 16  # of a map's side: standard deviation of the Gaussian
_STRONGEST = 0.85  # opacity of the largest number


def smoothed(maps: torch.Tensor) -> np.ndarray:
    """By a Gaussian of 1/16 of the sides, [..., h, w]; reflected at the edges, which keeps means.

    It is linear: the smoothed mean of maps is the mean of the smoothed maps.
    """
    sides = [_SMOOTHED * side for side in maps.shape[-2:]]
    return gaussian_filter(maps.numpy(), [0.0] * (maps.ndim - 2) + sides, mode="reflect")


def draw_map(
    heat: np.ndarray,
    picture: Image.Image,
    size: int = LONG_SIDE,
    shown: np.ndarray | None = None,
) -> Image.Image:
    """The picture in pale grey, red where the map is positive and blue where it is negative.

    The colour is as strong as the number is large, at the same scale for both.

    Args:
        heat: float [h, w], over the whole picture; enlarged bilinearly.
        picture: enlarged by a whole factor, so that its longer side has at least ``size`` pixels.
        shown: bool [h, w], where there shall be colour; everywhere if None.
    """
    largest = float(np.abs(heat).max()) or 1.0
    factor = max(1, math.ceil(size / max(picture.size)))
    sides = tuple(factor * side for side in picture.size)
    seen = heat / largest if shown is None else np.where(shown, heat / largest, 0.0)
    image = Image.fromarray(seen.astype(np.float32)).resize(sides, Image.Resampling.BILINEAR)
    heat = np.asarray(image)[..., None]
    grey = picture.convert("L").resize(sides, Image.Resampling.NEAREST).convert("RGB")
    opacity = _STRONGEST * np.abs(heat)
    # Neither black nor white, on which weak colours would not be seen alike.
    pale = 64 + np.asarray(grey) / 2
    mixed = (1 - opacity) * pale + opacity * np.where(heat > 0, RED, BLUE)
    return Image.fromarray(mixed.round().astype(np.uint8))
