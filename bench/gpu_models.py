"""What networks of published shapes cost on a GPU: memory, and evaluations a second.

    python -m bench.gpu_models rows gligen --rows 1 64 128 256     # dit, gligen, geodiffusion
    python -m bench.gpu_models classify                            # a DiT-XL/2, 1000 classes
    python -m bench.gpu_models detect DIR --family gligen          # written by open_vocabulary

Weights are random, so answers mean nothing. A forward is compared with the CPU's in float32 first,
losses of the engine with those in float32. "classify" times diffusers' network alone beside it, on
the same rows. Appends to bench/results/gpu_models.jsonl.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn

from bench.open_vocabulary import inputs, pictures, published
from bench.records import RESULTS, append_line
from dive_fast import DiffusionClassifier, EngineOptions, LayoutDetector, Schedule
from dive_fast.evaluation.machine import machine
from dive_fast.models.dit.model import DiT

CUDA = torch.device("cuda")
DTYPES = ("float32", "bfloat16", "float16")
TOLERANCE = {"float32": 2e-3, "bfloat16": 5e-2, "float16": 1e-2}
CLASSES, PROBES = 1000, 2
GIGABYTE = 10**9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    rows = commands.add_parser("rows")
    rows.add_argument("family", choices=["dit", "gligen", "geodiffusion"])
    rows.add_argument("--rows", type=int, nargs="+", default=[1, 64, 128, 256])
    rows.add_argument("--gradient-rows", type=int, nargs="+", default=[1, 8, 14])
    rows.add_argument("--dtype", choices=DTYPES, nargs="+", default=["bfloat16", "float16"])
    rows.add_argument("--rounds", type=int, default=3)
    rows.set_defaults(run=measure_rows)
    whole = commands.add_parser("classify")
    whole.add_argument("--rounds", type=int, default=3)
    whole.add_argument("--batch-size", type=int, default=256)
    whole.set_defaults(run=classify)
    found = commands.add_parser("detect")
    found.add_argument("directory", type=Path)
    found.add_argument("--family", choices=["gligen", "geodiffusion"], required=True)
    found.add_argument("--dtype", choices=DTYPES, nargs="+", default=["float16"])
    found.add_argument("--batch-size", type=int, default=64)
    found.set_defaults(run=detect)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("expected a GPU that torch sees, got none.")
    options.run(options)


def record(what: str, row: dict[str, Any]) -> None:
    print(what, row, flush=True)
    row = {"what": what, "gpu": torch.cuda.get_device_name(), **row}
    append_line(RESULTS / "gpu_models.jsonl", row, machine())


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
def measure_rows(options: argparse.Namespace) -> None:
    """Peak memory and seconds of forwards, and of forwards with a gradient of the condition."""
    network = network_of(options.family)
    given = given_to(options.family, 1, torch.float32)
    found = network(**given).sample.cpu()
    expected = network.cpu()(**on_cpu(given)).sample
    network.to(CUDA)
    for name in options.dtype:
        dtype = getattr(torch, name)
        network.to(dtype)
        low = network(**given_to(options.family, 1, dtype)).sample.float().cpu()
        error = _apart(found, expected)
        assert error < TOLERANCE["float32"], error
        row = {
            "family": options.family,
            "dtype": name,
            "parameters": sum(p.numel() for p in network.parameters()),
            "weights": sum(p.numel() * p.element_size() for p in network.parameters()),
            "float32_against_cpu": error,
            "against_float32": _apart(low, expected),
        }
        for what, counts in (("plain", options.rows), ("gradient", options.gradient_rows)):
            if what == "gradient" and options.family == "dit":
                continue
            call = _forward if what == "plain" else _with_gradient
            row[what] = {
                n: _measured(call, network, given_to(options.family, n, dtype), options.rounds)
                for n in counts
            }
        record("rows", row)


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
    call: Callable[[nn.Module, dict[str, Any]], None],
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


def classify(options: argparse.Namespace) -> None:
    """Losses of every class on two probes: by the engine, and what its network alone takes."""
    names = tuple(map(str, range(CLASSES)))
    x0 = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    expected, plain = None, None
    for dtype, options_of in (
        ("float32", {}),
        ("bfloat16", {}),
        ("bfloat16", {"compile": True}),
    ):
        network = network_of("dit").to(getattr(torch, dtype))
        rows = given_to("dit", options.batch_size, getattr(torch, dtype))
        alone = _measured(_forward, network, rows, options.rounds)
        model = DiT(network, None, Schedule.linear(), names, name="DiT-XL/2, random weights")
        model.to(CUDA, getattr(torch, dtype))
        classifier = DiffusionClassifier(
            model, batch_size=options.batch_size, options=EngineOptions(**options_of)
        )
        start = time.perf_counter()
        found = classifier.losses(latents=x0, probes=PROBES)
        first = time.perf_counter() - start
        expected = found if expected is None else expected
        error = _apart(found, expected)
        assert error < TOLERANCE[dtype], error
        times = []
        for _ in range(options.rounds):
            start = time.perf_counter()
            classifier.losses(latents=x0, probes=PROBES)
            times.append(time.perf_counter() - start)
        rates = [CLASSES * PROBES / seconds for seconds in times]
        plain = median(rates) if plain is None else plain
        row = {
            "dtype": dtype,
            **options_of,
            "batch_size": options.batch_size,
            "evaluations": CLASSES * PROBES,
            "evaluations_per_second": median(rates),
            "network_alone_per_second": 1e3 * options.batch_size / alone["ms"],
            "spread": [min(rates), max(rates)],
            "against_float32": median(rates) / plain,
            "first_call_seconds": first,
            "relative_error": error,
            "peak_bytes": torch.cuda.max_memory_allocated(),
        }
        record("classify", row)
        del classifier, model, network
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def detect(options: argparse.Namespace) -> None:
    """A search of one picture as the docs advise it for 24 GB; what it takes at most."""
    for dtype in options.dtype:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        detector = LayoutDetector.from_pretrained(
            options.directory,
            classes=["person", "dog", "traffic light"],
            dtype=dtype,
            device="cuda",
            batch_size=options.batch_size,
        )
        loaded = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        (found,) = detector(
            pictures(1), max_objects=4, margin=0.0, step_probes=4, final_probes=12, rounds=1
        )
        seconds = time.perf_counter() - start
        row = {
            "family": options.family,
            "dtype": dtype,
            "batch_size": options.batch_size,
            "pixels": detector.model.image_shape[1],
            "peak_loading": loaded,
            "peak": torch.cuda.max_memory_allocated(),
            "reserved": torch.cuda.max_memory_reserved(),
            "evaluations": found.evaluations,
            "seconds": seconds,
            "evaluations_per_second": found.evaluations / seconds,
            "objects": len(found),
        }
        record("detect", row)
        del detector


if __name__ == "__main__":
    main()
