"""noise_prediction_loss and its backward on CUDA: one launch each, the target built on the fly."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dive_fast.errors import DiveFastError
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
    p_loss,  # [M]
    p_prediction,  # [M, n and more], rows prediction_stride apart
    p_noise,  # [N, n], rows noise_stride apart
    p_noise_index,  # [M]
    p_x0,  # [B, n], rows x0_stride apart
    p_image_index,  # [M]
    p_a,  # [M]
    p_s,  # [M]
    p_weight,  # [M]
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
    p_result,  # [M, n_result]
    p_grad,  # [M]
    p_prediction,  # [M, n and more], rows prediction_stride apart
    p_noise,  # [N, n], rows noise_stride apart
    p_noise_index,  # [M]
    p_x0,  # [B, n], rows x0_stride apart
    p_image_index,  # [M]
    p_a,  # [M]
    p_s,  # [M]
    p_weight,  # [M]
    n_noises,
    n_images,
    n,
    prediction_stride,
    noise_stride,
    x0_stride,
    n_result,
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


def noise_prediction_loss(*inputs: Tensor | int | None) -> Tensor:
    """Losses [M]; inputs as of `shared`."""
    pointers, sizes, constants = shared(*inputs)
    prediction, noise = pointers[:2]
    acc = torch.float64 if prediction.dtype == torch.float64 else torch.float32
    loss = torch.empty(len(prediction), dtype=acc, device=prediction.device)
    if len(loss) > 0:
        block = block_size(noise.shape[1:].numel())
        loss_kernel[(len(loss),)](loss, *pointers, *sizes, BLOCK=block, **constants)
    return loss


def noise_prediction_loss_backward(
    grad: Tensor, prediction: Tensor, *inputs: Tensor | int | None
) -> Tensor:
    """The gradient to the prediction, of its shape and dtype, contiguous; grad is [M]."""
    pointers, sizes, constants = shared(prediction, *inputs)
    result = torch.empty(prediction.shape, dtype=prediction.dtype, device=prediction.device)
    if len(result) > 0:
        n_result = result.shape[1:].numel()
        block = block_size(n_result)
        blocks = triton.cdiv(n_result, block)
        backward_kernel[(len(result) * blocks,)](
            result,
            grad.contiguous(),
            *pointers,
            *sizes,
            n_result,
            blocks,
            BLOCK=block,
            **constants,
        )
    return result


def shared(
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
) -> tuple[list[Tensor], list[int], dict[str, Any]]:
    """What both kernels take, `p_prediction` to `x0_stride` in their order, and constants.

    Arguments as `dive_fast.ops.noise_prediction_loss`, which checks them; the codes are checked
    here, for an unknown one would take the last branch of the kernels. The channels that are read
    stay in place where their rows are contiguous.
    """
    for name, code, count in (("target", target, 4), ("norm", norm, 3)):
        if not 0 <= code < count:
            raise DiveFastError(
                f"noise_prediction_loss: {name} must be in [0, {count}), but got {code}"
            )
    read = as_rows(prediction[:, : noise.shape[1]])
    noise, x0 = as_rows(noise), as_rows(x0)
    vectors = [x.contiguous() for x in (a, s, a if weight is None else weight)]
    pointers = [read, noise, noise_index.contiguous(), x0, image_index.contiguous(), *vectors]
    strides = [rows.stride(0) for rows in (read, noise, x0)]
    sizes = [len(noise), len(x0), noise.shape[1:].numel(), *strides]
    constants = {
        "ACC": accumulator(prediction.dtype),
        "TARGET": target,
        "NORM": norm,
        "HAS_WEIGHT": weight is not None,
        **OPTIONS,
    }
    return pointers, sizes, constants
