"""What each change of `invert` against the paper buys.

    python -m bench.invert_ablation --limit 100
    python -m bench.invert_ablation --search --model omniglot --data omniglot242_32px.npz --limit 60
    python -m bench.invert_ablation --search --model-dir DIR --part test --limit 200

The first form takes digits of the training part and all changes; with `--search` it is only the
later ones, those that are about where the search stops and what is compared in the end, on
pictures of any model: moved training pictures of the zoo's, or, from DIR, a model that was trained
elsewhere, with a `data.npz` beside it that holds x0_train, y_train, x0_test and y_test (x0 as the
network takes it). Of held-out pictures (`--part test`) there are only the first and the last row.

Every row is one real run of the engine; the changes add up from row to row. Evaluations are
forwards plus backwards of the network per image. Agreement is with full enumeration on the same
100 probes. Appends to bench/results/invert_ablation.jsonl.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from bench.pictures import MODELS, moved_pictures
from bench.records import RESULTS, append_line
from dive_fast import DiffusionClassifier
from dive_fast.core.requests import Gradients, Losses
from dive_fast.data.digits import load_digits
from dive_fast.evaluation.machine import environment
from dive_fast.strategies import DefaultProbes, DivePaper, Invert, Ledger
from dive_fast.strategies.invert import Found


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


@dataclass(frozen=True)
class BestTwo(Invert):
    """`invert` as it was: after the search the best two classes met are measured on all probes."""

    search_probes: int = 25
    patience: int = 2

    def search(self, task):
        k = len(task.probes)
        searched, found = torch.arange(min(self.search_probes, k)), Found(task)
        yield from self._descend(found, searched)
        best = found.ledger.means().nan_to_num(torch.inf).argsort()[: min(2, len(found.met()))]
        rest = torch.arange(len(searched), k)
        if len(rest) > 0 and len(best) == 2:
            found.ledger.add(best, rest, (yield Losses(best, rest)))
        return found.ledger.answer(int(best[found.ledger.means()[best].argmin()]))


class FirstOrderFound(Found):
    """As if all classes were equally far from every point: the plain mean of the first orders."""

    def linearise(self, p, reply):
        super().linearise(p, reply)
        self.squares[-1] = torch.ones_like(self.squares[-1])


@dataclass(frozen=True)
class FirstOrder(Invert):
    """`invert` without curvature."""

    def search(self, task):
        searched, found = torch.arange(self.search_probes), FirstOrderFound(task)
        yield from self._descend(found, searched)
        return (yield from self._race(found, searched))


# title, strategy, probes that it may use
FROM_THE_PAPER = (
    ("paper: AdamW, random start, 20 loops, monitor pass", DivePaper(), 100),
    ("answer from the running losses, no monitor pass", NoMonitor(), 100),
    ("one fixed batch of 25 probes, a class measured once", FixedProbes(), 25),
    ("start at the mean of the vocabulary", FixedProbes(start="mean"), 25),
    ("steps along the normalised gradient", FixedProbes(start="mean", normalised=True), 25),
    ("stop after 2 new classes without gain or 10 idle steps", BestTwo(), 25),
)
SEARCH = (
    ("compare the best two on all 100 probes", BestTwo(), 100),
    ("all classes met race instead", Invert(search_probes=25, patience=2, runners_up=0), 100),
    ("12 probes for the search instead of 25", Invert(patience=2, runners_up=0), 100),
    ("4 runners-up race too, by first order", FirstOrder(patience=2), 100),
    ("the runners-up with curvature", Invert(patience=2), 100),
    ("stop after 1 new class without gain: `invert`", Invert(), 100),
)


def pictures(
    options: argparse.Namespace,
) -> tuple[DiffusionClassifier, torch.Tensor, torch.Tensor]:
    """The model, x0 float32 [N, c, h, w] and labels int64 [N]."""
    if options.model_dir is not None:
        with np.load(options.model_dir / "data.npz") as arrays:
            x0, labels = arrays[f"x0_{options.part}"], arrays[f"y_{options.part}"]
        x0, labels = torch.from_numpy(x0).float(), torch.from_numpy(labels)
        classifier = DiffusionClassifier.from_pretrained(options.model_dir)
        return classifier, x0[: options.limit], labels[: options.limit]
    classifier = DiffusionClassifier.from_pretrained(options.model)
    if options.search and options.part == "train":
        return classifier, *moved_pictures(options.model, options.data, options.limit)
    digits = load_digits(options.part)
    images = classifier.encode(digits.images[: options.limit])
    return classifier, images, torch.from_numpy(digits.labels[: options.limit])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=int, default=100, help="pictures (default: 100)")
    parser.add_argument("--search", action="store_true", help="only the later changes")
    parser.add_argument("--model", choices=MODELS, default="digits")
    parser.add_argument("--data", type=Path, help="the .npz of Omniglot")
    parser.add_argument("--model-dir", type=Path, help="a model of your own, with its data.npz")
    parser.add_argument("--part", choices=("train", "test"), default="train")
    options = parser.parse_args()
    if options.model == "omniglot":
        if options.data is None:
            parser.error("omniglot needs --data, its .npz")
        if options.part == "test" or not options.search:
            parser.error("omniglot's moved training pictures need --search and --part train")
    classifier, x0, labels = pictures(options)
    # Uniform, whatever the model has learned: the rows are about the search alone.
    common = {"latents": x0, "timesteps": "uniform", "progress": True}
    reference = classifier(strategy="enumerate", probes=100, **common)
    n = len(x0)
    print(f"{'change, added to those above':58} agreement  accuracy  evaluations  seconds")
    rows = SEARCH if options.search else FROM_THE_PAPER + SEARCH
    if options.part == "test":
        rows = SEARCH[0], SEARCH[-1]
    for title, strategy, probes in rows:
        start = time.perf_counter()
        answers = classifier(strategy=strategy, probes=probes, **common)
        seconds = (time.perf_counter() - start) / n
        row = {
            "change": title,
            "model": options.model_dir.name if options.model_dir else options.model,
            "part": options.part,
            "n": n,
            "agreement": sum(a.index == r.index for a, r in zip(answers, reference, strict=True))
            / n,
            "accuracy": sum(a.index == y for a, y in zip(answers, labels.tolist(), strict=True))
            / n,
            "enumerate_accuracy": sum(
                r.index == y for r, y in zip(reference, labels.tolist(), strict=True)
            )
            / n,
            "evaluations_per_image": sum(a.evaluations for a in answers) / n,
            "seconds_per_image": seconds,
        }
        print(
            f"{title:58} {row['agreement']:9.1%} {row['accuracy']:9.1%} "
            f"{row['evaluations_per_image']:12,.0f} {seconds:8.3f}",
            flush=True,
        )
        # The model's name instead of its directory, which is of one machine only.
        where = {**environment(classifier), "model": row["model"]}
        append_line(RESULTS / "invert_ablation.jsonl", row, where)


if __name__ == "__main__":
    main()
