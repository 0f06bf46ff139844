"""q_sample on CUDA: x_t = a x0 + s eps (equation 4 of arXiv 2006.11239), gathered by row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dive_fast.kernels._rows import OPTIONS, accumulator, as_rows, block_size


@triton.jit
def q_sample_kernel(
    p_x0,  # [B, n], rows x0_stride apart
    p_image_index,  # [M]
    p_noise,  # [N, n], rows noise_stride apart
    p_noise_index,  # [M]
    p_a,  # [M]
    p_s,  # [M]
    p_x_t,  # [M, n]
    n_images,
    n_noises,
    n,
    x0_stride,
    noise_stride,
    blocks,  # programs per row
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """x_t[m] = a[m] x0[image_index[m]] + s[m] noise[noise_index[m]], BLOCK elements a program."""
    i_m = (tl.program_id(0) // blocks).to(tl.int64)
    i_b = tl.program_id(0) % blocks
    image = tl.load(p_image_index + i_m)
    probe = tl.load(p_noise_index + i_m)
    tl.device_assert((image >= 0) & (image < n_images), "q_sample: image_index out of range")
    tl.device_assert((probe >= 0) & (probe < n_noises), "q_sample: noise_index out of range")
    a = tl.load(p_a + i_m).to(ACC)
    s = tl.load(p_s + i_m).to(ACC)
    o_n = i_b.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < n
    b_x0 = tl.load(p_x0 + image * x0_stride + o_n, mask=m_n).to(ACC)  # [BLOCK]
    b_eps = tl.load(p_noise + probe * noise_stride + o_n, mask=m_n).to(ACC)  # [BLOCK]
    b_x_t = a * b_x0 + s * b_eps
    tl.store(p_x_t + i_m * n + o_n, b_x_t.to(p_x_t.dtype.element_ty), mask=m_n)


def q_sample(
    x0: Tensor,  # [B, C, h, w]
    image_index: Tensor,  # [M]
    noise: Tensor,  # [N, C, h, w]
    noise_index: Tensor,  # [M]
    a: Tensor,  # [M]
    s: Tensor,  # [M]
) -> Tensor:
    """x_t, [M, C, h, w]; arguments as `dive_fast.ops.q_sample`, which checks them."""
    rows, n = image_index.shape[0], x0.shape[1:].numel()
    x_t = torch.empty((rows, *x0.shape[1:]), dtype=x0.dtype, device=x0.device)
    if x_t.numel() == 0:
        return x_t
    x0, noise = as_rows(x0), as_rows(noise)
    block = block_size(n)
    blocks = triton.cdiv(n, block)
    q_sample_kernel[(rows * blocks,)](
        x0,
        image_index.contiguous(),
        noise,
        noise_index.contiguous(),
        a.contiguous(),
        s.contiguous(),
        x_t,
        x0.shape[0],
        noise.shape[0],
        n,
        x0.stride(0),
        noise.stride(0),
        blocks,
        ACC=accumulator(x0.dtype),
        BLOCK=block,
        **OPTIONS,
    )
    return x_t
