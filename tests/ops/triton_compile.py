"""Compiles every Triton kernel for an architecture, with the ptxas that Triton ships; no GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dive_fast.kernels import noise_prediction_loss, q_sample
from dive_fast.kernels._rows import OPTIONS

# (prediction, noise and x0) as Triton spells them
DTYPES = (("fp32", "fp32"), ("bf16", "bf16"), ("fp16", "fp32"), ("fp64", "fp64"))


def compile_all(architecture: int, cache: Path) -> dict[str, tuple[int, bool]]:
    """Size of every kernel's machine code, and whether it holds its assertion, by name."""
    triton.knobs.cache.dir = str(cache)
    target = GPUTarget("cuda", architecture, 32)
    sizes = {}
    for name, function, types, constants in kernels():
        source = ASTSource(
            fn=function,
            signature={**types, **dict.fromkeys(constants, "constexpr")},
            constexprs={
                (function.arg_names.index(key),): value for key, value in constants.items()
            },
        )
        compiled = triton.compile(source, target=target, options=OPTIONS)
        assert f".target sm_{architecture}" in compiled.asm["ptx"], name
        sizes[name] = len(compiled.asm["cubin"]), "__assertfail" in compiled.asm["ptx"]
    return sizes


def kernels() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any]]]:
    """Name, kernel, types of its arguments and constants."""
    for dtype, data in DTYPES:
        constants = {"ACC": tl.float64 if dtype == "fp64" else tl.float32, "BLOCK": 2048}
        kernel = q_sample.q_sample_kernel
        pointers = {
            **dict.fromkeys(("p_x0", "p_noise", "p_x_t"), f"*{dtype}"),
            **dict.fromkeys(("p_image_index", "p_noise_index"), "*i64"),
            **dict.fromkeys(("p_a", "p_s"), "*fp32"),
        }
        yield f"q_sample {dtype}", kernel, types_of(kernel, pointers, constants), constants
        for target, norm in ((0, 0), (1, 1), (3, 2)):
            constants = {**constants, "TARGET": target, "NORM": norm, "HAS_WEIGHT": norm > 0}
            pointers = {
                **dict.fromkeys(("p_prediction", "p_result"), f"*{dtype}"),
                **dict.fromkeys(("p_noise", "p_x0"), f"*{data}"),
                **dict.fromkeys(("p_image_index", "p_noise_index"), "*i64"),
                **dict.fromkeys(("p_a", "p_s", "p_weight", "p_grad", "p_loss"), "*fp32"),
            }
            for kernel in (
                noise_prediction_loss.loss_kernel,
                noise_prediction_loss.backward_kernel,
            ):
                name = f"{kernel.__name__} {dtype} {data} {target} {norm}"
                yield name, kernel, types_of(kernel, pointers, constants), constants


def types_of(kernel: Any, pointers: dict[str, str], constants: dict[str, Any]) -> dict[str, str]:
    """Pointers as given; the other arguments are numbers, in 64 bits the largest that occur."""
    return {name: pointers.get(name, "i64") for name in kernel.arg_names if name not in constants}
