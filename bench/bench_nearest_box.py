"""nearest_box against the same suffix minimum in plain torch."""

from __future__ import annotations

import pytest
import torch

from bench.harness import BACKENDS, device, measure
from dive_fast import ops
from dive_fast.ops._nearest_box import _reference

FUNCTIONS = {
    "plain": lambda tl, br: _reference(tl, br, 1, 1),
    "compile": torch.compile(lambda tl, br: _reference(tl, br, 1, 1)),
    "dive_fast": ops.nearest_box,
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("boxes, grid", ((1, 90), (30, 90), (1, 256)))
def test_nearest_box(benchmark, boxes, grid, backend):
    generator = torch.Generator().manual_seed(0)
    pair = [torch.randn(boxes, grid, grid, generator=generator).to(device()) for _ in range(2)]
    function = FUNCTIONS[backend]
    for result, expected in zip(function(*pair), _reference(*pair, 1, 1), strict=True):
        assert torch.equal(result, expected)
    measure(
        benchmark,
        lambda: function(*pair),
        op="nearest_box",
        size=f"{boxes} of {grid} x {grid}",
        backend=backend,
        nbytes=2 * 4 * boxes * grid**2,
        flops=4 * boxes * grid**2,
    )
