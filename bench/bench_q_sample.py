"""q_sample against the usual gather, scale and add."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bench.harness import BACKENDS, assert_close, device, image_sizes, measure
from dive_fast import ops


def plain(x0, image_index, noise, noise_index, a, s) -> Tensor:
    a, s = a.view(-1, 1, 1, 1), s.view(-1, 1, 1, 1)
    return a * x0[image_index] + s * noise[noise_index]


FUNCTIONS = {"plain": plain, "compile": torch.compile(plain), "dive_fast": ops.q_sample}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", image_sizes(), ids=lambda size: size.name)
def test_q_sample(benchmark, size, backend):
    generator = torch.Generator().manual_seed(0)
    shape = (size.channels, size.side, size.side)
    inputs = (
        torch.randn(size.images, *shape, generator=generator),
        torch.randint(0, size.images, (size.rows,), generator=generator),
        torch.randn(min(size.rows, 1024), *shape, generator=generator),
        torch.randint(0, min(size.rows, 1024), (size.rows,), generator=generator),
        torch.rand(size.rows, generator=generator),
        torch.rand(size.rows, generator=generator),
    )
    inputs = tuple(x.to(device()) for x in inputs)
    function = FUNCTIONS[backend]
    assert_close(function(*inputs), plain(*inputs))
    written = 4 * size.elements
    measure(
        benchmark,
        lambda: function(*inputs),
        op="q_sample",
        size=size.name,
        backend=backend,
        nbytes=2 * written,  # a noise per row is read; the images are few and stay in the caches
        flops=3 * size.elements,
        copied=written,
    )
