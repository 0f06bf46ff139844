"""What each option of the engine buys on this machine, on the digits model.

    python -m bench.engine_options --images 4 --rounds 5

Every option is set alone, against the plain engine (float32, no cache), on two loads: enumeration
(forwards) and `invert` (forwards and backwards). First the losses are compared with the plain ones:
a wrong result is not timed. Then the options take turns, so that other load on the machine meets
all alike, and medians are reported. Runs on every device there is. Appends to
bench/results/engine_options.jsonl.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch

from bench import records
from dive_fast import DiffusionClassifier
from dive_fast.data.digits import load_digits


@dataclass(frozen=True)
class Variant:
    """One option against the plain engine; its losses' relative distance from the plain ones."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    tolerance: float = 1e-4


# bfloat16 keeps 8 bits: each value is off by up to 0.4%, and there are many layers of them.
VARIANTS = (
    Variant("plain"),
    Variant("cache exact", {"cache": "exact"}),
    Variant("cache encoder", {"cache": "encoder"}),
    Variant("channels-last", {"channels_last": True}),
    Variant("autocast bfloat16", {"autocast": "bfloat16"}, 2e-2),
    Variant("dtype bfloat16", {"dtype": "bfloat16"}, 2e-2),
    Variant("compile", {"compile": True}),
    Variant("compile, dtype bfloat16", {"compile": True, "dtype": "bfloat16"}, 2e-2),
)
LOADS = {"enumerate": {"strategy": "enumerate", "probes": 25}, "invert": {"strategy": "invert"}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=20, help="digits per round (default: 20)")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (default: 5)")
    parser.add_argument("--skip-compile", action="store_true", help="compiling takes a minute")
    arguments = parser.parse_args()
    images = load_digits("train").images[: arguments.images]
    variants = [v for v in VARIANTS if not (arguments.skip_compile and "compile" in v.options)]
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        run(device, images, variants, arguments.rounds)


def run(device: str, images, variants: list[Variant], rounds: int) -> None:
    """Checks, times and records all variants on one device."""
    classifiers = {
        v.name: DiffusionClassifier.from_pretrained(
            "digits", device=device, **{"cache": "off", **v.options}
        )
        for v in variants
    }
    expected = classifiers["plain"].losses(images, probes=25)
    errors = {}
    for variant in variants:
        found = classifiers[variant.name].losses(images, probes=25)
        errors[variant.name] = ((found - expected).norm() / expected.norm()).item()
        assert errors[variant.name] <= variant.tolerance, (variant.name, errors[variant.name])
    for load, settings in LOADS.items():
        seconds: dict[str, list[float]] = {v.name: [] for v in variants}
        for round_ in range(rounds + 1):  # the first warms up, compiles backwards, and is dropped
            for name, classifier in classifiers.items():
                start = time.perf_counter()
                classifier(images, **settings)
                if round_ > 0:
                    seconds[name].append((time.perf_counter() - start) / len(images))
        plain = median(seconds["plain"])
        print(f"\n{device}, {torch.get_num_threads()} threads, {load}, {len(images)} images")
        print(f"{'option':26} ms an image  against plain  relative error")
        for name, classifier in classifiers.items():
            row = {
                "load_kind": load,
                "option": name,
                "device": device,
                "n": len(images),
                "rounds": rounds,
                "seconds_per_image": median(seconds[name]),
                "spread": [min(seconds[name]), max(seconds[name])],
                "against_plain": plain / median(seconds[name]),
                "relative_error": errors[name],
                **classifier.last_run.to_dict(),
            }
            print(
                f"{name:26} {1e3 * row['seconds_per_image']:11.2f} {row['against_plain']:12.2f}x "
                f"{errors[name]:15.1e}",
                flush=True,
            )
            records.append("engine_options", row, classifier)


if __name__ == "__main__":
    main()
