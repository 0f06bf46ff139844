"""The `dive_fast` op namespace: schemas and references in Python, faster backends where built.

Every op is defined here with its plain-torch reference on `CompositeExplicitAutograd`, so it works
on every device and for every dtype without the compiled library. The compiled library registers
CPU (and, where built, CUDA) kernels for the same names, Triton adds those that stream, and the
dispatcher prefers them all: no caller ever has to ask which one runs.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch

from dive_fast.ops import _native

NAMESPACE = "dive_fast"
KERNELS = "dive_fast.kernels"
_library = torch.library.Library(NAMESPACE, "DEF")
_op_names: list[str] = []


def define(schema: str, reference: Callable, fake: Callable) -> None:
    """Defines one op: its schema as torch writes it, its reference and its fake kernel."""
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    name = schema.split("(", 1)[0]
    _library.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    _op_names.append(name)


def define_triton(name: str, module: str) -> None:
    """Makes `dive_fast.kernels.<module>.<name>` the op's CUDA implementation, if there is Triton.

    Triton is imported by the first call on a GPU and not before. Without it the reference runs.
    """
    if importlib.util.find_spec("triton") is None:
        return

    def launch(*arguments):
        kernels = importlib.import_module(f"{KERNELS}.{module}")
        # A launch goes to the current device, wherever the tensors are.
        with torch.cuda.device(arguments[0].device):
            return getattr(kernels, name)(*arguments)

    _library.impl(name, launch, "CUDA")


@dataclass(frozen=True)
class OpStatus:
    """Whether an op runs compiled code on the CPU, and which, or why not.

    Attributes:
        native: a compiled CPU kernel is registered; otherwise the plain-torch reference runs.
        reason: the instruction set in use ("CPU: avx2"), or why there is no compiled kernel.
    """

    native: bool
    reason: str


def native_status() -> dict[str, OpStatus]:
    """Which ops run compiled code, by op name.

    Examples:
        >>> import dive_fast.ops
        >>> sorted(dive_fast.ops.native_status())[-1]
        'q_sample'
    """
    return {name: _status(name) for name in _op_names}


def _status(name: str) -> OpStatus:
    library = _native.load()
    if not library.loaded:
        return OpStatus(native=False, reason=library.reason)
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", "CPU"):
        return OpStatus(native=False, reason="the library holds no kernel for this op")
    return OpStatus(native=True, reason=f"CPU: {torch.ops.dive_fast.cpu_instruction_set()}")
