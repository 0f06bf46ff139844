"""Checks of the CUDA kernels against the references, for an accelerator or Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from sample_inputs import (
    FLOAT_DTYPES,
    LAYOUTS,
    SHAPES,
    SMALL,
    Shape,
    coefficient_dtype,
    loss_inputs,
    q_sample_inputs,
    vector,
)
from torch import Tensor

from dive_fast.ops import NORMS, TARGETS, _noise_prediction_loss, _q_sample

Op = Callable[..., Tensor]
# One longer than a program's block, with a last block that is not full.
LONG = Shape(2, 2, 3, 3, 31, 33)
MIXED = [(dtype, dtype) for dtype in FLOAT_DTYPES] + [(torch.bfloat16, torch.float32)]


def place(inputs: tuple, device: str) -> tuple:
    return tuple(x.to(device) if isinstance(x, Tensor) else x for x in inputs)


def assert_matches(op: Op, reference: Op, inputs: tuple, device: str, name: str) -> None:
    """The op on the device equals the reference in fp64, to the rounding of its result."""
    result = op(*place(inputs, device)).cpu()
    wide = (x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)
    expected = reference(*wide)
    rounding = 4 * torch.finfo(result.dtype).eps
    computed = torch.finfo(coefficient_dtype(result.dtype)).eps * 16
    tolerance = max(rounding, computed)
    scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    torch.testing.assert_close(
        result.double(),
        expected,
        rtol=tolerance,
        atol=tolerance * scale,
        equal_nan=True,
        msg=lambda message: f"{name}: {message}",
    )


def check_q_sample(op: Op, device: str) -> None:
    for dtype in FLOAT_DTYPES:
        for shape in (*SHAPES[:-1], LONG):
            inputs = q_sample_inputs(shape, dtype)
            assert_matches(op, _q_sample._reference, inputs, device, f"{shape} {dtype}")
        for layout in LAYOUTS:
            inputs = q_sample_inputs(SMALL, dtype, layout)
            assert_matches(op, _q_sample._reference, inputs, device, f"{layout} {dtype}")


def check_loss(loss: Op, backward: Op, device: str) -> None:
    for target in range(len(TARGETS)):
        for norm in range(len(NORMS)):
            for shape in (SHAPES[0], SHAPES[3], LONG):
                _check_loss_case(loss, backward, device, shape, target, norm)
    for dtype, data_dtype in MIXED:
        for shape in SHAPES[:-1]:
            _check_loss_case(loss, backward, device, shape, 1, 2, dtype, data_dtype)
        for layout in LAYOUTS:
            _check_loss_case(loss, backward, device, SMALL, 3, 0, dtype, data_dtype, layout)


def _check_loss_case(
    loss: Op,
    backward: Op,
    device: str,
    shape: Shape,
    target: int,
    norm: int,
    dtype: torch.dtype = torch.float32,
    data_dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
) -> None:
    name = f"{shape} {dtype} {layout} {TARGETS[target]} {NORMS[norm]}"
    for learned_sigma in (False, True):
        inputs = loss_inputs(
            shape, dtype, layout, learned_sigma=learned_sigma, data_dtype=data_dtype
        )
        grad = vector(shape.rows, inputs[-1].dtype, seed=9)
        weight = vector(shape.rows, inputs[-1].dtype, seed=8) if learned_sigma else None
        arguments = (*inputs, weight, target, norm)
        assert_matches(loss, _noise_prediction_loss._loss_reference, arguments, device, name)
        arguments = (grad, *arguments)
        reference = _noise_prediction_loss._backward_reference
        assert_matches(backward, reference, arguments, device, f"backward {name}")


def check_not_a_number_is_passed_on(loss: Op, backward: Op, device: str) -> None:
    prediction, *rest = place(loss_inputs(SMALL, learned_sigma=True), device)
    prediction[:, SMALL.channels :] = float("nan")
    prediction[1, 0, 0, 0] = float("nan")
    grad = torch.ones(SMALL.rows, device=device)
    for norm in range(len(NORMS)):
        rows = loss(prediction, *rest, None, 0, norm).isnan().tolist()
        assert rows == [False, True, False, False], norm
        gradient = backward(grad, prediction, *rest, None, 0, norm)
        assert gradient.isnan().sum() <= 1 and not gradient[:, SMALL.channels :].any(), norm


def check_an_index_out_of_range_is_caught(q_sample: Op, loss: Op) -> None:
    """In the interpreter only: on a GPU a failed assertion ends the process."""
    for wrong in (-1, 9):
        inputs = q_sample_inputs(SMALL)
        inputs[1][2] = wrong
        with pytest.raises(Exception, match="out of range"):
            q_sample(*inputs)
        inputs = loss_inputs(SMALL)
        inputs[2][2] = wrong
        with pytest.raises(Exception, match="out of range"):
            loss(*inputs, None, 0, 0)


def check_unknown_codes_are_refused(loss: Op, backward: Op, device: str) -> None:
    """A direct call takes codes, and an unknown one must not pass for a known one."""
    inputs = place(loss_inputs(SMALL), device)
    grad = torch.ones(SMALL.rows, device=device)
    for target, norm, name in (
        (7, 0, "target"),
        (-1, 0, "target"),
        (0, 3, "norm"),
        (0, -1, "norm"),
    ):
        for call in (lambda *codes: loss(*inputs, None, *codes),
                     lambda *codes: backward(grad, *inputs, None, *codes)):  # fmt: skip
            with pytest.raises(ValueError, match=rf"{name} must be in \[0, ."):
                call(target, norm)
