"""What forwards of networks of published shapes cost on a GPU: memory and milliseconds.

    python -m bench.gpu_models gligen --rows 1 64 128 256     # dit, gligen, geodiffusion

Weights are random. A forward in float32 is compared with the CPU's first, and one in every other
precision with that. Appends to bench/results/gpu_models.jsonl.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn

from bench.open_vocabulary import inputs, published
from bench.records import RESULTS, append_line
from dive_fast.evaluation.machine import machine

CUDA = torch.device("cuda")
TOLERANCE = {"float32": 2e-3, "bfloat16": 5e-2, "float16": 2e-2}
CLASSES = 1000
Call = Callable[[nn.Module, dict[str, Any]], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("family", choices=["dit", "gligen", "geodiffusion"])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 64, 128, 256])
    parser.add_argument("--gradient-rows", type=int, nargs="+", default=[1, 8, 14])
    parser.add_argument("--dtype", choices=TOLERANCE, nargs="+", default=["bfloat16", "float16"])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("expected a GPU that torch sees, got none.")
    measure(options)


def transformer() -> DiTTransformer2DModel:
    """DiT-XL/2 of 256 x 256 pixels, in the shapes of the published one."""
    network = DiTTransformer2DModel(
        num_attention_heads=16,
        attention_head_dim=72,
        num_layers=28,
        in_channels=4,
        out_channels=8,
        sample_size=32,
        patch_size=2,
        num_embeds_ada_norm=CLASSES,
    )
    return network.eval().requires_grad_(False)


def network_of(family: str) -> nn.Module:
    torch.manual_seed(0)
    with CUDA:
        return transformer() if family == "dit" else published(family, 512, torch.float32)


def given_to(family: str, n: int, dtype: torch.dtype) -> dict[str, Any]:
    """Inputs of n rows on the GPU."""
    torch.manual_seed(1)
    with CUDA:
        if family != "dit":
            return inputs(family, n, 512, dtype)
        return {
            "hidden_states": torch.randn(n, 4, 32, 32, dtype=dtype),
            "timestep": torch.full((n,), 400),
            "class_labels": torch.arange(n) % CLASSES,
        }


def on_cpu(given: Any) -> Any:
    if isinstance(given, dict):
        return {key: on_cpu(value) for key, value in given.items()}
    return given.cpu()


@torch.no_grad()
def measure(options: argparse.Namespace) -> None:
    """Peak memory and time of forwards, and of forwards with a gradient of the condition."""
    network, given = network_of(options.family), given_to(options.family, 1, torch.float32)
    found = network(**given).sample.cpu()
    error = _apart(found, network.cpu()(**on_cpu(given)).sample)
    assert error < TOLERANCE["float32"], error
    for name in options.dtype:
        dtype = getattr(torch, name)
        network = network_of(options.family).to(dtype)
        low = network(**given_to(options.family, 1, dtype)).sample.float().cpu()
        assert _apart(low, found) < TOLERANCE[name], _apart(low, found)
        row = {
            "what": "rows",
            "gpu": torch.cuda.get_device_name(),
            "family": options.family,
            "dtype": name,
            "parameters": sum(p.numel() for p in network.parameters()),
            "weights": sum(p.numel() * p.element_size() for p in network.parameters()),
            "float32_against_cpu": error,
            "against_float32": _apart(low, found),
            "plain": _all_rows(_forward, network, options, options.rows, dtype),
        }
        if options.family != "dit":
            asked = options.gradient_rows
            row["gradient"] = _all_rows(_with_gradient, network, options, asked, dtype)
        print(row, flush=True)
        append_line(RESULTS / "gpu_models.jsonl", row, machine())


def _all_rows(
    call: Call, network: nn.Module, options: argparse.Namespace, rows: list[int], dtype: torch.dtype
) -> dict[int, dict[str, Any]]:
    return {
        n: _measured(call, network, given_to(options.family, n, dtype), options.rounds)
        for n in rows
    }


def _apart(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def _forward(network: nn.Module, given: dict[str, Any]) -> None:
    with torch.no_grad():
        network(**given)


def _with_gradient(network: nn.Module, given: dict[str, Any]) -> None:
    with torch.enable_grad():
        condition = given["encoder_hidden_states"].detach().requires_grad_()
        result = network(**{**given, "encoder_hidden_states": condition}).sample
        torch.autograd.grad(result.float().sum(), condition)


def _measured(
    call: Call,
    network: nn.Module,
    given: dict[str, Any],
    rounds: int,
) -> dict[str, Any]:
    """Bytes beyond weights and inputs, and milliseconds, median and spread; or that it fails."""
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    try:
        call(network, given)
        torch.cuda.synchronize()
    except torch.cuda.OutOfMemoryError:
        return {"out_of_memory": True}
    peak, times = torch.cuda.max_memory_allocated() - before, []
    for _ in range(rounds):
        start = time.perf_counter()
        call(network, given)
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return {"bytes": peak, "ms": median(times), "spread": [min(times), max(times)]}


if __name__ == "__main__":
    main()
