"""What each change of `invert` against the paper buys, on the digits' training part.

    python -m bench.invert_ablation --limit 100

Every row is one real run of the engine; the changes add up from row to row. Evaluations are
forwards plus backwards of the network per image. Agreement is with full enumeration on the same
100 probes. Appends to bench/results/invert_ablation.jsonl.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from dive_fast import DiffusionClassifier
from dive_fast.core.requests import Gradients
from dive_fast.data.digits import load_digits
from dive_fast.evaluation.machine import environment
from dive_fast.strategies import DefaultProbes, DivePaper, Invert, Ledger

RESULTS = Path(__file__).parent / "results" / "invert_ablation.jsonl"
PROBES = 100


@dataclass(frozen=True)
class NoMonitor(DivePaper):
    """The paper's loop, answered from the running losses of its steps instead of a monitor pass."""

    def search(self, task):
        vocabulary, k = task.vocabulary, len(task.probes)
        generator = torch.Generator().manual_seed(task.seed)
        v = self._start(task, generator)
        optimizer = torch.optim.AdamW([v], lr=self.learning_rate)
        ledger, order = Ledger(len(vocabulary), k), torch.arange(k)
        for _ in range(self.loops):
            order = order[torch.randperm(k, generator=generator)]
            for batch in order.split(self.batch_size):
                nearest = vocabulary.nearest(v, self.metric)
                reply = yield Gradients(nearest, batch)
                ledger.add(nearest, batch, reply.losses)
                v.grad = reply.gradients
                optimizer.step()
        # Against each probe's mean over classes, so that classes seen on few probes compare.
        excess = (ledger.losses - ledger.losses.nanmean(dim=0)).nanmean(dim=1)
        return ledger.answer(int(excess.nan_to_num(torch.inf).argmin()))


@dataclass(frozen=True)
class FixedProbes(DefaultProbes):
    """200 AdamW steps on the first 25 probes; a class once measured is remembered.

    Attributes:
        start: "random" as the paper, or "mean" of the vocabulary, whose gradient is then used.
        normalised: steps of one radius along the gradient's direction instead of AdamW's.
    """

    name: ClassVar[str] = "fixed-probes"
    start: str = "random"
    normalised: bool = False
    steps: int = 200
    loss: str = "l2"

    def search(self, task):
        vocabulary, searched = task.vocabulary, torch.arange(25)
        table = vocabulary.table
        neutral = vocabulary.mean()[None]
        radius = (table - neutral).norm(dim=1).mean()
        ledger, gradients = Ledger(len(table), len(task.probes)), {}
        v = DivePaper()._start(task, torch.Generator().manual_seed(task.seed))
        gradient = None
        if self.start == "mean":
            v = neutral.clone()
            gradient = (yield Gradients(v.clone(), searched)).gradients
        optimizer = torch.optim.AdamW([v], lr=1e-2)
        for _ in range(self.steps):
            if gradient is not None:
                if self.normalised:
                    v = v - radius * gradient / gradient.norm().clamp_min(1e-30)
                else:
                    v.grad = gradient.clone()
                    optimizer.step()
            nearest = vocabulary.nearest(v)
            c = int(nearest)
            if c not in gradients:
                reply = yield Gradients(nearest, searched)
                ledger.add(nearest, searched, reply.losses)
                gradients[c] = reply.gradients
            gradient = gradients[c]
        return ledger.answer(int(ledger.means().nan_to_num(torch.inf).argmin()))


# title, strategy, probes that it may use
ROWS = (
    ("paper: AdamW, random start, 20 loops, monitor pass", DivePaper(), 100),
    ("answer from the running losses, no monitor pass", NoMonitor(), 100),
    ("one fixed batch of 25 probes, a class measured once", FixedProbes(), 25),
    ("start at the mean of the vocabulary", FixedProbes(start="mean"), 25),
    ("steps along the normalised gradient", FixedProbes(start="mean", normalised=True), 25),
    ("stop after 2 new classes without gain or 10 idle steps", Invert(), 25),
    ("compare the best two on all 100 probes: `invert`", Invert(), 100),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=int, default=100, help="training digits (default: 100)")
    options = parser.parse_args()
    classifier = DiffusionClassifier.from_pretrained("digits")
    train = load_digits("train")
    images, labels = train.images[: options.limit], train.labels[: options.limit]
    # Uniform, whatever the model has learned: the rows are about the search alone.
    common = {"timesteps": "uniform", "progress": True}
    reference = classifier(images, strategy="enumerate", probes=100, **common)
    print(f"{'change, added to those above':58} agreement  accuracy  evaluations  seconds")
    for title, strategy, probes in ROWS:
        start = time.perf_counter()
        answers = classifier(images, strategy=strategy, probes=probes, **common)
        seconds = (time.perf_counter() - start) / len(images)
        agree = sum(a.index == r.index for a, r in zip(answers, reference, strict=True))
        right = sum(a.index == y for a, y in zip(answers, labels, strict=True))
        row = {
            "change": title,
            "n": len(images),
            "agreement": agree / len(images),
            "accuracy": right / len(images),
            "evaluations_per_image": sum(a.evaluations for a in answers) / len(images),
            "seconds_per_image": seconds,
        }
        print(
            f"{title:58} {row['agreement']:9.1%} {row['accuracy']:9.1%} "
            f"{row['evaluations_per_image']:12,.0f} {seconds:8.3f}",
            flush=True,
        )
        RESULTS.parent.mkdir(exist_ok=True)
        with open(RESULTS, "a") as file:
            file.write(json.dumps({**row, "environment": environment(classifier)}) + "\n")


if __name__ == "__main__":
    main()
