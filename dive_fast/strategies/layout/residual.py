"""Where a layout does not explain the image: boxes read off an error map.

    r(p) = mean over the probes of || eps - eps_hat(x_t, t, y) ||^2 at pixel p

Of the layout without objects r is large where objects are, for nothing says that they are there.
One map, of a few evaluations, shows the places of all objects at once.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from dive_fast.core.requests import ErrorMaps
from dive_fast.strategies.layout.board import Board, Items, Steps
from dive_fast.strategies.layout.boxes import Box, labelled_boxes

PEAK = 0.98  # quantile of the cells that is the map's height; the maximum may be an outlier
LEAST_MASS = 0.02  # share of the whole error that a region holds at least


def residual(board: Board, items: Items, probe_ids: Tensor) -> Steps:
    """The error of a layout in every cell between the grid's lines, float32 [G - 1, G - 1]."""
    (found,) = yield ErrorMaps(board.conditions([items]).flatten(1), probe_ids)
    return cells(found, board.layout_format.grid)


def cells(error_map: Tensor, grid: int) -> Tensor:
    """An error map [h, w] as the means of a grid's cells, [G - 1, G - 1]."""
    side = grid - 1
    if min(error_map.shape) < side:
        return F.interpolate(error_map[None, None], (side, side), mode="bilinear")[0, 0]
    return F.adaptive_avg_pool2d(error_map[None], side)[0]


def height(residuals: Tensor) -> float:
    """What shares of a map refer to."""
    return float(residuals.flatten().quantile(PEAK))


def regions(residuals: Tensor, level: float) -> list[Box]:
    """Boxes around connected cells above a level, the one with the largest error first.

    Cells are connected that touch, if only at a corner.
    """
    labels = torch.from_numpy(ndimage.label(residuals.numpy() > level, np.ones((3, 3)))[0])
    masses = {
        box: float(residuals[labels == label].sum())
        for label, box in enumerate(labelled_boxes(labels), start=1)
    }
    least = LEAST_MASS * float(residuals.sum())
    return [box for box in sorted(masses, key=masses.__getitem__)[::-1] if masses[box] >= least]
