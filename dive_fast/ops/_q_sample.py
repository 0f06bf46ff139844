"""`q_sample`: the forward process x_t = a x0 + s eps, gathered for many (image, noise) pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from dive_fast.ops._checks import (
    FLOAT_DTYPES,
    accumulation_dtype,
    check_images,
    check_index,
    check_index_range,
    check_no_gradient,
    check_same_device,
    check_same_images,
    check_vector,
    coefficient_dtypes,
)
from dive_fast.ops._library import define, define_triton


def _reference(
    x0: Tensor, image_index: Tensor, noise: Tensor, noise_index: Tensor, a: Tensor, s: Tensor
) -> Tensor:
    check_index_range("q_sample", "image_index", image_index, x0.shape[0])
    check_index_range("q_sample", "noise_index", noise_index, noise.shape[0])
    dtype = accumulation_dtype(x0.dtype)
    images = x0.index_select(0, image_index).to(dtype)  # [M, C, h, w]
    noises = noise.index_select(0, noise_index).to(dtype)  # [M, C, h, w]
    # x_t = a_t x0 + s_t eps
    x_t = _per_row(a).to(dtype) * images + _per_row(s).to(dtype) * noises
    return x_t.to(x0.dtype).contiguous()


def _fake(
    x0: Tensor, image_index: Tensor, noise: Tensor, noise_index: Tensor, a: Tensor, s: Tensor
) -> Tensor:
    return x0.new_empty((image_index.shape[0], *x0.shape[1:]))


define(
    "q_sample(Tensor x0, Tensor image_index, Tensor noise, Tensor noise_index, "
    "Tensor a, Tensor s) -> Tensor",
    _reference,
    _fake,
)
define_triton("q_sample", "q_sample")


def _setup_context(ctx, inputs, output) -> None:
    x0, image_index, noise, noise_index, a, s = inputs
    wants_x0, wants_noise = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
    ctx.save_for_backward(
        image_index if wants_x0 else None,
        a if wants_x0 else None,
        noise_index if wants_noise else None,
        s if wants_noise else None,
    )
    ctx.n_images, ctx.n_noises, ctx.dtype = x0.shape[0], noise.shape[0], x0.dtype


def _backward(ctx, grad: Tensor):
    image_index, a, noise_index, s = ctx.saved_tensors
    grad_x0 = grad_noise = None
    if ctx.needs_input_grad[0]:
        grad_x0 = _scatter_rows(grad, a, image_index, ctx.n_images, ctx.dtype)
    if ctx.needs_input_grad[2]:
        grad_noise = _scatter_rows(grad, s, noise_index, ctx.n_noises, ctx.dtype)
    return grad_x0, None, grad_noise, None, None, None


def _scatter_rows(
    grad: Tensor, coefficient: Tensor, index: Tensor, rows: int, dtype: torch.dtype
) -> Tensor:
    """Sum of coefficient[m] * grad[m] over the m with index[m] == row, for every row.

    Summed in the accumulation dtype: one image is often shared by hundreds of probes.
    """
    scaled = _per_row(coefficient).to(accumulation_dtype(dtype)) * grad
    total = scaled.new_zeros((rows, *grad.shape[1:]))
    return total.index_add(0, index, scaled).to(dtype)


def _per_row(coefficient: Tensor) -> Tensor:
    return coefficient.view(-1, 1, 1, 1)


torch.library.register_autograd("dive_fast::q_sample", _backward, setup_context=_setup_context)


def q_sample(
    x0: Tensor, image_index: Tensor, noise: Tensor, noise_index: Tensor, a: Tensor, s: Tensor
) -> Tensor:
    """Noises images: `x_t[m] = a[m] * x0[image_index[m]] + s[m] * noise[noise_index[m]]`.

    Equation 4 of DDPM (arXiv 2006.11239) with a = sqrt(alpha_bar_t), s = sqrt(1 - alpha_bar_t);
    flow models pass a = 1 - sigma_t, s = sigma_t. Neither images nor noises are ever repeated in
    memory. Computed in fp32 (fp64 for fp64 data) and rounded once.

    Args:
        x0: images or latents, [B, C, h, w]; fp64, fp32, bf16 or fp16; any strides.
        image_index: row of `x0` for each result, int64 [M], in [0, B).
        noise: noises, [N, C, h, w], of the dtype of `x0`; any strides.
        noise_index: row of `noise` for each result, int64 [M], in [0, N).
        a: factor of the image, fp32 [M] (fp64 allowed with fp64 data).
        s: factor of the noise, as `a`.

    Returns:
        x_t, [M, C, h, w], contiguous, of the dtype of `x0`; M = 0 works. Differentiable any number
        of times in `x0` and `noise`.

    Raises:
        DiveFastError: an argument has the wrong shape, dtype or device, or `a` or `s` requires a
            gradient.
        IndexError: an index is out of range (on a GPU, torch's own device assertion).

    Examples:
        >>> import torch
        >>> from dive_fast.ops import q_sample
        >>> x0, noise = torch.zeros(1, 3, 8, 8), torch.ones(2, 3, 8, 8)
        >>> image, probe = torch.tensor([0, 0]), torch.tensor([0, 1])
        >>> q_sample(x0, image, noise, probe, torch.ones(2), torch.tensor([0.5, 0.25]))[:, 0, 0, 0]
        tensor([0.5000, 0.2500])
    """
    op = "q_sample"
    check_images(op, "x0", x0, FLOAT_DTYPES)
    check_images(op, "noise", noise, (x0.dtype,))
    check_same_images(op, "noise", noise, "x0", x0)
    rows = check_index(op, "image_index", image_index)
    check_index(op, "noise_index", noise_index, rows)
    check_vector(op, "a", a, coefficient_dtypes(x0.dtype), rows)
    check_vector(op, "s", s, coefficient_dtypes(x0.dtype), rows)
    check_same_device(
        op, "x0", x0, image_index=image_index, noise=noise, noise_index=noise_index, a=a, s=s
    )
    check_no_gradient(op, a=a, s=s)
    return torch.ops.dive_fast.q_sample(x0, image_index, noise, noise_index, a, s)
