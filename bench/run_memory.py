"""Whether the memory of ``evaluate`` grows with the number of images.

    python -m bench.run_memory

A process of its own evaluates a folder of 1,000 and one of 50,000 small pictures in ten classes
with a network of one convolution, figures, summary.json and results.csv included, and tells its
largest resident size. Appends to bench/results/run_memory.jsonl.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from bench.records import RESULTS, append_line
from dive_fast import DiffusionClassifier
from dive_fast.core.schedule import Schedule
from dive_fast.data import open_dataset
from dive_fast.evaluation import evaluate
from dive_fast.evaluation.machine import machine

CLASSES, SIDE = 10, 8


class Network(torch.nn.Module):
    """As little work as can be: what is measured is everything else."""

    def __init__(self) -> None:
        super().__init__()
        self.labels = torch.nn.Embedding(CLASSES, 8)
        self.body = torch.nn.Conv2d(1, 1, 1)

    def forward(self, x: torch.Tensor, t: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        return self.body(x) + c.mean(dim=1)[:, None, None, None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, nargs=2, default=(1_000, 50_000))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        print(json.dumps(child(Path(options.child))))
        return
    few, many = (measured(n) for n in options.images)
    growth = many["peak_bytes"] / few["peak_bytes"] - 1
    print(
        f"{few['peak_bytes'] / 2**20:.0f} MiB, {many['peak_bytes'] / 2**20:.0f} MiB: {growth:+.1%}"
    )
    row = {"few": few, "many": many, "growth": growth}
    append_line(RESULTS / "run_memory.jsonl", row, machine())


def measured(n: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        write_pictures(Path(folder) / "pictures", n)
        command = [sys.executable, "-m", "bench.run_memory", "--child", folder]
        found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    assert found["images"] == n
    return found


def write_pictures(folder: Path, n: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (n, SIDE, SIDE), dtype=np.uint8)
    for c in range(CLASSES):
        (folder / str(c)).mkdir(parents=True)
    for i, array in enumerate(pixels):
        Image.fromarray(array).save(folder / str(i % CLASSES) / f"{i:06d}.png")


def child(folder: Path) -> dict[str, float]:
    torch.manual_seed(0)
    network = Network()
    classifier = DiffusionClassifier.from_network(
        network,
        schedule=Schedule.linear(),
        embeddings=network.labels,
        shape=(1, SIDE, SIDE),
        names=[str(c) for c in range(CLASSES)],
    )
    data = open_dataset(folder / "pictures", classifier.names)
    start = time.perf_counter()
    summary = evaluate(classifier, data, folder / "run", strategy="enumerate", probes=2)
    return {
        "images": summary.n,
        "seconds": time.perf_counter() - start,
        "peak_bytes": peak_bytes(),
    }


def peak_bytes() -> int:
    content = Path("/proc/self/status").read_text()
    return int(content.split("VmHWM:")[1].split()[0]) * 1024


if __name__ == "__main__":
    main()
