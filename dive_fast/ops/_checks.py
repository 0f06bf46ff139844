"""Argument checks of the public op functions: they name the argument, what was expected and got."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dive_fast.errors import DiveFastError, shown

FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_images(op: str, name: str, value: Tensor, dtypes: Sequence[torch.dtype]) -> None:
    """`value` must be a [rows, C, h, w] tensor of one of `dtypes`, with C, h, w at least 1."""
    _check_is_tensor(op, name, value)
    if value.dim() != 4 or min(value.shape[1:]) < 1:
        raise DiveFastError(
            f"{op}: {name} must have shape [rows, C, h, w] with C, h and w at least 1, "
            f"but got {list(value.shape)}"
        )
    _check_dtype(op, name, value, dtypes)


def check_matrix(
    op: str, name: str, value: Tensor, dtypes: Sequence[torch.dtype], shape: str
) -> None:
    """`value` must be two-dimensional, with columns, and of one of `dtypes`; `shape` names it."""
    _check_is_tensor(op, name, value)
    if value.dim() != 2 or value.shape[1] < 1:
        raise DiveFastError(f"{op}: {name} must have shape {shape}, but got {list(value.shape)}")
    _check_dtype(op, name, value, dtypes)


def check_square_maps(op: str, name: str, value: Tensor, dtypes: Sequence[torch.dtype]) -> None:
    """`value` must be a [N, G, G] tensor of one of `dtypes`, with G at least 1."""
    _check_is_tensor(op, name, value)
    if value.dim() != 3 or value.shape[1] != value.shape[2] or value.shape[1] < 1:
        raise DiveFastError(f"{op}: {name} must have shape [N, G, G], but got {list(value.shape)}")
    _check_dtype(op, name, value, dtypes)


def check_same_images(op: str, name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """`value` must agree with `other` in C, h and w."""
    if value.shape[1:] != other.shape[1:]:
        raise DiveFastError(
            f"{op}: {name} must have the [C, h, w] of {other_name}, {list(other.shape[1:])}, "
            f"but got {list(value.shape[1:])}"
        )


def check_index(op: str, name: str, value: Tensor, rows: int | None = None) -> int:
    """`value` must be an int64 tensor of shape [rows] (any length if None); returns its length.

    Its range is checked by the kernels: reading it here would stall a GPU and break a graph.
    """
    return check_vector(op, name, value, (torch.int64,), rows)


def check_vector(
    op: str, name: str, value: Tensor, dtypes: Sequence[torch.dtype], rows: int | None = None
) -> int:
    """`value` must be a tensor of shape [rows] of one of `dtypes`; returns its length."""
    _check_is_tensor(op, name, value)
    if value.dim() != 1 or (rows is not None and value.shape[0] != rows):
        expected = "M" if rows is None else rows
        raise DiveFastError(
            f"{op}: {name} must have shape [{expected}], but got {list(value.shape)}"
        )
    _check_dtype(op, name, value, dtypes)
    return value.shape[0]


def check_choice(op: str, name: str, value: str, choices: Sequence[str]) -> int:
    """The position of `value` in `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise DiveFastError(
            f"{op}: {name} must be one of {', '.join(choices)}, but got {shown(value)}"
        )
    return choices.index(value)


def check_code(op: str, name: str, code: int, choices: Sequence[str]) -> None:
    """`code` must be a position in `choices`; for direct calls of the ops, which take codes."""
    if not 0 <= code < len(choices):
        raise DiveFastError(f"{op}: {name} must be in [0, {len(choices)}), but got {code}")


def is_int(value: object) -> bool:
    """Whether it is an int, and neither True nor False."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_same_device(op: str, first_name: str, first: Tensor, **others: Tensor | None) -> None:
    """Every tensor must be on the device of `first`."""
    for name, value in others.items():
        if value is not None and value.device != first.device:
            raise DiveFastError(
                f"{op}: {name} must be on the device of {first_name}, {first.device}, "
                f"but got {value.device}"
            )


def check_no_gradient(op: str, **values: Tensor | None) -> None:
    """None of the tensors may want a gradient: the op has none, and silence would mislead."""
    if not torch.is_grad_enabled():
        return
    for name, value in values.items():
        if value is not None and value.requires_grad:
            raise DiveFastError(
                f"{op}: {name} must not require a gradient, for the op is not differentiable in "
                f"it, but got requires_grad=True (use {name}.detach())"
            )


def check_index_range(op: str, name: str, index: Tensor, rows: int) -> None:
    """Raises IndexError for an index outside [0, rows); CPU only, elsewhere torch asserts."""
    if index.device.type != "cpu" or index.numel() == 0:
        return
    outside = (index < 0) | (index >= rows)
    if outside.any():
        position = int(outside.nonzero()[0])
        raise IndexError(
            f"{op}: {name} must be in [0, {rows}), but got {int(index[position])} "
            f"at position {position}"
        )


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which an op computes: fp64 for fp64, fp32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def coefficient_dtypes(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """The dtypes that a, s and weight may have beside data of `dtype`."""
    return (torch.float32, torch.float64) if dtype == torch.float64 else (torch.float32,)


def _check_is_tensor(op: str, name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise DiveFastError(f"{op}: {name} must be a tensor, but got {type(value).__name__}")
    # The kernels read plain memory; torch's own errors on these name neither op nor argument.
    if isinstance(value, torch.masked.MaskedTensor):
        raise DiveFastError(f"{op}: {name} must be a plain tensor, but got a MaskedTensor")
    if value.is_nested or value.layout != torch.strided:
        kind = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
        raise DiveFastError(f"{op}: {name} must be a dense tensor, but got a {kind} one")


def _check_dtype(op: str, name: str, value: Tensor, dtypes: Sequence[torch.dtype]) -> None:
    if value.dtype not in dtypes:
        expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        got = str(value.dtype).removeprefix("torch.")
        raise DiveFastError(f"{op}: {name} must be {expected}, but got {got}")
