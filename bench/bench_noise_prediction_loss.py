"""noise_prediction_loss, forward and backward, against split, mse_loss and mean."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from bench.harness import BACKENDS, assert_close, device, image_sizes, measure
from dive_fast import ops


def plain(prediction, noise, noise_index, x0, image_index, a, s) -> Tensor:
    predicted = prediction.split(noise.shape[1], dim=1)[0]
    return functional.mse_loss(predicted, noise[noise_index], reduction="none").mean(dim=(1, 2, 3))


FUNCTIONS = {
    "plain": plain,
    "compile": torch.compile(plain),
    "dive_fast": ops.noise_prediction_loss,
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", image_sizes(), ids=lambda size: size.name)
def test_forward_and_backward(benchmark, size, backend):
    generator = torch.Generator().manual_seed(0)
    side, rows, noises = size.side, size.rows, min(size.rows, 1024)
    inputs = (
        torch.randn(rows, size.out_channels, side, side, generator=generator),
        torch.randn(noises, size.channels, side, side, generator=generator),
        torch.randint(0, noises, (rows,), generator=generator),
        torch.randn(size.images, size.channels, side, side, generator=generator),
        torch.randint(0, size.images, (rows,), generator=generator),
        torch.rand(rows, generator=generator),
        torch.rand(rows, generator=generator),
    )
    prediction, *rest = (x.to(device()) for x in inputs)
    prediction.requires_grad_()
    ones = torch.ones(rows, device=device())

    def run(function) -> tuple[Tensor, Tensor]:
        loss = function(prediction, *rest)
        return loss, torch.autograd.grad(loss, prediction, ones)[0]

    function = FUNCTIONS[backend]
    for result, expected in zip(run(function), run(plain), strict=True):
        assert_close(result, expected)
    read = 4 * size.elements
    written = read * size.out_channels // size.channels
    measure(
        benchmark,
        lambda: run(function),
        op="noise_prediction_loss forward+backward",
        size=size.name,
        backend=backend,
        nbytes=2 * 2 * read + written,  # prediction and noise, twice; the gradient, once
        flops=6 * size.elements,
        copied=written,
    )
