"""`nearest_box` and `snap_boxes`: the nearest valid box, from costs and from coordinates."""

from __future__ import annotations

import torch
from torch import Tensor

from dive_fast.errors import DiveFastError, shown
from dive_fast.ops._checks import (
    FLOAT_DTYPES,
    check_matrix,
    check_no_gradient,
    check_same_device,
    check_square_maps,
    is_int,
)
from dive_fast.ops._library import define

COST_DTYPES = (torch.float32, torch.float64)
# Of snap_boxes: beyond, halves of steps would soon be no numbers of their own in fp64.
MOST_GRID = 1 << 31
# Unit intervals from the grid; what lies further out is taken for it. Its steps can be added up.
FAR = 1e290


def _reference(
    cost_tl: Tensor, cost_br: Tensor, min_height: int, min_width: int
) -> tuple[Tensor, Tensor, Tensor]:
    n, grid = cost_tl.shape[:2]
    _check_sizes(grid, min_height, min_width)
    if n == 0:
        empty = cost_tl.new_empty(0, dtype=torch.int64)
        return empty, empty.clone(), cost_tl.new_empty(0)
    top_left, bottom_right = _as_costs(cost_tl.double()), _as_costs(cost_br.double())
    # S[y, x] = min over y' >= y, x' >= x of cost_br[y', x']
    suffix = bottom_right.flip(1, 2).cummin(dim=1).values.cummin(dim=2).values.flip(1, 2)
    height, width = grid - min_height, grid - min_width
    total = _as_costs(top_left[:, :height, :width] + suffix[:, min_height:, min_width:])
    cost, cell = total.flatten(1).min(dim=1)
    cell = (total.flatten(1) == cost[:, None]).to(torch.uint8).argmax(dim=1)  # the first
    y, x = cell // width, cell % width

    row = torch.arange(grid, device=cost_tl.device)
    below = row >= (y + min_height)[:, None]
    right = row >= (x + min_width)[:, None]
    valid = below[:, :, None] & right[:, None, :]
    corner = suffix[torch.arange(n, device=cost_tl.device), y + min_height, x + min_width]
    is_corner = valid & (bottom_right == corner[:, None, None])
    br = is_corner.flatten(1).to(torch.uint8).argmax(dim=1)  # the first
    return y * grid + x, br, cost.to(cost_tl.dtype)


def _check_sizes(grid: int, min_height: int, min_width: int) -> None:
    """For direct calls of the op; the public function says it of what it was given."""
    if not (0 <= min_height < grid and 0 <= min_width < grid):
        raise DiveFastError(
            f"nearest_box: min_size must be in [0, {grid}), but got ({min_height}, {min_width})"
        )


def _as_costs(costs: Tensor) -> Tensor:
    return torch.where(costs.isnan(), torch.inf, costs)


def _fake(
    cost_tl: Tensor, cost_br: Tensor, min_height: int, min_width: int
) -> tuple[Tensor, Tensor, Tensor]:
    n = cost_tl.shape[0]
    _check_sizes(cost_tl.shape[1], min_height, min_width)
    tokens = (cost_tl.new_empty(n, dtype=torch.int64) for _ in range(2))
    return (*tokens, cost_tl.new_empty(n))


define(
    "nearest_box(Tensor cost_tl, Tensor cost_br, int min_height, int min_width) "
    "-> (Tensor, Tensor, Tensor)",
    _reference,
    _fake,
)


def nearest_box(
    cost_tl: Tensor, cost_br: Tensor, min_size: int | tuple[int, int] = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """The cheapest valid box of every pair of corner costs: an exact joint projection in O(G^2).

        cost = min over y, x of cost_tl[y, x] + S[y + min_height, x + min_width],
        S[y, x] = min over y' >= y, x' >= x of cost_br[y', x']        (2-D suffix minimum)

    The two corners chosen one by one may form an inverted box; this cannot. Sums are taken in
    fp64. Among equally cheap boxes the lowest top-left token wins, and for it the cheapest, then
    lowest, bottom-right token. NaN and +infinity forbid a corner, and a corner at -infinity is the
    cheapest; if no valid box is left, the cost is infinite.

    Args:
        cost_tl: cost of every grid point as the top-left corner, [N, G, G] by row y and column x;
            fp32 or fp64; any strides.
        cost_br: cost as the bottom-right corner, as `cost_tl`.
        min_size: the least height and width, in grid steps, each in [0, G); one number for both.

    Returns:
        tl, br, int64 [N]: tokens y * G + x of the corners; and their cost, [N], of the dtype of
        `cost_tl`. None has a gradient.

    Raises:
        DiveFastError: an argument has the wrong shape, dtype, device or range, or requires a
            gradient.

    Examples:
        >>> import torch
        >>> from dive_fast.ops import nearest_box
        >>> tl = torch.tensor([[[5.0, 5.0, 5.0], [5.0, 5.0, 5.0], [5.0, 1.0, 3.0]]])
        >>> br = torch.tensor([[[4.0, 5.0, 5.0], [5.0, 3.0, 5.0], [5.0, 5.0, 5.0]]])
        >>> nearest_box(tl, br)
        (tensor([0]), tensor([4]), tensor([8.]))
        >>> nearest_box(tl, br, min_size=0)
        (tensor([7]), tensor([7]), tensor([6.]))
    """
    op = "nearest_box"
    check_square_maps(op, "cost_tl", cost_tl, COST_DTYPES)
    check_square_maps(op, "cost_br", cost_br, (cost_tl.dtype,))
    if cost_br.shape != cost_tl.shape:
        raise DiveFastError(
            f"{op}: cost_br must have the shape of cost_tl, {list(cost_tl.shape)}, "
            f"but got {list(cost_br.shape)}"
        )
    check_same_device(op, "cost_tl", cost_tl, cost_br=cost_br)
    check_no_gradient(op, cost_tl=cost_tl, cost_br=cost_br)
    height, width = _min_sizes(op, min_size, cost_tl.shape[1])
    tl, br, cost = torch.ops.dive_fast.nearest_box(cost_tl, cost_br, height, width)
    return tl, br, cost


def snap_boxes(boxes: Tensor, grid: int, min_size: int | tuple[int, int] = 1) -> Tensor:
    """Snaps relaxed xyxy boxes to the nearest valid boxes of a grid, keeping order and size.

    The continuous companion of `nearest_box`: the exact Euclidean projection on the boxes whose
    corners are grid points (grid lines at i / (G - 1)) at least `min_size` steps apart. It falls
    apart into the two axes. Per axis, with u the coordinates in steps and m the minimum,

        (i, j) = (round(u1), round(u2))     if that leaves j - i >= m, else
        i = round((u1 + u2 - m) / 2), j = i + m,

    clamped to the grid, halves rounded down. The gradient is straight-through (1 everywhere). It
    is plain torch: four numbers per box, nothing to fuse.

    Args:
        boxes: relaxed boxes (x1, y1, x2, y2), [N, 4], unit interval unless they stray; fp64, fp32,
            bf16 or fp16.
        grid: G, the number of grid lines per axis, from 2 to 2^31.
        min_size: the least height and width, in grid steps, each in [0, G); one number for both.

    Returns:
        [N, 4] boxes on the grid, in the unit interval and the dtype of `boxes`; differentiable.
        A coordinate that is NaN makes its axis NaN; one that is infinite goes to the border, and
        gets no gradient.

    Raises:
        DiveFastError: an argument has the wrong shape, dtype or range.

    Examples:
        >>> import torch
        >>> from dive_fast.ops import snap_boxes
        >>> snap_boxes(torch.tensor([[0.1, 0.6, 0.9, 0.55]]), grid=5)
        tensor([[0.0000, 0.5000, 1.0000, 0.7500]])
    """
    op = "snap_boxes"
    check_matrix(op, "boxes", boxes, FLOAT_DTYPES, "[N, 4]")
    if boxes.shape[1] != 4:
        raise DiveFastError(f"{op}: boxes must have shape [N, 4], but got {list(boxes.shape)}")
    if not is_int(grid) or grid < 2:
        raise DiveFastError(f"{op}: grid must be an int of at least 2, but got {shown(grid)}")
    if grid > MOST_GRID:
        raise DiveFastError(f"{op}: grid must be at most {MOST_GRID}, but got {shown(grid)}")
    height, width = _min_sizes(op, min_size, grid)
    # Opposite infinities would make NaN of their sum; whatever is outside ends at the border.
    steps = boxes.detach().double().clamp(-FAR, FAR) * (grid - 1)
    x1, x2 = _snap_axis(steps[:, 0], steps[:, 2], grid - 1, width)
    y1, y2 = _snap_axis(steps[:, 1], steps[:, 3], grid - 1, height)
    snapped = (torch.stack([x1, y1, x2, y2], dim=1) / (grid - 1)).to(boxes.dtype)
    # Where it is infinite the difference would be NaN.
    return snapped + torch.where(boxes.isinf(), 0, boxes - boxes.detach())


def _snap_axis(start: Tensor, stop: Tensor, last: int, least: int) -> tuple[Tensor, Tensor]:
    """The nearest integers i <= j - least in [0, last] of two coordinates, as floats."""
    i, j = (_round_half_down(u).clamp(0, last) for u in (start, stop))
    # If the rounded pair is too close, the nearest pair is exactly `least` apart: from any wider
    # one, a step of one corner towards its rounded place would be nearer and still valid.
    tight = _round_half_down((start + stop - least) / 2).clamp(0, last - least)
    far_enough = j - i >= least
    return torch.where(far_enough, i, tight), torch.where(far_enough, j, tight + least)


def _round_half_down(u: Tensor) -> Tensor:
    return (u - 0.5).ceil()


def _min_sizes(op: str, min_size: int | tuple[int, int], grid: int) -> tuple[int, int]:
    """(height, width), each in [0, grid)."""
    sizes = (min_size, min_size) if is_int(min_size) else min_size
    ok = isinstance(sizes, tuple) and len(sizes) == 2
    if not ok or not all(is_int(size) and 0 <= size < grid for size in sizes):
        raise DiveFastError(
            f"{op}: min_size must be one or two ints in [0, {grid}), but got {shown(min_size)}"
        )
    return sizes
