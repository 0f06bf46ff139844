"""How often `auto` answers as enumeration does, and what that costs, fitted and unfitted.

    python -m bench.auto_agreement --model mnist --data mnist_28px.npz --limit 500 \
        --reference REF.pt
    python -m bench.auto_agreement --model DIR --latents data.npz --limit 200 --probes 100 \
        --reference REF.pt --fit 60

Enumeration's mean losses go to the reference, 20 images at a time, and are taken from there when
the command is run again. Of more than 20 classes the best 16 on 24 probes are measured on all.
Seconds are wall clock of all images together; the row says the threads and the load beside them.
`--fit N` learns timesteps and shortlist from N training images without their labels; a model of the
zoo has them already. With `--latents` images are x0_test and x0_train of an .npz, in the model's
own range.
Appends to bench/results/auto_agreement.jsonl.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import bench.records
from bench.records import append_line
from dive_fast import DiffusionClassifier
from dive_fast.core.probes import ProbeList, low_discrepancy_probes
from dive_fast.core.requests import Answer, Losses, Search
from dive_fast.data import load_all, open_dataset, select
from dive_fast.engine import Engine, Job
from dive_fast.engine.objective import Objective
from dive_fast.evaluation.machine import environment
from dive_fast.strategies import Auto

FEW, SCREEN, FINALISTS, PIECE = 20, 24, 16, 20
LEVELS = (0.8, 0.9, 0.95, 0.99)


def images(options: argparse.Namespace, classifier: DiffusionClassifier) -> dict[str, torch.Tensor]:
    """x0 and labels of the held-out images, and x0 of training images where a fit is asked for."""
    if options.latents is not None:
        with np.load(options.latents) as arrays:
            found = {key: torch.from_numpy(arrays[key]) for key in arrays.files}
        chosen = torch.randperm(len(found["x0_train"]), generator=torch.Generator().manual_seed(0))[
            : options.fit
        ]
        held_out = slice(0, options.limit)
        return {
            "x0": found["x0_test"][held_out],
            "labels": found["y_test"][held_out],
            "train": found["x0_train"][chosen],
        }
    data = select(open_dataset(options.data, classifier.names), options.limit, 0)
    pictures, labels = load_all(data)
    found = {"x0": classifier.encode(pictures), "labels": torch.from_numpy(labels)}
    if options.fit:
        train = select(open_dataset(options.data, classifier.names, "train"), options.fit, 0)
        found["train"] = classifier.encode(load_all(train)[0])
    return found


def reference(
    classifier: DiffusionClassifier, x0: torch.Tensor, probes: ProbeList, path: Path | None
) -> torch.Tensor:
    """Enumeration's mean losses, float32 [B, C]; NaN where a class was not measured on all."""
    known = torch.empty(0, len(classifier.names))
    if path is not None and path.exists():
        known = torch.load(path)["mean"]
    while len(known) < len(x0):
        piece = x0[len(known) : len(known) + PIECE]
        jobs = (
            Job(i, x, _enumerated(len(classifier.names), len(probes))) for i, x in enumerate(piece)
        )
        found = Engine(classifier.model, classifier.batch_size).run(jobs, probes, Objective())
        means = {finished.key: finished.answer.losses for finished in found}
        known = torch.cat([known, torch.stack([means[i] for i in range(len(piece))])])
        if path is not None:
            torch.save({"mean": known}, path)
    return known[: len(x0)]


def _enumerated(classes: int, k: int) -> Search:
    every, n = torch.arange(classes), torch.full((classes,), k)
    if classes <= FEW:
        means = (yield Losses(every, torch.arange(k))).mean(dim=1)
        return Answer(int(means.argmin()), means, n)
    first = yield Losses(every, torch.arange(SCREEN))
    best = first.mean(dim=1).argsort()[:FINALISTS]
    rest = yield Losses(best, torch.arange(SCREEN, k))
    means = torch.full((classes,), torch.nan)
    means[best] = torch.cat([first[best], rest], dim=1).mean(dim=1)
    return Answer(int(means.nan_to_num(torch.inf).argmin()), means, n)


def tried(
    classifier: DiffusionClassifier, x0: torch.Tensor, answers: torch.Tensor, **options: Any
) -> dict[str, Any]:
    """Agreement, evaluations and seconds of `auto`."""
    start = time.perf_counter()
    found = classifier(latents=x0, **options)
    seconds = (time.perf_counter() - start) / len(x0)
    agree = [a.index == int(y) for a, y in zip(found, answers, strict=True)]
    evaluations = torch.tensor([a.evaluations for a in found], dtype=torch.float64)
    return {
        "agreement": sum(agree) / len(agree),
        "answers": [a.index for a in found],
        "evaluations": round(evaluations.mean().item(), 2),
        "evaluations_median": evaluations.median().item(),
        "seconds": round(seconds, 5),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="digits")
    parser.add_argument("--data", default="digits")
    parser.add_argument("--latents", type=Path)
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--take", type=int, help="the first so many of them")
    parser.add_argument("--probes", type=int, default=250)
    parser.add_argument("--reference", type=Path)
    parser.add_argument("--fit", type=int, default=0)
    parser.add_argument("--levels", type=float, nargs="+", default=LEVELS)
    parser.add_argument(
        "--fitted", help="a directory of 'dive-fast fit' instead of the model's own"
    )
    parser.add_argument("--budgets", type=int, nargs="*", default=[])
    parser.add_argument("--strategies", nargs="*", default=[], help="others, by name")
    options = parser.parse_args(argv)
    classifier = DiffusionClassifier.from_pretrained(options.model)
    if options.fitted:
        classifier.load_fitted(options.fitted)
    found, model = images(options, classifier), classifier.model
    for key in ("x0", "labels"):
        found[key] = found[key][: options.take]
    variants = ["as it is"]
    shape, n = model.latent_shape, len(model.schedule)
    learned = getattr(model, "timesteps", None)
    if getattr(model, "shortlist", None) is not None:
        variants = ["fitted", "timesteps only", "unfitted"]
    elif options.fit:
        variants = ["unfitted", "fitted"]
    uniform = low_discrepancy_probes(options.probes, n, shape)
    lists = {True: uniform if learned is None else learned.probes(options.probes, shape, 0)}
    shortlist = getattr(model, "shortlist", None)
    # One reference: what the answers shall be does not depend on where probes are taken.
    means = reference(classifier, found["x0"], lists[True], options.reference)
    answers = means.nan_to_num(torch.inf).argmin(dim=1)
    labels = found["labels"]
    for variant in variants:
        seconds_to_fit = 0.0
        if variant == "fitted" and options.fit:
            start = time.perf_counter()
            classifier.fit_timesteps(latents=found["train"])
            classifier.fit_shortlist(latents=found["train"])
            seconds_to_fit = time.perf_counter() - start
        elif variant != "as it is":
            model.shortlist = shortlist if variant == "fitted" else None
        timesteps = "uniform" if variant == "unfitted" else None
        settings = [{"min_agreement": p} for p in options.levels]
        settings += [{"budget": b} for b in options.budgets]
        if variant == variants[0]:
            settings += [{"strategy": name} for name in options.strategies]
        for setting in settings:
            row = tried(
                classifier,
                found["x0"],
                answers,
                strategy=setting.get("strategy") or Auto(**setting),
                probes=options.probes,
                timesteps=timesteps,
            )
            right = [a == int(y) for a, y in zip(row.pop("answers"), labels, strict=True)]
            row = {
                "model": Path(options.model).name,
                "classes": len(classifier.names),
                "variant": variant,
                **setting,
                "images": len(right),
                "probes": options.probes,
                **row,
                "accuracy": sum(right) / len(right),
                "enumeration_accuracy": (answers == labels).double().mean().item(),
                "fit_seconds": round(seconds_to_fit, 1),
            }
            # A directory of the user's is nobody else's business.
            where = {**environment(classifier), "model": row["model"]}
            append_line(bench.records.RESULTS / "auto_agreement.jsonl", row, where)
            print(row, flush=True)


if __name__ == "__main__":
    main()
