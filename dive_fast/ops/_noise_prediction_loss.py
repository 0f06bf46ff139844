"""`noise_prediction_loss`: how far a prediction is from its target, one number per row.

The target (eps, v, x0 or flow) is built on the fly from gathered images and noises, and of a
prediction with a learned sigma only the first C channels are read, in place.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dive_fast.errors import DiveFastError
from dive_fast.ops._checks import (
    FLOAT_DTYPES,
    accumulation_dtype,
    check_choice,
    check_code,
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

# Positions in these tuples are the codes of the op schemas and of csrc/cpu/kernels.h: the stable
# ABI of torch 2.10 to 2.13 leaks a string on every call that takes one.
TARGETS = ("epsilon", "v_prediction", "sample", "flow")
NORMS = ("l2", "l1", "huber")
EPSILON, V_PREDICTION, SAMPLE, FLOW = range(4)
L2, L1, HUBER = range(3)


class _Inputs(NamedTuple):
    """What the three ops take, in the order of their schemas.

    The public functions know target and norm by their names, the ops by their codes.
    """

    prediction: Tensor  # [M, C or 2C, h, w]
    noise: Tensor  # [N, C, h, w]
    noise_index: Tensor  # [M]
    x0: Tensor  # [B, C, h, w]
    image_index: Tensor  # [M]
    a: Tensor  # [M]
    s: Tensor  # [M]
    weight: Tensor | None  # [M]
    target: str | int
    norm: str | int


def _check_codes(inputs: _Inputs) -> None:
    """For direct calls of the ops."""
    check_code("noise_prediction_loss", "target", inputs.target, TARGETS)
    check_code("noise_prediction_loss", "norm", inputs.norm, NORMS)


def _residual(inputs: _Inputs) -> Tensor:
    """target - prediction[:, :C], [M, C, h, w], in the accumulation dtype."""
    prediction, noise, noise_index, x0, image_index, a, s, _, target, _ = inputs
    _check_codes(inputs)
    check_index_range("noise_prediction_loss", "noise_index", noise_index, noise.shape[0])
    check_index_range("noise_prediction_loss", "image_index", image_index, x0.shape[0])
    dtype = accumulation_dtype(prediction.dtype)
    predicted = prediction[:, : noise.shape[1]].to(dtype)
    if target == EPSILON:
        return noise.index_select(0, noise_index).to(dtype) - predicted
    if target == SAMPLE:
        return x0.index_select(0, image_index).to(dtype) - predicted
    eps = noise.index_select(0, noise_index).to(dtype)
    images = x0.index_select(0, image_index).to(dtype)
    if target == FLOW:
        return eps - images - predicted
    # v = a_t eps - s_t x0, Salimans and Ho, arXiv 2202.00512
    a, s = a.to(dtype).view(-1, 1, 1, 1), s.to(dtype).view(-1, 1, 1, 1)
    return a * eps - s * images - predicted


def _error(residual: Tensor, norm: int) -> Tensor:
    """The norm of every element of the residual; huber has delta = 1, as in torch."""
    if norm == L2:
        return residual.square()
    magnitude = residual.abs()
    if norm == L1:
        return magnitude
    return torch.where(magnitude < 1, 0.5 * magnitude.square(), magnitude - 0.5)


def _error_slope(residual: Tensor, norm: int) -> Tensor:
    """d norm(r) / d r, for every element of the residual r."""
    if norm == L2:
        return 2 * residual
    if norm == L1:
        return residual.sign()
    return residual.clamp(-1, 1)


def _loss_reference(*arguments) -> Tensor:
    inputs = _Inputs(*arguments)
    loss = _error(_residual(inputs), inputs.norm).mean(dim=(1, 2, 3))
    return loss if inputs.weight is None else loss * inputs.weight.to(loss.dtype)


def _loss_fake(prediction: Tensor, *arguments) -> Tensor:
    _check_codes(_Inputs(prediction, *arguments))
    return prediction.new_empty(prediction.shape[0], dtype=accumulation_dtype(prediction.dtype))


def _backward_reference(grad: Tensor, *arguments) -> Tensor:
    inputs = _Inputs(*arguments)
    prediction, channels = inputs.prediction, inputs.noise.shape[1]
    residual = _residual(inputs)
    row_scale = -grad.to(residual.dtype) / math.prod(residual.shape[1:])
    if inputs.weight is not None:
        row_scale = row_scale * inputs.weight.to(residual.dtype)
    result = torch.zeros(prediction.shape, dtype=prediction.dtype, device=prediction.device)
    result[:, :channels] = row_scale.view(-1, 1, 1, 1) * _error_slope(residual, inputs.norm)
    return result


def _backward_fake(grad: Tensor, prediction: Tensor, *arguments) -> Tensor:
    _check_codes(_Inputs(prediction, *arguments))
    return prediction.new_empty(prediction.shape)


def _error_map_reference(*arguments) -> Tensor:
    inputs = _Inputs(*arguments)
    error = _error(_residual(inputs), inputs.norm).mean(dim=1)
    if inputs.weight is not None:
        error = error * inputs.weight.to(error.dtype).view(-1, 1, 1)
    return error.contiguous()


def _error_map_backward(ctx, grad: Tensor):
    grad_prediction = None
    if ctx.needs_input_grad[0]:
        inputs = _Inputs(*ctx.saved_tensors, ctx.target, ctx.norm)
        prediction, channels = inputs.prediction, inputs.noise.shape[1]
        residual = _residual(inputs)
        scale = -grad.to(residual.dtype) / channels
        if inputs.weight is not None:
            scale = scale * inputs.weight.to(residual.dtype).view(-1, 1, 1)
        grad_prediction = torch.zeros_like(prediction)
        grad_prediction[:, :channels] = scale[:, None] * _error_slope(residual, inputs.norm)
    return grad_prediction, *[None] * (len(_Inputs._fields) - 1)


def _error_map_fake(prediction: Tensor, *arguments) -> Tensor:
    _check_codes(_Inputs(prediction, *arguments))
    return prediction.new_empty(
        (prediction.shape[0], *prediction.shape[2:]), dtype=accumulation_dtype(prediction.dtype)
    )


_ARGUMENTS = (
    "Tensor prediction, Tensor noise, Tensor noise_index, Tensor x0, Tensor image_index, "
    "Tensor a, Tensor s, Tensor? weight, int target, int norm"
)
define(f"noise_prediction_loss({_ARGUMENTS}) -> Tensor", _loss_reference, _loss_fake)
define(
    f"noise_prediction_loss_backward(Tensor grad, {_ARGUMENTS}) -> Tensor",
    _backward_reference,
    _backward_fake,
)
define(f"noise_prediction_error_map({_ARGUMENTS}) -> Tensor", _error_map_reference, _error_map_fake)
# The map is for drawings and for weighted pixels, and keeps its reference there.
define_triton("noise_prediction_loss", "noise_prediction_loss")
define_triton("noise_prediction_loss_backward", "noise_prediction_loss")


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.target, ctx.norm = inputs
    ctx.save_for_backward(*(tensors if ctx.needs_input_grad[0] else ()))


def _backward(ctx, grad: Tensor):
    grad_prediction = None
    if ctx.needs_input_grad[0]:
        grad_prediction = torch.ops.dive_fast.noise_prediction_loss_backward(
            grad, *ctx.saved_tensors, ctx.target, ctx.norm
        )
    return grad_prediction, *[None] * (len(_Inputs._fields) - 1)


def _refuse_double_backward(ctx, grad: Tensor):
    raise DiveFastError(
        "noise_prediction_loss: expected a single backward, but got a double one "
        "(its second derivative is not implemented)"
    )


torch.library.register_autograd(
    "dive_fast::noise_prediction_loss", _backward, setup_context=_setup_context
)
torch.library.register_autograd(
    "dive_fast::noise_prediction_loss_backward", _refuse_double_backward
)
torch.library.register_autograd(
    "dive_fast::noise_prediction_error_map", _error_map_backward, setup_context=_setup_context
)


def noise_prediction_loss(
    prediction: Tensor,
    noise: Tensor,
    noise_index: Tensor,
    x0: Tensor,
    image_index: Tensor,
    a: Tensor,
    s: Tensor,
    *,
    target: str = "epsilon",
    norm: str = "l2",
    weight: Tensor | None = None,
) -> Tensor:
    """The diffusion loss of every row: `weight[m] * mean(norm(target[m] - prediction[m, :C]))`.

    The per-class error of the Diffusion Classifier (arXiv 2303.16203, equation 4 before the
    expectation). With x0 = `x0[image_index[m]]` and eps = `noise[noise_index[m]]` the target is

    - "epsilon": eps (DDPM, arXiv 2006.11239);
    - "v_prediction": a[m] eps - s[m] x0 (arXiv 2202.00512);
    - "sample": x0;
    - "flow": eps - x0 (rectified flow, arXiv 2209.03003).

    Args:
        prediction: the network's output, [M, C, h, w], or [M, 2C, h, w] when it also predicts
            sigma: only the first C channels are read, without a copy. fp64, fp32, bf16 or fp16;
            any strides.
        noise: [N, C, h, w], of the dtype of `prediction`, or fp32 under a bf16 or fp16 prediction.
        noise_index: row of `noise` for each row, int64 [M], in [0, N).
        x0: images or latents, [B, C, h, w], of the dtype of `noise`.
        image_index: row of `x0` for each row, int64 [M], in [0, B).
        a: factor of the image in x_t, fp32 [M] (fp64 allowed with an fp64 prediction); it matters
            to "v_prediction" only.
        s: factor of the noise in x_t, as `a`.
        target: one of "epsilon", "v_prediction", "sample", "flow".
        norm: "l2" (square), "l1", or "huber" (delta 1, as `torch.nn.functional.huber_loss`).
        weight: factor of each row's loss, as `a`; None for 1.

    Returns:
        [M] losses, fp32 (fp64 for an fp64 prediction). Differentiable once, in `prediction` only;
        the gradient has the dtype of `prediction` and zeros in the channels that are not read.

    Raises:
        DiveFastError: an argument has the wrong shape, dtype, device or name; an argument other
            than `prediction` requires a gradient; or a double backward is asked for.
        IndexError: an index is out of range (on a GPU, torch's own device assertion).

    Examples:
        >>> import torch
        >>> from dive_fast.ops import noise_prediction_loss
        >>> prediction, noise = torch.zeros(2, 6, 8, 8), torch.full((1, 3, 8, 8), 2.0)
        >>> row, one = torch.zeros(2, dtype=torch.int64), torch.ones(2)
        >>> noise_prediction_loss(prediction, noise, row, noise, row, one, one)
        tensor([4., 4.])
    """
    inputs = _checked(
        "noise_prediction_loss",
        _Inputs(prediction, noise, noise_index, x0, image_index, a, s, weight, target, norm),
    )
    return torch.ops.dive_fast.noise_prediction_loss(*inputs)


def noise_prediction_error_map(
    prediction: Tensor,
    noise: Tensor,
    noise_index: Tensor,
    x0: Tensor,
    image_index: Tensor,
    a: Tensor,
    s: Tensor,
    *,
    target: str = "epsilon",
    norm: str = "l2",
    weight: Tensor | None = None,
) -> Tensor:
    """Where a prediction is wrong: `noise_prediction_loss` before its mean over the pixels.

    Args: as `noise_prediction_loss`.

    Returns:
        [M, h, w] errors, the mean over C alone, fp32 (fp64 for an fp64 prediction), so that
        `map.mean(dim=(1, 2))` is the loss. Differentiable in `prediction` only, in plain torch.

    Raises:
        DiveFastError: as `noise_prediction_loss`, but for the double backward.
        IndexError: an index is out of range (on a GPU, torch's own device assertion).

    Examples:
        >>> import torch
        >>> from dive_fast.ops import noise_prediction_error_map
        >>> noise, row, one = torch.ones(1, 3, 2, 2), torch.tensor([0]), torch.ones(1)
        >>> noise_prediction_error_map(torch.zeros(1, 3, 2, 2), noise, row, noise, row, one, one)
        tensor([[[1., 1.],
                 [1., 1.]]])
    """
    op = "noise_prediction_error_map"
    inputs = _checked(
        op, _Inputs(prediction, noise, noise_index, x0, image_index, a, s, weight, target, norm)
    )
    return torch.ops.dive_fast.noise_prediction_error_map(*inputs)


def _checked(op: str, given: _Inputs) -> _Inputs:
    """With the codes of `target` and `norm` in place of their names."""
    prediction, noise, noise_index, x0, image_index, a, s, weight, target, norm = given
    check_images(op, "prediction", prediction, FLOAT_DTYPES)
    narrow = prediction.dtype in (torch.bfloat16, torch.float16)
    data_dtypes = (prediction.dtype, torch.float32) if narrow else (prediction.dtype,)
    check_images(op, "noise", noise, data_dtypes)
    check_images(op, "x0", x0, (noise.dtype,))
    check_same_images(op, "x0", x0, "noise", noise)
    channels, h, w = noise.shape[1:]
    if tuple(prediction.shape[1:]) not in ((channels, h, w), (2 * channels, h, w)):
        raise DiveFastError(
            f"{op}: prediction must have shape [M, {channels} or {2 * channels}, {h}, {w}] beside "
            f"noise of shape {list(noise.shape)}, but got {list(prediction.shape)}"
        )
    rows = prediction.shape[0]
    check_index(op, "noise_index", noise_index, rows)
    check_index(op, "image_index", image_index, rows)
    check_vector(op, "a", a, coefficient_dtypes(prediction.dtype), rows)
    check_vector(op, "s", s, coefficient_dtypes(prediction.dtype), rows)
    if weight is not None:
        check_vector(op, "weight", weight, coefficient_dtypes(prediction.dtype), rows)
    vectors = {"noise_index": noise_index, "image_index": image_index, "a": a, "s": s}
    check_same_device(op, "prediction", prediction, noise=noise, x0=x0, weight=weight, **vectors)
    check_no_gradient(op, noise=noise, x0=x0, a=a, s=s, weight=weight)
    codes = check_choice(op, "target", target, TARGETS), check_choice(op, "norm", norm, NORMS)
    return _Inputs(*given[:-2], *codes)
