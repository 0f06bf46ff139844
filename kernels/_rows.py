"""What the launchers share: rows of contiguous elements, blocks, and options."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

MOST_ELEMENTS = 2048  # of one program at a time

# device_assert stays in the kernels: an index out of range must not read foreign memory. The
# overflow checks that would come with it are for integer arithmetic, which is in 64 bits here.
OPTIONS = {
    "debug": True,
    "sanitize_overflow": False,
    "enable_fp_fusion": True,
    "num_warps": 4,
}


def as_rows(images: Tensor) -> Tensor:
    """`images` [rows, C, h, w] with contiguous [C, h, w], copied only if they are not.

    Rows may lie any number of elements apart: a slice of channels is read in place.
    """
    expected = 1
    for size, stride in zip(reversed(images.shape[1:]), reversed(images.stride()[1:]), strict=True):
        if size != 1 and stride != expected:
            return images.contiguous()
        expected *= size
    return images


def block_size(n: int) -> int:
    """Elements that one program works on at a time, a power of two."""
    return min(MOST_ELEMENTS, triton.next_power_of_2(max(n, 16)))


def accumulator(dtype: torch.dtype) -> triton.language.dtype:
    """fp64 for fp64, fp32 for everything else."""
    return triton.language.float64 if dtype == torch.float64 else triton.language.float32
