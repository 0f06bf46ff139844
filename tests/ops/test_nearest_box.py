"""nearest_box and snap_boxes equal brute force, ties included."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dive_fast.errors import DiveFastError
from dive_fast.ops import _nearest_box, native_status, nearest_box, snap_boxes

needs_library = pytest.mark.skipif(
    not native_status()["nearest_box"].native, reason=native_status()["nearest_box"].reason
)


def costs(n: int, grid: int, seed: int, dtype=torch.float32, ties: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if ties:
        return torch.randint(0, 4, (n, grid, grid), generator=generator).to(dtype)
    return torch.randn(n, grid, grid, generator=generator, dtype=torch.float64).to(dtype)


def brute_force(cost_tl: Tensor, cost_br: Tensor, height: int, width: int) -> tuple[Tensor, ...]:
    """Every pair of corners, [N, G^2, G^2]; the first of the cheapest."""
    grid = cost_tl.shape[1]
    y, x = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    y, x = y.flatten(), x.flatten()
    valid = (y >= y[:, None] + height) & (x >= x[:, None] + width)
    total = cost_tl.flatten(1)[:, :, None].double() + cost_br.flatten(1)[:, None, :].double()
    total = total.masked_fill(~valid, torch.inf).flatten(1)
    cost, pair = total.min(dim=1).values, total.argmin(dim=1)
    return pair // grid**2, pair % grid**2, cost.to(cost_tl.dtype)


@pytest.mark.parametrize("ties", (False, True))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_equals_brute_force(dtype, ties):
    for case in range(600):
        grid = 1 + case % 7
        height, width = case % grid, case // 7 % grid
        cost_tl, cost_br = (costs(3, grid, 2 * case + i, dtype, ties) for i in range(2))
        expected = brute_force(cost_tl, cost_br, height, width)
        for function in (torch.ops.dive_fast.nearest_box, _nearest_box._reference):
            for result, wanted in zip(
                function(cost_tl, cost_br, height, width), expected, strict=True
            ):
                assert torch.equal(result, wanted), (case, function)


@pytest.mark.parametrize("grid", (31, 90))
def test_larger_grids_and_odd_layouts_equal_the_reference(grid):
    for seed in range(3):
        cost_tl = costs(5, grid, seed).transpose(1, 2)
        cost_br = costs(6, grid + 1, seed + 9)[1:, 1:, :-1]
        expected = _nearest_box._reference(cost_tl, cost_br, 2, 5)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            result = nearest_box(cost_tl, cost_br, (2, 5))
            assert all(torch.equal(*pair) for pair in zip(result, expected, strict=True))


def test_forbidden_corners():
    generator = torch.Generator().manual_seed(0)
    for case in range(200):
        cost_tl, cost_br = (costs(3, 5, 2 * case + i, ties=True) for i in range(2))
        cost_tl[torch.rand(3, 5, 5, generator=generator) < 0.5] = float("inf")
        cost_br[torch.rand(3, 5, 5, generator=generator) < 0.5] = float("nan")
        tl, br, cost = nearest_box(cost_tl, cost_br)
        expected = _nearest_box._reference(cost_tl, cost_br, 1, 1)
        assert torch.equal(tl, expected[0]) and torch.equal(br, expected[1])
        assert torch.equal(cost, expected[2])
        assert (br // 5 > tl // 5).all() and (br % 5 > tl % 5).all()
        n = torch.arange(3)
        found = cost_tl.flatten(1)[n, tl] + cost_br.flatten(1)[n, br]
        finite = cost.isfinite()
        assert torch.equal(found[finite], cost[finite])


def test_without_a_valid_box_the_cost_is_infinite():
    forbidden = torch.full((2, 4, 4), float("nan"))
    tl, br, cost = nearest_box(forbidden, costs(2, 4, 0), min_size=2)
    assert cost.tolist() == [float("inf")] * 2
    assert (br // 4 >= tl // 4 + 2).all() and (br % 4 >= tl % 4 + 2).all()


def test_every_element_is_written(poisoned_memory):
    tl, br, cost = nearest_box(costs(70, 9, 0), costs(70, 9, 1))
    assert not cost.isnan().any()
    assert ((tl >= 0) & (br > tl) & (br < 81)).all()


def test_opcheck_and_compilation():
    for n, dtype in ((3, torch.float64), (1, torch.float32), (0, torch.float32)):
        inputs = (costs(n, 6, 0, dtype).transpose(1, 2), costs(n, 6, 1, dtype), 1, 2)
        torch.library.opcheck(torch.ops.dive_fast.nearest_box.default, inputs)
    compiled = torch.compile(nearest_box, backend="aot_eager", fullgraph=True)
    for n, grid in ((2, 5), (3, 6)):
        pair = costs(n, grid, 2), costs(n, grid, 3)
        for ours, eager in zip(compiled(*pair), nearest_box(*pair), strict=True):
            assert torch.equal(ours, eager)


@pytest.mark.parametrize(
    "cost_tl, cost_br, min_size, message",
    [
        (None, torch.zeros(1, 3, 3), 1, "cost_tl must be a tensor, but got NoneType"),
        (torch.zeros(1, 3, 4), torch.zeros(1, 3, 4), 1, r"cost_tl must have shape \[N, G, G\]"),
        (torch.zeros(1, 3, 3).half(), torch.zeros(1, 3, 3), 1, "cost_tl must be float32 or float6"),
        (torch.zeros(1, 3, 3), torch.zeros(2, 3, 3), 1, "cost_br must have the shape of cost_tl"),
        (torch.zeros(1, 3, 3), torch.zeros(1, 3, 3).double(), 1, "cost_br must be float32, but"),
        (torch.zeros(1, 3, 3), torch.zeros(1, 3, 3, device="meta"), 1, "cost_br must be on the de"),
        (torch.zeros(1, 3, 3), torch.zeros(1, 3, 3), 3, r"min_size must be .* \[0, 3\), but got 3"),
        (torch.zeros(1, 3, 3), torch.zeros(1, 3, 3), (0, -1), r"but got \(0, -1\)"),
        (torch.zeros(1, 3, 3), torch.zeros(1, 3, 3), 0.5, "but got 0.5"),
        (torch.zeros(1, 3, 3, requires_grad=True), torch.zeros(1, 3, 3), 1, "cost_tl must not req"),
    ],
)
def test_bad_arguments_are_named(cost_tl, cost_br, min_size, message):
    with pytest.raises(DiveFastError, match=f"nearest_box: .*{message}"):
        nearest_box(cost_tl, cost_br, min_size)


@needs_library
def test_the_bare_op_cannot_be_made_to_read_out_of_bounds():
    good = torch.zeros(1, 3, 3)
    for bad in (
        (good, good[:, :2], 1, 1),
        (good, good[:0], 1, 1),
        (good, good.double(), 1, 1),
        (good, good, 3, 1),
        (good, good, 1, -1),
        (good.half(), good.half(), 1, 1),
    ):
        with pytest.raises((ValueError, RuntimeError)):
            torch.ops.dive_fast.nearest_box(*bad)


def nearest_interval(start: float, stop: float, last: int, least: int) -> float:
    """The least squared distance of (start, stop) to valid grid intervals."""
    return min(
        (start - i) ** 2 + (stop - j) ** 2
        for i in range(last + 1)
        for j in range(i + least, last + 1)
    )


def test_snap_boxes_is_the_nearest_valid_box():
    generator = torch.Generator().manual_seed(0)
    for case in range(500):
        grid = 2 + case % 6
        height, width = case % grid, case // 3 % grid
        boxes = 2 * torch.rand(4, 4, generator=generator, dtype=torch.float64) - 0.5
        if case % 2:  # on grid points and halfway between: ties
            boxes = (boxes * 2 * (grid - 1)).round() / 2 / (grid - 1)
        steps = snap_boxes(boxes, grid, (height, width)) * (grid - 1)
        torch.testing.assert_close(steps, steps.round())
        assert (steps >= 0).all() and (steps < grid - 0.5).all()
        for box, snapped in zip((boxes * (grid - 1)).tolist(), steps.round().tolist(), strict=True):
            for axis, least in ((0, width), (1, height)):
                (start, stop), (i, j) = box[axis::2], snapped[axis::2]
                assert j - i >= least
                distance = (start - i) ** 2 + (stop - j) ** 2
                expected = nearest_interval(start, stop, grid - 1, least)
                assert distance == pytest.approx(expected, abs=1e-9), (case, box, snapped)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16), ids=str)
def test_snap_boxes_passes_the_gradient_straight_through(dtype):
    boxes = torch.rand(3, 4, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    snapped = snap_boxes(boxes, 90)
    assert snapped.dtype == dtype
    weight = torch.arange(12.0).view(3, 4).to(dtype)
    (gradient,) = torch.autograd.grad(snapped, boxes, weight)
    assert torch.equal(gradient, weight)
    compiled = torch.compile(snap_boxes, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(boxes, 90), snapped)
    assert snap_boxes(torch.empty(0, 4), 5).shape == (0, 4)


@pytest.mark.parametrize(
    "boxes, grid, min_size, message",
    [
        (torch.zeros(4), 5, 1, r"boxes must have shape \[N, 4\], but got \[4\]"),
        (torch.zeros(1, 5), 5, 1, r"boxes must have shape \[N, 4\], but got \[1, 5\]"),
        (torch.zeros(1, 4).int(), 5, 1, "boxes must be float64 .* but got int32"),
        (torch.zeros(1, 4), 1, 0, "grid must be an int of at least 2, but got 1"),
        (torch.zeros(1, 4), 5, 5, r"min_size must be one or two ints in \[0, 5\), but got 5"),
    ],
)
def test_snap_boxes_names_bad_arguments(boxes, grid, min_size, message):
    with pytest.raises(DiveFastError, match=f"snap_boxes: {message}"):
        snap_boxes(boxes, grid, min_size)
