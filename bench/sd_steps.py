"""One inversion step of a Stable-Diffusion-sized UNet with the engine's caches.

    python -m bench.sd_steps --size sd

A step is one gradient of a relaxed prompt embedding on two probes of one image. Weights are random:
speed does not depend on them. The first step fills the caches; the figures are of the steps after
it, in which the condition has moved and (x_t, t) has not. Before any time is taken, losses and
gradients at level "exact" are compared with those without a cache. Appends one line to
bench/results/sd_steps.jsonl.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from bench.accelerate_loop import SIZES, TOKENS, make_unet
from bench.records import append
from dive_fast import DiffusionClassifier
from dive_fast.core.requests import Answer, Gradients
from dive_fast.core.schedule import Schedule, make_betas
from dive_fast.engine.options import EngineOptions
from dive_fast.models.unet.wrapped import wrap_unet
from dive_fast.strategies import DefaultProbes

LEVELS = {
    "off": EngineOptions(cache="off"),
    "exact": EngineOptions(cache="exact", cache_bytes=4 << 30),
    "encoder": EngineOptions(cache="encoder", refresh=1000, cache_bytes=4 << 30),
}
PROBES = 2


class Steps(DefaultProbes):
    """A given number of gradients along a fixed path, each one timed."""

    name = "steps"
    loss = "l2"

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def search(self, task):
        table, generator = task.vocabulary.table, torch.Generator().manual_seed(0)
        v, seconds, replies = table.mean(dim=0)[None], [], []
        for _ in range(self.steps):
            start = time.perf_counter()
            reply = yield Gradients(v, torch.arange(PROBES))
            seconds.append(time.perf_counter() - start)
            replies.append(reply)
            v = v + 0.1 * torch.randn(v.shape, generator=generator) * table.std()
        nothing = torch.full((len(table),), torch.nan)
        trace = {"seconds": seconds, "replies": replies}
        return Answer(0, torch.zeros(len(table)), torch.ones(len(nothing), dtype=int), trace)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--steps", type=int, default=4)
    options = parser.parse_args()
    size = SIZES[options.size]
    torch.manual_seed(0)
    unet = make_unet(size).to(size.dtype).eval().requires_grad_(False)
    text = torch.randn(2, TOKENS, size.text_width)
    schedule = Schedule.from_betas(make_betas("scaled_linear", 1000, 0.00085, 0.012))
    model = wrap_unet(unet, text, schedule, (4, size.side, size.side))
    x0 = torch.randn(1, 4, size.side, size.side)
    found = {}
    for level, engine in LEVELS.items():
        classifier = DiffusionClassifier(model, batch_size=PROBES, options=engine)
        (answer,) = classifier(latents=x0, strategy=Steps(options.steps), probes=PROBES, trace=True)
        found[level] = answer.trace
        if level == "exact":
            for a, b in zip(answer.trace["replies"], found["off"]["replies"], strict=True):
                for part in ("losses", "gradients"):
                    error = relative(getattr(a, part), getattr(b, part))
                    assert error < (1e-3 if size.dtype == torch.float32 else 0.1), (part, error)
    plain = found["off"]["replies"]
    row = {"size": options.size, "dtype": str(size.dtype), "threads": torch.get_num_threads()}
    for level, trace in found.items():
        times = trace["seconds"][1:]
        row[level] = {
            "median_s": statistics.median(times),
            "spread_s": max(times) - min(times),
            "gradient_error": relative(trace["replies"][-1].gradients, plain[-1].gradients),
        }
    for level in ("exact", "encoder"):
        row[level]["ratio"] = row["off"]["median_s"] / row[level]["median_s"]
    append("sd_steps", row, classifier)
    print(row)


if __name__ == "__main__":
    main()
