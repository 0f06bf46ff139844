"""The one generator of op inputs: tests and benchmarks draw theirs from here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "channels_last", "transposed", "sliced")


@dataclass(frozen=True)
class Shape:
    """Sizes of one call: B images, N noises and M rows of [C, h, w]."""

    images: int
    noises: int
    rows: int
    channels: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"B{self.images}-N{self.noises}-M{self.rows}-{self.pixels}"

    @property
    def pixels(self) -> str:
        return f"{self.channels}x{self.height}x{self.width}"


# Odd on purpose: single elements, sizes just below and above a vector, no rows at all. The last
# one is long enough for several blocks, several tasks and both threads.
SHAPES = (
    Shape(1, 1, 1, 1, 1, 1),
    Shape(2, 3, 5, 1, 3, 3),
    Shape(3, 2, 7, 3, 1, 63),
    Shape(2, 5, 0, 3, 4, 4),
    Shape(0, 0, 0, 1, 3, 3),
    Shape(1, 9, 65, 1, 8, 8),
    Shape(3, 4, 9, 4, 65, 63),
)
SMALL = Shape(2, 3, 4, 2, 3, 3)


def images(
    rows: int,
    channels: int,
    height: int,
    width: int,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    seed: int = 0,
) -> Tensor:
    """Standard normal [rows, C, h, w] of the layout asked for."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)

    if layout == "channels_last":
        return draw(rows, channels, height, width).to(memory_format=torch.channels_last)
    if layout == "transposed":
        return draw(rows, channels, width, height).transpose(2, 3)
    if layout == "sliced":  # what a model that pads its output would return
        return draw(rows + 1, channels + 1, height, width + 2)[1:, 1:, :, 1:-1]
    return draw(rows, channels, height, width)


def index(rows: int, limit: int, seed: int = 0) -> Tensor:
    """Random int64 [rows] in [0, limit), repeated and out of order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, max(limit, 1), (rows,), generator=generator)


def vector(rows: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Random [rows] in [0.1, 1)."""
    generator = torch.Generator().manual_seed(seed)
    return (0.1 + 0.9 * torch.rand(rows, generator=generator, dtype=torch.float64)).to(dtype)


def coefficient_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def q_sample_inputs(
    shape: Shape, dtype: torch.dtype = torch.float32, layout: str = "contiguous"
) -> tuple[Tensor, ...]:
    """x0, image_index, noise, noise_index, a, s."""
    sizes = (shape.channels, shape.height, shape.width)
    factor = coefficient_dtype(dtype)
    return (
        images(shape.images, *sizes, dtype, layout, seed=1),
        index(shape.rows, shape.images, seed=2),
        images(shape.noises, *sizes, dtype, layout, seed=3),
        index(shape.rows, shape.noises, seed=4),
        vector(shape.rows, factor, seed=5),
        vector(shape.rows, factor, seed=6),
    )


def loss_inputs(
    shape: Shape,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    *,
    learned_sigma: bool = False,
    data_dtype: torch.dtype | None = None,
) -> tuple[Tensor, ...]:
    """prediction, noise, noise_index, x0, image_index, a, s."""
    x0, image_index, noise, noise_index, a, s = q_sample_inputs(shape, data_dtype or dtype, layout)
    channels = shape.channels * (2 if learned_sigma else 1)
    prediction = images(shape.rows, channels, shape.height, shape.width, dtype, layout, seed=7)
    factor = coefficient_dtype(dtype)
    return prediction, noise, noise_index, x0, image_index, a.to(factor), s.to(factor)


def search_inputs(
    queries: int,
    rows: int,
    dim: int,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
) -> tuple[Tensor, ...]:
    """v, table, allowed, extra; ranges are seldom empty, and rows are far from unit length."""
    v = images(1, 1, queries, dim, dtype, layout, seed=1)[0, 0]
    table = images(1, 1, rows, dim, dtype, layout, seed=2)[0, 0]
    if layout == "sliced":  # [1:] of the rows, too: a table without its unconditional row
        table = images(1, 1, rows + 1, dim, dtype, layout, seed=2)[0, 0, 1:]
    bounds = torch.stack([index(queries, rows, seed=3), index(queries, rows, seed=4) + 1], dim=1)
    return v, table, bounds.sort(dim=1).values, index(3, rows, seed=5)


def special_values(*size: int, generator: torch.Generator, share: float) -> Tensor:
    """Small integers, fp64; a share of them NaN, infinite or a zero of either sign."""
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0], dtype=torch.float64)
    chosen = special[torch.randint(0, len(special), size, generator=generator)]
    usual = torch.randint(-2, 3, size, generator=generator).double()
    return torch.where(torch.rand(size, generator=generator) < share, chosen, usual)


def special_searches(cases: int) -> Iterator[tuple[Tensor, Tensor, Tensor | None, Tensor | None]]:
    """v, table, allowed, extra with numbers that are none; small, so that all sums are exact."""
    generator = torch.Generator().manual_seed(0)
    for case in range(cases):
        n, rows, dim = (int(x) for x in torch.randint(1, 20, (3,), generator=generator))
        dim, dtype = min(dim, 1 + case % 6), FLOAT_DTYPES[case % 4]
        share = (0.02, 0.1, 0.3, 0.9)[case // 4 % 4]
        v, table = (
            special_values(count, dim, generator=generator, share=share).to(dtype)
            for count in (n, rows)
        )
        allowed = torch.randint(0, rows + 1, (n, 2), generator=generator).sort(dim=1).values
        extra = torch.randint(0, rows, (1 + case % 3,), generator=generator)
        yield (v, table, allowed, extra) if case % 5 else (v, table, None, None)


def assert_as_accurate_as(
    result: Tensor, plain: Tensor, oracle: Tensor, name: str, floor: float = 2.0
) -> None:
    """The error of `result` is at most twice that of `plain`, the usual torch form at its dtype.

    `oracle` is fp64. The floor, in units of rounding of `result` at the oracle's size (at least
    1, the size of the data), covers cases in which the plain form happens to be exact. For an fp64
    result, oracle and plain are the same computation, with rounding errors of their own.
    """
    assert result.shape == oracle.shape, name
    if oracle.numel() == 0:
        return
    scale = max(1.0, oracle.abs().max().item())
    error = (result.double() - oracle).abs().max().item()
    plain_error = (plain.double() - oracle).abs().max().item()
    floor = max(floor, 8.0) if result.dtype == torch.float64 else floor
    allowed = 2 * plain_error + floor * torch.finfo(result.dtype).eps * scale
    assert error <= allowed, f"{name}: error {error:.3g}, plain torch {plain_error:.3g}"
