"""How much faster four workers of a local Ray cluster are than one, and than no Ray at all.

    python -m bench.ray_workers
    python -m bench.ray_workers --workers 4 --pieces 1 2 4 8 16 32

The network sleeps a fixed time for every row instead of computing, so that the machine may have
fewer cores than there are workers: what is measured is how images are handed out. The rows that an
image takes vary tenfold. Seconds count from when all workers have their model until the last
record is written; starting Ray and loading is ``start_seconds``. Rows are appended to
bench/results/ray_workers.jsonl.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from bench.records import append
from dive_fast import DiffusionClassifier
from dive_fast.core.probes import ProbeList
from dive_fast.core.requests import Losses, Search
from dive_fast.core.schedule import Schedule
from dive_fast.data import DataSet, Example
from dive_fast.evaluation import RayOptions, evaluate, read_records
from dive_fast.strategies import Task
from dive_fast.strategies.base import Ledger

CLASSES, SIDE, MOST = 10, 16, 10  # MOST times the work of the least


class Sleeping(nn.Module):
    """eps = x_t, whose loss at a low t says how bright x0 is; a fixed time per row."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds
        self.labels = nn.Embedding(CLASSES, 4)

    def forward(self, x_t: Tensor, t: Tensor, c: Tensor) -> Tensor:
        time.sleep(self.seconds * len(x_t))
        return x_t + 1e-3 * c.mean(dim=1)[:, None, None, None]


@dataclass(frozen=True)
class Varied:
    """All classes on one probe, then on up to nine more, the more the brighter the image."""

    name: ClassVar[str] = "varied"
    loss: str = "l2"

    def probes(
        self, k: int | None, n_timesteps: int, shape: tuple[int, ...], seed: int
    ) -> ProbeList:
        """At t = 0, of noise whose mean is 0."""
        noise = torch.randn(MOST, *shape, generator=torch.Generator().manual_seed(seed))
        noise -= noise.mean(dim=(1, 2, 3), keepdim=True)
        return ProbeList(torch.zeros(MOST, dtype=torch.int64), noise)

    def search(self, task: Task) -> Search:
        classes, probes = torch.arange(len(task.vocabulary)), torch.arange(MOST)
        ledger = Ledger(len(classes), MOST)
        losses = yield Losses(classes, probes[:1])
        ledger.add(classes, probes[:1], losses)
        # mean (eps - x0)^2 = mean eps^2 + v^2 of an even image of value v
        level = (losses.mean() - task.probes.noise[0].square().mean()).item()
        rounds = 1 + round((MOST - 1) * min(max(level, 0.0), 1.0))
        for probe in probes[1:rounds]:
            ledger.add(classes, probe[None], (yield Losses(classes, probe[None])))
        return ledger.answer(int(ledger.means().argmin()))


def make(seconds: float, batch_size: int) -> DiffusionClassifier:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = Sleeping(seconds)
    return DiffusionClassifier.from_network(
        network,
        schedule=Schedule.linear(),
        embeddings=network.labels,
        shape=(1, SIDE, SIDE),
        name="sleeping",
        batch_size=batch_size,
    )


def even_images(count: int) -> DataSet:
    """Images of one value each, v^2 spread evenly over [0, 1] in a random order."""
    order = np.random.default_rng(0).permutation(count)
    value = np.sqrt(order / max(count - 1, 1))
    pixels = np.round(127.5 + 127.5 * value).astype(np.uint8)
    examples = [
        Example(f"{i:04}", 0, partial(np.full, (SIDE, SIDE), p)) for i, p in enumerate(pixels)
    ]
    return DataSet("even", examples, None, str(count))


def together(folder: Path, workers: int, seconds: float, batch_size: int) -> DiffusionClassifier:
    """The classifier, once all workers have theirs; leaves the time in ``folder``."""
    classifier = make(seconds, batch_size)
    Path(tempfile.mkstemp(dir=folder, prefix="ready-")[1])
    while len(list(folder.glob("ready-*"))) < workers:
        time.sleep(0.01)
    Path(tempfile.mkstemp(dir=folder, prefix="begun-")[1]).write_text(str(time.time()))
    return classifier


def measure(options: argparse.Namespace, workers: int, piece: int) -> dict:
    """One run; 0 workers stand for none of Ray."""
    classifier, data = make(options.seconds, options.batch_size), even_images(options.images)
    ray = None
    with tempfile.TemporaryDirectory(prefix="ray-workers-") as place:
        folder, out = Path(place), Path(place) / "run"
        if workers:
            load = partial(together, folder, workers, options.seconds, options.batch_size)
            ray = RayOptions(workers=workers, piece=piece, load=load)
        start = time.time()
        summary = evaluate(classifier, data, out, strategy=Varied(), ray=ray)
        # Shutting Ray down is no part of it: the last record's time is.
        end = (out / "results.jsonl").stat().st_mtime
        begun = [float(path.read_text()) for path in folder.glob("begun-*")]
        cost = [record["evaluations"] for record in read_records(out).values()]
    assert summary.n == options.images and len(begun) == workers
    loaded = max(begun, default=start)
    return {
        "workers": workers,
        "piece": piece if workers else None,
        "images": options.images,
        "seconds_per_row": options.seconds,
        "batch_size": options.batch_size,
        "evaluations": sum(cost),
        "least_evaluations": min(cost),
        "most_evaluations": max(cost),
        "seconds": end - loaded,
        "start_seconds": loaded - start,
        "seconds_asleep_per_worker": sum(cost) * options.seconds / max(workers, 1),
        "fill_rate": summary.fill_rate,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--pieces", type=int, nargs="+", default=[8])
    parser.add_argument("--images", type=int, default=240)
    parser.add_argument("--seconds", type=float, default=2e-3, help="of sleep per row")
    parser.add_argument("--batch-size", type=int, default=64)
    options = parser.parse_args()
    classifier = make(0, options.batch_size)
    alone = None
    cases = [(0, 0), (1, options.pieces[0])]
    for workers, piece in cases + [(options.workers, piece) for piece in options.pieces]:
        row = measure(options, workers, piece)
        alone = row["seconds"] if workers == 1 else alone
        if workers > 1:
            row["times_one_worker"] = alone / row["seconds"]
        append("ray_workers", row, classifier)
        print(row, flush=True)


if __name__ == "__main__":
    main()
