"""What every op benchmark needs: sizes of real models, the copy bandwidth, and the record."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

BACKENDS = ("plain", "compile", "dive_fast")


@dataclass(frozen=True)
class Images:
    """A batch of M rows over B images and N probes, as an engine asks for it."""

    name: str
    channels: int
    out_channels: int  # of the prediction
    side: int
    rows: int
    images: int = 1

    @property
    def elements(self) -> int:
        return self.rows * self.channels * self.side**2


CPU_IMAGES = (
    Images("sd 256x4x64x64", 4, 4, 64, 256),
    Images("dit 256x4x32x32", 4, 8, 32, 256),
    Images("dit 1000x4x32x32", 4, 8, 32, 1000),
    Images("digits 25x1x8x8", 1, 2, 8, 25),
)
# Sizes of a few GB, for the bandwidth of a device.
GPU_IMAGES = (
    *CPU_IMAGES,
    Images("sd 32768x4x64x64", 4, 4, 64, 32768, images=128),
    Images("dit 65536x4x32x32", 4, 8, 32, 65536, images=128),
)


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def image_sizes() -> tuple[Images, ...]:
    return GPU_IMAGES if device() == "cuda" else CPU_IMAGES


def synchronised(function: Callable[[], object]) -> Callable[[], object]:
    """A function whose wall time includes the work that it leaves to a GPU."""
    if device() == "cpu":
        return function

    def call() -> object:
        result = function()
        torch.cuda.synchronize()
        return result

    return call


@functools.cache
def copy_bandwidth(nbytes: int) -> float:
    """Bytes read and written per second by `copy_` of a tensor of `nbytes`, in this process."""
    source = torch.ones(max(nbytes // 4, 1), device=device())
    target = torch.empty_like(source)
    copy = synchronised(lambda: target.copy_(source))
    times = []
    for _ in range(30):
        start = time.perf_counter()
        copy()
        times.append(time.perf_counter() - start)
    return 2 * source.numel() * 4 / sorted(times)[len(times) // 2]


def assert_close(result: Tensor, expected: Tensor) -> None:
    """The gate: no time is taken of a wrong result."""
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


def measure(
    benchmark,
    function: Callable[[], object],
    *,
    op: str,
    size: str,
    backend: str,
    nbytes: int = 0,
    flops: int = 0,
    copied: int = 0,
) -> None:
    """Times `function` under pytest-benchmark and leaves what the record needs beside it.

    Args:
        nbytes: bytes that the op must read and write at least.
        flops: floating-point operations that it must do.
        copied: size of the tensor whose copy is the yardstick of bandwidth.
    """
    benchmark.extra_info.update(
        op=op,
        size=size,
        backend=backend,
        device=device(),
        threads=torch.get_num_threads(),
        bytes=nbytes,
        flops=flops,
        copy_bandwidth=copy_bandwidth(copied) if copied else None,
    )
    benchmark(synchronised(function))
