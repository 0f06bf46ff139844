"""nearest_row against cdist and argmin, with and without the matrix product."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from bench.harness import device, measure
from dive_fast import ops

# (N, V, D): the corners and classes of a layout, DiT's class table, a table of text conditions.
SIZES = ((90, 8192, 512), (32, 1000, 1152), (32, 1000, 78848))


def by_cdist(v: Tensor, table: Tensor, mode: str) -> Tensor:
    return torch.cdist(v, table, compute_mode=mode).argmin(dim=1)


plain = functools.partial(by_cdist, mode="donot_use_mm_for_euclid_dist")
product = functools.partial(by_cdist, mode="use_mm_for_euclid_dist")
FUNCTIONS = {
    "plain": plain,
    "plain with matrix product": product,
    "compile with matrix product": torch.compile(product),
    "dive_fast": lambda v, table: ops.nearest_row(v, table)[0],
    "dive_fast cosine": lambda v, table: ops.nearest_row(v, table, metric="cosine")[0],
}


@pytest.mark.parametrize("backend", FUNCTIONS)
@pytest.mark.parametrize("n, rows, dim", SIZES)
def test_nearest_row(benchmark, n, rows, dim, backend):
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(n, dim, generator=generator).to(device())
    table = torch.randn(rows, dim, generator=generator).to(device())
    function = FUNCTIONS[backend]
    if "cosine" in backend:
        near = torch.nn.functional.cosine_similarity(v[:, None, :64], table[:, :64], dim=2)
        index, _ = ops.nearest_row(v[:, :64], table[:, :64], metric="cosine")
        assert torch.equal(index, near.argmax(dim=1))
    else:
        assert torch.equal(function(v, table), product(v.double(), table.double()))
    measure(
        benchmark,
        lambda: function(v, table),
        op="nearest_row",
        size=f"{n} of {rows} x {dim}",
        backend=backend,
        nbytes=4 * (n + rows) * dim,
        flops=3 * n * rows * dim,
    )
