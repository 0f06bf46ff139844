"""What bfloat16 and torch.compile buy, and what they change, on the CPU.

    python -m bench.precision answers                  # the held-out digits
    python -m bench.precision speed --rounds 3         # a DiT-B/2 with random weights

"answers": every class of every held-out digit on 25 probes, as float32 and in bfloat16; accuracy,
and on how many digits the answer is that of float32. "speed": evaluations per second of a DiT of
the shape of DiT-B/2 (130 million parameters, latents 4 x 32 x 32) on 8 rows, forwards of an
enumeration; the options take turns, and the losses must be those of the plain engine. bench/
engine_options.py has the speed of the digits. Appends to bench/results/precision.jsonl.
"""

from __future__ import annotations

import argparse
import time
from statistics import median
from typing import Any

import torch
from diffusers import DiTTransformer2DModel

from bench import records
from dive_fast import DiffusionClassifier, EngineOptions, Schedule
from dive_fast.data.digits import load_digits
from dive_fast.models.dit.model import DiT

DTYPE = "dtype"
VARIANTS: dict[str, dict[str, Any]] = {
    "float32": {},
    "autocast bfloat16": {"autocast": "bfloat16"},
    "dtype bfloat16": {DTYPE: "bfloat16"},
    "compile": {"compile": True},
    "compile, dtype bfloat16": {"compile": True, DTYPE: "bfloat16"},
}
ROWS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["answers", "speed"])
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds (default: 3)")
    parser.add_argument("--threads", type=int, help="of torch (default: its own)")
    parser.add_argument("--limit", type=int, help="fewer digits, for a try")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.what == "answers":
        answers(arguments.limit)
    else:
        speed(arguments.rounds)


def answers(limit: int | None) -> None:
    """Accuracy and agreement with float32 on the held-out digits."""
    images, labels = load_digits("test")
    images, labels = images[:limit], torch.as_tensor(labels[:limit])
    plain = None
    for name in ("float32", "autocast bfloat16", "dtype bfloat16"):
        classifier = DiffusionClassifier.from_pretrained("digits", **VARIANTS[name])
        found = classifier(images, strategy="enumerate", probes=25)
        index = torch.tensor([answer.index for answer in found])
        losses = torch.stack([answer.losses for answer in found])
        plain = (index, losses) if plain is None else plain
        row = {
            "what": "answers",
            "option": name,
            "n": len(images),
            "accuracy": (index == labels).double().mean().item(),
            "agreement": (index == plain[0]).double().mean().item(),
            "relative_error": ((losses - plain[1]).norm() / plain[1].norm()).item(),
        }
        print(
            f"{name:26} accuracy {row['accuracy']:.2%}  as float32 {row['agreement']:.2%}  "
            f"relative error {row['relative_error']:.1e}",
            flush=True,
        )
        records.append("precision", row, classifier)


def speed(rounds: int) -> None:
    """Evaluations per second of every option on a DiT of DiT-B/2's shape."""
    x0 = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    asked = {"latents": x0, "classes": list(range(ROWS)), "probes": 1}
    classifiers = {name: dit(options) for name, options in VARIANTS.items()}
    expected = classifiers["float32"].losses(**asked)
    errors = {}
    for name, classifier in classifiers.items():
        start = time.perf_counter()
        found = classifier.losses(**asked)
        print(f"{name}: first call {time.perf_counter() - start:.1f} s", flush=True)
        errors[name] = ((found - expected).norm() / expected.norm()).item()
        assert errors[name] <= (2e-2 if "bfloat16" in name else 1e-4), (name, errors[name])
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for _ in range(rounds):
        for name, classifier in classifiers.items():
            start = time.perf_counter()
            classifier.losses(**asked)
            seconds[name].append(time.perf_counter() - start)
    plain = median(seconds["float32"])
    for name, times in seconds.items():
        row = {
            "what": "speed",
            "option": name,
            "rows": ROWS,
            "rounds": rounds,
            "evaluations_per_second": ROWS / median(times),
            "spread": [ROWS / max(times), ROWS / min(times)],
            "against_float32": plain / median(times),
            "relative_error": errors[name],
        }
        print(
            f"{name:26} {row['evaluations_per_second']:7.2f} evaluations a second "
            f"{row['against_float32']:6.2f}x  relative error {errors[name]:.1e}",
            flush=True,
        )
        records.append("precision", row, classifiers[name])


def dit(options: dict[str, Any]) -> DiffusionClassifier:
    """A DiT of DiT-B/2's shape, with the same random weights at every call."""
    torch.manual_seed(0)
    network = DiTTransformer2DModel(
        num_attention_heads=12,
        attention_head_dim=64,
        num_layers=12,
        in_channels=4,
        out_channels=8,
        sample_size=32,
        patch_size=2,
        num_embeds_ada_norm=1000,
    )
    network = network.eval().requires_grad_(False)
    names = tuple(map(str, range(1000)))
    model = DiT(network, None, Schedule.linear(), names, name="DiT-B/2 with random weights")
    dtype = getattr(torch, options.get(DTYPE, "float32"))
    model.to(torch.device("cpu"), dtype)
    engine = {name: value for name, value in options.items() if name != DTYPE}
    return DiffusionClassifier(model, batch_size=ROWS, options=EngineOptions(**engine))


if __name__ == "__main__":
    main()
