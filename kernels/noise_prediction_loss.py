"""noise_prediction_loss and its backward on CUDA: one launch each, the target built on the fly."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dive_fast.kernels._rows import OPTIONS, accumulator, as_rows, block_size

# Codes as in dive_fast/ops/_noise_prediction_loss.py (TARGETS, NORMS).
EPSILON, V_PREDICTION, SAMPLE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
L2, L1 = tl.constexpr(0), tl.constexpr(1)


@triton.jit
def checked_row(p_index, i_m, limit):
    """The index of row i_m, asserted to be in [0, limit)."""
    row = tl.load(p_index + i_m)
    tl.device_assert((row >= 0) & (row < limit), "noise_prediction_loss: index out of range")
    return row


@triton.jit
def residual(p_prediction, p_noise, p_x0, a, s, o_n, m_n, ACC: tl.constexpr, TARGET: tl.constexpr):
    """target - prediction of one row at o_n, 0 where m_n is false; pointers are the row's."""
    b_prediction = tl.load(p_prediction + o_n, mask=m_n, other=0.0).to(ACC)  # [BLOCK]
    if TARGET == EPSILON:
        b_target = tl.load(p_noise + o_n, mask=m_n, other=0.0).to(ACC)
    elif TARGET == SAMPLE:
        b_target = tl.load(p_x0 + o_n, mask=m_n, other=0.0).to(ACC)
    else:
        b_eps = tl.load(p_noise + o_n, mask=m_n, other=0.0).to(ACC)
        b_x0 = tl.load(p_x0 + o_n, mask=m_n, other=0.0).to(ACC)
        if TARGET == V_PREDICTION:
            b_target = a * b_eps - s * b_x0  # arXiv 2202.00512
        else:
            b_target = b_eps - b_x0  # flow, arXiv 2209.03003
    return b_target - b_prediction


@triton.jit
def loss_kernel(
    p_prediction,  # [M, n and more], rows prediction_stride apart
    p_noise,  # [N, n], rows noise_stride apart
    p_noise_index,  # [M]
    p_x0,  # [B, n], rows x0_stride apart
    p_image_index,  # [M]
    p_a,  # [M]
    p_s,  # [M]
    p_weight,  # [M]
    p_loss,  # [M]
    n_noises,
    n_images,
    n,
    prediction_stride,
    noise_stride,
    x0_stride,
    ACC: tl.constexpr,
    TARGET: tl.constexpr,
    NORM: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """loss[m] = weight[m] / n * sum of norm(target - prediction), one program per row."""
    i_m = tl.program_id(0).to(tl.int64)
    p_prediction += i_m * prediction_stride
    p_noise += checked_row(p_noise_index, i_m, n_noises) * noise_stride
    p_x0 += checked_row(p_image_index, i_m, n_images) * x0_stride
    a = tl.load(p_a + i_m).to(ACC)
    s = tl.load(p_s + i_m).to(ACC)
    b_sum = tl.zeros([BLOCK], dtype=ACC)
    for start in range(0, n, BLOCK):
        o_n = start + tl.arange(0, BLOCK)
        m_n = o_n < n
        b_r = residual(p_prediction, p_noise, p_x0, a, s, o_n, m_n, ACC, TARGET)
        if NORM == L2:
            b_sum += b_r * b_r
        elif NORM == L1:
            b_sum += tl.abs(b_r)
        else:  # huber, delta 1
            b_magnitude = tl.abs(b_r)
            b_sum += tl.where(b_magnitude < 1, 0.5 * b_r * b_r, b_magnitude - 0.5)
    loss = tl.sum(b_sum, axis=0) / n
    if HAS_WEIGHT:
        loss *= tl.load(p_weight + i_m).to(ACC)
    tl.store(p_loss + i_m, loss)


@triton.jit
def backward_kernel(
    p_grad,  # [M]
    p_prediction,  # [M, n and more], rows prediction_stride apart
    p_noise,  # [N, n], rows noise_stride apart
    p_noise_index,  # [M]
    p_x0,  # [B, n], rows x0_stride apart
    p_image_index,  # [M]
    p_a,  # [M]
    p_s,  # [M]
    p_weight,  # [M]
    p_result,  # [M, n_result]
    n_noises,
    n_images,
    n,
    n_result,
    prediction_stride,
    noise_stride,
    x0_stride,
    blocks,  # programs per row
    ACC: tl.constexpr,
    TARGET: tl.constexpr,
    NORM: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """result[m] = -grad[m] weight[m] / n * norm'(target - prediction); 0 in unread channels."""
    i_m = (tl.program_id(0) // blocks).to(tl.int64)
    i_b = tl.program_id(0) % blocks
    p_prediction += i_m * prediction_stride
    p_noise += checked_row(p_noise_index, i_m, n_noises) * noise_stride
    p_x0 += checked_row(p_image_index, i_m, n_images) * x0_stride
    a = tl.load(p_a + i_m).to(ACC)
    s = tl.load(p_s + i_m).to(ACC)
    scale = -tl.load(p_grad + i_m).to(ACC) / n
    if HAS_WEIGHT:
        scale *= tl.load(p_weight + i_m).to(ACC)
    o_n = i_b.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < n
    b_r = residual(p_prediction, p_noise, p_x0, a, s, o_n, m_n, ACC, TARGET)
    if NORM == L2:
        b_slope = 2 * b_r
    elif NORM == L1:
        b_slope = tl.where(b_r > 0, 1.0, tl.where(b_r < 0, -1.0, 0.0)).to(ACC)
    else:  # huber; written so that NaN stays NaN
        b_slope = tl.where(b_r < -1, -1.0, tl.where(b_r > 1, 1.0, b_r)).to(ACC)
    b_result = tl.where(m_n, scale * b_slope, 0.0).to(p_result.dtype.element_ty)
    tl.store(p_result + i_m * n_result + o_n, b_result, mask=o_n < n_result)


def noise_prediction_loss(
    prediction: Tensor,  # [M, C or 2C, h, w]
    noise: Tensor,  # [N, C, h, w]
    noise_index: Tensor,  # [M]
    x0: Tensor,  # [B, C, h, w]
    image_index: Tensor,  # [M]
    a: Tensor,  # [M]
    s: Tensor,  # [M]
    weight: Tensor | None,  # [M]
    target: int,
    norm: int,
) -> Tensor:
    """Losses [M]; arguments as `dive_fast.ops.noise_prediction_loss`, which checks them."""
    rows, n = prediction.shape[0], noise.shape[1:].numel()
    acc = torch.float64 if prediction.dtype == torch.float64 else torch.float32
    loss = torch.empty(rows, dtype=acc, device=prediction.device)
    if rows == 0:
        return loss
    prediction, noise, x0 = first_channels(prediction, noise), as_rows(noise), as_rows(x0)
    loss_kernel[(rows,)](
        prediction,
        noise,
        noise_index.contiguous(),
        x0,
        image_index.contiguous(),
        a.contiguous(),
        s.contiguous(),
        a if weight is None else weight.contiguous(),
        loss,
        noise.shape[0],
        x0.shape[0],
        n,
        prediction.stride(0),
        noise.stride(0),
        x0.stride(0),
        ACC=accumulator(prediction.dtype),
        TARGET=target,
        NORM=norm,
        HAS_WEIGHT=weight is not None,
        BLOCK=block_size(n),
        **OPTIONS,
    )
    return loss


def noise_prediction_loss_backward(
    grad: Tensor,  # [M]
    prediction: Tensor,  # [M, C or 2C, h, w]
    noise: Tensor,  # [N, C, h, w]
    noise_index: Tensor,  # [M]
    x0: Tensor,  # [B, C, h, w]
    image_index: Tensor,  # [M]
    a: Tensor,  # [M]
    s: Tensor,  # [M]
    weight: Tensor | None,  # [M]
    target: int,
    norm: int,
) -> Tensor:
    """The gradient to the prediction, of its shape and dtype, contiguous."""
    result = torch.empty(prediction.shape, dtype=prediction.dtype, device=prediction.device)
    rows, n, n_result = prediction.shape[0], noise.shape[1:].numel(), prediction.shape[1:].numel()
    if rows == 0:
        return result
    prediction, noise, x0 = first_channels(prediction, noise), as_rows(noise), as_rows(x0)
    block = block_size(n_result)
    blocks = triton.cdiv(n_result, block)
    backward_kernel[(rows * blocks,)](
        grad.contiguous(),
        prediction,
        noise,
        noise_index.contiguous(),
        x0,
        image_index.contiguous(),
        a.contiguous(),
        s.contiguous(),
        a if weight is None else weight.contiguous(),
        result,
        noise.shape[0],
        x0.shape[0],
        n,
        n_result,
        prediction.stride(0),
        noise.stride(0),
        x0.stride(0),
        blocks,
        ACC=accumulator(prediction.dtype),
        TARGET=target,
        NORM=norm,
        HAS_WEIGHT=weight is not None,
        BLOCK=block,
        **OPTIONS,
    )
    return result


def first_channels(prediction: Tensor, noise: Tensor) -> Tensor:
    """The channels that are read, in place where their rows are contiguous."""
    return as_rows(prediction[:, : noise.shape[1]])
