"""The ops on a GPU: the checks of the other files, with tensors there. `bench/gpu.sh` runs them."""

from __future__ import annotations

import device_checks
import pytest
import torch
from sample_inputs import (
    FLOAT_DTYPES,
    SMALL,
    loss_inputs,
    q_sample_inputs,
    search_inputs,
    special_searches,
    vector,
)
from torch import Tensor

from dive_fast import ops
from dive_fast.ops import METRICS, _nearest_box, _nearest_row

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]
NAMESPACE = torch.ops.dive_fast


def on_gpu(inputs: tuple) -> tuple:
    return device_checks.place(inputs, "cuda")


def test_q_sample():
    device_checks.check_q_sample(NAMESPACE.q_sample, "cuda")


def test_loss_and_backward():
    pair = NAMESPACE.noise_prediction_loss, NAMESPACE.noise_prediction_loss_backward
    device_checks.check_loss(*pair, "cuda")
    device_checks.check_not_a_number_is_passed_on(*pair, "cuda")
    device_checks.check_unknown_codes_are_refused(*pair, "cuda")


@pytest.mark.parametrize("metric", range(len(METRICS)))
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_nearest_row(dtype, metric):
    for n, rows, d in ((1, 1, 1), (0, 3, 4), (9, 65, 63), (131, 1000, 65), (33, 300, 1025)):
        for layout in ("contiguous", "transposed", "sliced"):
            v, table, allowed, extra = search_inputs(n, rows, d, dtype, layout)
            for limits in ((None, None), (allowed, extra)):
                inputs = (v, table, *limits, metric)
                index, distance = (x.cpu() for x in NAMESPACE.nearest_row(*on_gpu(inputs)))
                wide = (v.double(), table.double(), *limits, metric)
                _, best = _nearest_row._reference(*wide)
                found = _nearest_row._distance_of_pairs(wide[0], wide[1][index], metric)
                eps = torch.finfo(distance.dtype).eps * (1 + d**0.5)
                torch.testing.assert_close(distance.double(), found, rtol=eps, atol=eps)
                assert (found <= best * (1 + eps) + eps).all()


def test_nearest_row_gives_ties_to_the_lowest():
    generator = torch.Generator().manual_seed(0)
    for rows in (5, 130, 5000):
        table = torch.randint(-1, 2, (rows, 4), generator=generator).float()
        v = torch.randint(-1, 2, (70, 4), generator=generator).float()
        v[3], table[::7] = float("nan"), float("nan")
        allowed = torch.randint(0, rows + 1, (70, 2), generator=generator).sort(dim=1).values
        extra = torch.randint(0, rows, (3,), generator=generator)
        inputs = (v, table, allowed, extra, 0)
        index, _ = NAMESPACE.nearest_row(*on_gpu(inputs))
        assert torch.equal(index.cpu(), _nearest_row._reference(*inputs)[0])


@pytest.mark.parametrize("metric", range(len(METRICS)))
def test_nearest_row_where_numbers_are_none(metric):
    for inputs in special_searches(60):
        index, distance = NAMESPACE.nearest_row(*on_gpu((*inputs, metric)))
        expected = _nearest_row._reference(*inputs, metric)
        assert torch.equal(index.cpu(), expected[0])
        torch.testing.assert_close(distance.cpu(), expected[1], equal_nan=True)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_nearest_box(dtype):
    generator = torch.Generator().manual_seed(0)
    for case in range(200):
        grid = (1, 2, 5, 31, 33, 90, 256)[case % 7]
        pair = [
            torch.randint(0, 5, (3, grid, grid), generator=generator).to(dtype) for _ in range(2)
        ]
        pair[1][:, -1, -1] = float("nan")
        sizes = case % grid, case // 7 % grid
        expected = _nearest_box._reference(*pair, *sizes)
        result = NAMESPACE.nearest_box(*on_gpu((*pair, *sizes)))
        for ours, wanted in zip(result, expected, strict=True):
            assert torch.equal(ours.cpu(), wanted), (case, grid)


def gpu_cases() -> list[tuple[str, tuple]]:
    loss = (*loss_inputs(SMALL, learned_sigma=True), vector(SMALL.rows), 1, 2)
    boxes = torch.arange(50.0).view(2, 5, 5)
    return [
        ("q_sample", q_sample_inputs(SMALL)),
        ("noise_prediction_loss", loss),
        ("noise_prediction_loss_backward", (vector(SMALL.rows), *loss)),
        ("nearest_row", (*search_inputs(5, 9, 7), 0)),
        ("nearest_box", (boxes, boxes, 1, 2)),
    ]


@pytest.mark.parametrize("name, inputs", gpu_cases(), ids=lambda x: x if isinstance(x, str) else "")
def test_opcheck_and_no_hidden_copies(name, inputs):
    op = getattr(NAMESPACE, name).default
    torch.library.opcheck(op, on_gpu(inputs))
    placed = on_gpu(inputs)
    op(*placed)  # loads and compiles
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.set_sync_debug_mode("error")
        try:
            result = op(*placed)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    outputs = (result,) if isinstance(result, Tensor) else result
    assert all(output.is_cuda for output in outputs)


def test_public_functions_run_on_the_gpu():
    x0, image, noise, probe, a, s = on_gpu(q_sample_inputs(SMALL))
    x_t = ops.q_sample(x0, image, noise, probe, a, s).requires_grad_()
    ops.noise_prediction_loss(x_t, noise, probe, x0, image, a, s).sum().backward()
    assert x_t.grad is not None and x_t.grad.isfinite().all()
    v, table, allowed, extra = on_gpu(search_inputs(5, 9, 7))
    rows, index = ops.projection(v, table, allowed=allowed, extra=extra)
    assert torch.equal(rows, table[index])
