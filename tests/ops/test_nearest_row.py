"""nearest_row and projection: the right row, ties to the lowest, and what torch asks of an op."""

from __future__ import annotations

import pytest
import torch
from sample_inputs import FLOAT_DTYPES, coefficient_dtype, search_inputs
from torch import Tensor

from dive_fast.errors import DiveFastError
from dive_fast.ops import METRICS, _nearest_row, native_status, nearest_row, projection

needs_library = pytest.mark.skipif(
    not native_status()["nearest_row"].native, reason=native_status()["nearest_row"].reason
)
# (N, V, D): single elements, below, at and above a tile, a vector and a block of D, no queries.
SIZES = (
    (1, 1, 1),
    (0, 3, 4),
    (5, 7, 3),
    (3, 13, 17),
    (9, 65, 63),
    (131, 50, 65),
    (2, 3, 1025),
    (7, 300, 130),
)
LAYOUTS = ("contiguous", "transposed", "sliced")


def true_distances(v: Tensor, table: Tensor, metric: str) -> Tensor:
    """[N, V], element by element in fp64."""
    v, table = v.double(), table.double()
    if metric == "l2":
        return (v[:, None] - table).square().sum(dim=2).sqrt()
    return 1 - torch.nn.functional.cosine_similarity(v[:, None], table, dim=2)


def mask_of(n: int, rows: int, allowed: Tensor | None, extra: Tensor | None) -> Tensor:
    row = torch.arange(rows)
    mask = torch.ones(n, rows, dtype=torch.bool)
    if allowed is not None:
        mask = (row >= allowed[:, :1]) & (row < allowed[:, 1:])
    if extra is not None:
        mask[:, extra] = True
    return mask


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_accuracy(dtype, metric, layout):
    """No allowed row is nearer than the one found, beyond the rounding of the sum."""
    for n, rows, d in SIZES:
        v, table, allowed, extra = search_inputs(n, rows, d, dtype, layout)
        for limits in ((None, None), (allowed, extra), (allowed.clamp(max=0), extra)):
            index, distance = nearest_row(
                v, table, allowed=limits[0], extra=limits[1], metric=metric
            )
            name = f"{n}x{rows}x{d}"
            assert index.dtype == torch.int64 and distance.dtype == coefficient_dtype(dtype)
            if n == 0:
                assert index.shape == distance.shape == (0,)
                continue
            mask = mask_of(n, rows, *limits)
            assert mask[torch.arange(n), index].all(), name
            true = true_distances(v, table, metric)
            found = true[torch.arange(n), index]
            rounding = torch.finfo(distance.dtype).eps * (1 + d**0.5)
            torch.testing.assert_close(
                distance.double(), found, rtol=rounding, atol=rounding, msg=name
            )
            best = true.masked_fill(~mask, torch.inf).amin(dim=1)
            assert (found <= best * (1 + rounding) + rounding).all(), name


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_many_small_cases_with_ties_equal_brute_force(dtype):
    """Small integers are exact, so the index must be exactly that of the first nearest row."""
    generator = torch.Generator().manual_seed(0)

    def draw(low: int, high: int, *size: int) -> Tensor:
        return torch.randint(low, high, size, generator=generator)

    for case in range(1500):
        n, rows, d = (int(x) for x in draw(1, 30, 3))
        d = d if case % 2 else d % 3 + 1
        v, table = draw(-1, 2, n, d).to(dtype), draw(-1, 2, rows, d).to(dtype)
        extra = draw(0, rows, 1 + case % 3) if case % 4 else None
        allowed = draw(0, rows + 1, n, 2).sort(dim=1).values if case % 4 else None
        mask = mask_of(n, rows, allowed, extra)
        true = (v[:, None].double() - table.double()).square().sum(dim=2)
        expected = true.masked_fill(~mask, torch.inf).argmin(dim=1)
        index, distance = nearest_row(v, table, allowed=allowed, extra=extra)
        assert torch.equal(index, expected), case
        reference, _ = _nearest_row._reference(v, table, allowed, extra, 0)
        assert torch.equal(reference, expected), case
        gathered = true.gather(1, index[:, None])[:, 0].sqrt()
        torch.testing.assert_close(distance, gathered.to(distance.dtype))


@pytest.mark.parametrize("metric", METRICS)
def test_equal_rows_anywhere_go_to_the_lowest(metric):
    """Copies of a row tie exactly, wherever they fall in tiles, chunks and threads."""
    v, table, _, _ = search_inputs(20, 40, 37)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        first, _ = nearest_row(v, table, metric=metric)
        for shift in (1, 5, 8):
            copies = torch.cat([torch.full((shift, 37), torch.nan), *[table] * 7])
            index, _ = nearest_row(v, copies, metric=metric)
            assert torch.equal(index, first + shift)
        index, _ = nearest_row(
            v, torch.cat([table, table]), metric=metric,
            allowed=torch.tensor([[40, 80]]).expand(20, 2), extra=torch.tensor([60, 3, 3]),
        )  # fmt: skip
        assert torch.equal(index, torch.where(first == 3, 3, first + 40))


def test_rows_close_together_keep_their_digits():
    """|q|^2 - 2 q.r + |r|^2 in fp32 is all rounding here; sums of differences are not."""
    generator = torch.Generator().manual_seed(1)
    table = 100 + 1e-3 * torch.randn(200, 64, generator=generator)
    v = table + 1e-4 * torch.randn(200, 64, generator=generator)
    index, _ = nearest_row(v, table)
    assert torch.equal(index, torch.arange(200))


def test_a_number_that_is_none_is_never_near():
    v, table, _, _ = search_inputs(4, 30, 5)
    table[::2] = float("nan")
    index, distance = nearest_row(v, table)
    assert (index % 2 == 1).all() and distance.isfinite().all()
    allowed = torch.tensor([[4, 30]]).expand(4, 2)
    v[1] = float("nan")
    for function in (
        nearest_row,
        lambda v, table, **limits: _nearest_row._reference(v, table, *limits.values(), 0),
    ):
        index, distance = function(v, table, allowed=allowed, extra=torch.tensor([9, 3]))
        assert index[1] == 3 and distance.isnan().tolist() == [False, True, False, False]


def test_a_vector_of_zeros_has_cosine_distance_one():
    v, table, _, _ = search_inputs(3, 6, 4, torch.float64)
    v[0] = 0
    table[2] = 0
    table[0] = -v[1]
    for function in (
        lambda: nearest_row(v, table, metric="cosine"),
        lambda: _nearest_row._reference(v, table, None, None, 1),
    ):
        index, distance = function()
        assert index[0] == 0 and distance[0] == 1


def test_every_element_is_written(poisoned_memory):
    for n, rows, d in SIZES:
        v, table, allowed, extra = search_inputs(n, rows, d)
        index, distance = nearest_row(v, table, allowed=allowed, extra=extra)
        assert not distance.isnan().any()
        assert ((index >= 0) & (index < rows)).all()


@pytest.mark.parametrize("metric", METRICS)
def test_thread_count_does_not_change_the_result(metric):
    v, table, allowed, extra = search_inputs(150, 2000, 33)
    one = nearest_row(v, table, allowed=allowed, extra=extra, metric=metric)
    torch.set_num_threads(2)
    two = nearest_row(v, table, allowed=allowed, extra=extra, metric=metric)
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])


@needs_library
def test_memory_does_not_grow_with_the_table():
    """What torch's allocator hands out: the two results, whatever N x V is."""
    v, table, _, _ = search_inputs(64, 4096, 8)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        torch.ops.dive_fast.nearest_row(v, table, None, None, 0)
    allocated = [event for event in profile.events() if event.cpu_memory_usage > 0]
    assert sum(event.self_cpu_memory_usage for event in allocated) <= 64 * (8 + 4) + 1024


@pytest.mark.parametrize("metric", METRICS)
def test_projection_returns_rows_and_passes_the_gradient_straight_through(metric):
    v, table, allowed, extra = search_inputs(6, 20, 5)
    v.requires_grad_()
    rows, index = projection(v, table, allowed=allowed, extra=extra, metric=metric)
    assert torch.equal(rows, table[index])
    expected, _ = nearest_row(v.detach(), table, allowed=allowed, extra=extra, metric=metric)
    assert torch.equal(index, expected)
    weight = torch.arange(30.0).view(6, 5)
    (gradient,) = torch.autograd.grad(rows, v, weight)
    assert torch.equal(gradient, weight)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16), ids=str)
def test_opcheck(dtype, layout):
    v, table, allowed, extra = search_inputs(5, 9, 7, dtype, layout)
    for limits in ((None, None), (allowed, extra)):
        torch.library.opcheck(torch.ops.dive_fast.nearest_row.default, (v, table, *limits, 1))
    empty = search_inputs(0, 9, 7)
    torch.library.opcheck(torch.ops.dive_fast.nearest_row.default, (*empty[:2], None, None, 0))


def test_compiles_into_one_graph():
    for dynamic in (False, True):
        compiled = torch.compile(projection, backend="aot_eager", fullgraph=True, dynamic=dynamic)
        for n, rows in ((4, 9), (7, 11)):
            v, table, allowed, extra = search_inputs(n, rows, 3)
            v.requires_grad_()
            limits = {"allowed": allowed, "extra": extra}
            for ours, expected in zip(
                compiled(v, table, **limits), projection(v, table, **limits), strict=True
            ):
                assert torch.equal(ours, expected)


ARGUMENTS = ("v", "table", "allowed", "extra")


@pytest.mark.parametrize(
    "argument, value, message",
    [
        ("v", None, "v must be a tensor, but got NoneType"),
        ("v", torch.zeros(3), r"v must have shape \[N, D\], but got \[3\]"),
        ("v", torch.zeros(4, 3).long(), "v must be float64 or .* but got int64"),
        ("table", torch.zeros(5, 4), r"table must have shape \[V, 3\] .* but got \[5, 4\]"),
        ("table", torch.zeros(0, 3), r"table must have shape \[V, 3\] with V at least 1"),
        ("table", torch.zeros(5, 3).double(), "table must be float32, but got float64"),
        ("table", torch.zeros(5, 3, requires_grad=True), "table must not require a gradient"),
        ("table", torch.zeros(5, 3, device="meta"), "table must be on the device of v, cpu"),
        ("allowed", torch.zeros(3, 2).long(), r"allowed must have shape \[4, 2\], .* \[3, 2\]"),
        ("allowed", torch.zeros(4, 2), "allowed must be int64, but got float32"),
        ("extra", torch.zeros(1, 1).long(), r"extra must have shape \[M\], but got \[1, 1\]"),
        ("extra", torch.zeros(1), "extra must be int64, but got float32"),
        ("metric", "l1", "metric must be one of l2, cosine, but got 'l1'"),
    ],
)
def test_bad_arguments_are_named(argument, value, message):
    inputs = dict(zip(ARGUMENTS, search_inputs(4, 5, 3), strict=True))
    inputs[argument] = value
    v, table = inputs.pop("v"), inputs.pop("table")
    for function in (nearest_row, projection):
        with pytest.raises(DiveFastError, match=f"{function.__name__}: {message}"):
            function(v, table, **inputs)


def test_a_gradient_through_nearest_row_is_refused():
    v, table, _, _ = search_inputs(4, 5, 3)
    with pytest.raises(DiveFastError, match="nearest_row: v must not require a gradient"):
        nearest_row(v.requires_grad_(), table)


@pytest.mark.parametrize(
    "error, message, allowed, extra",
    [
        (IndexError, r"allowed must be ranges within \[0, 5\], but got \[2, 6\) at position 1",
         [[0, 5], [2, 6]], [1]),
        (IndexError, r"allowed must be .* got \[3, 2\) at position 0", [[3, 2], [0, 1]], [1]),
        (IndexError, r"allowed must be .* got \[-1, 2\) at", [[-1, 2], [0, 1]], [1]),
        (IndexError, r"extra must be in \[0, 5\), but got 5 at position 1", [[0, 1]] * 2, [0, 5]),
        (ValueError, r"allowed must leave every query a row, but got \[2, 2\) at position 1 and "
         "no extra rows", [[0, 1], [2, 2]], []),
    ],
)  # fmt: skip
def test_rows_outside_the_table_are_refused(error, message, allowed, extra):
    v, table = torch.zeros(2, 3), torch.zeros(5, 3)
    allowed, extra = torch.tensor(allowed), torch.tensor(extra, dtype=torch.int64)
    with pytest.raises(error, match=f"nearest_row: {message}"):
        nearest_row(v, table, allowed=allowed, extra=extra)
    with pytest.raises(error, match=f"nearest_row: {message}"):
        _nearest_row._reference(v, table, allowed, extra, 0)


@needs_library
def test_the_bare_op_cannot_be_made_to_read_out_of_bounds():
    v, table, allowed, extra = search_inputs(4, 5, 3)
    for bad in (
        (v[:, :2], table, allowed, extra, 0),
        (v[0], table, allowed, extra, 0),
        (v, table.double(), allowed, extra, 0),
        (v, table, allowed[:2], extra, 0),
        (v, table, allowed.int(), extra, 0),
        (v, table, allowed, extra.int(), 0),
        (v, table, allowed, extra, 2),
        (v, table[:0], None, None, 0),
    ):
        with pytest.raises((ValueError, RuntimeError)):
            torch.ops.dive_fast.nearest_row(*bad)
