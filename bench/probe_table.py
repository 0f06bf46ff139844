r"""Heads on features by the number of training images, beside the generative answer.

    python -m bench.probe_table --model digits --data digits --images 100 1000 1400 \
        --runs runs/probe
    python -m bench.probe_table --model omniglot --data omniglot242_32px.npz --per-class 2 5 15 \
        --runs runs/probe

Trains on the training part, measures on held-out images: the generative answer (``auto``), the head
alone, and where ``auto`` takes heads, the race that starts from it. Recall counts how often the
generative answer is among the head's first n on the held-out images. Features, losses and answers
are kept below --runs: cut off and started again it goes on there. The head's seconds are those of
its features at a batch of 256, without encoding; those of training leave out what
--runs has. Appends one line a head to bench/results/probe_table.jsonl.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import torch

from bench.records import append
from dive_fast import DiffusionClassifier
from dive_fast.core.head import Head, recall_at
from dive_fast.data import DataSet, load_all, open_dataset, select
from dive_fast.evaluation import evaluate, read_records
from dive_fast.strategies import Auto

RANKS = (1, 2, 4, 10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="digits")
    parser.add_argument("--data", default="digits")
    parser.add_argument("--runs", type=Path, required=True, help="where computed values are kept")
    parser.add_argument("--limit", type=int, default=300, help="test images")
    numbers = parser.add_mutually_exclusive_group(required=True)
    numbers.add_argument("--images", type=int, nargs="+", help="training images, in all")
    numbers.add_argument("--per-class", type=int, nargs="+", help="training images of each class")
    parser.add_argument("--heads", nargs="+", default=["linear"], help="kinds")
    options = parser.parse_args()
    torch.set_num_threads(1)

    classifier = DiffusionClassifier.from_pretrained(options.model)
    test = select(open_dataset(options.data, classifier.names), options.limit, seed=0)
    pictures, labels = load_all(test)
    x0, labels = classifier.encode(pictures), torch.from_numpy(labels)
    generative, answers = by_auto(classifier, test, options.runs / f"{options.model}-auto")
    common = {"model": options.model, "classes": len(classifier.names), "n": len(test.examples)}
    for per_class, n in (
        *((False, n) for n in options.images or ()),
        *((True, n) for n in options.per_class or ()),
    ):
        train = training_part(options.data, classifier, n, per_class)
        for kind in options.heads:
            row = by_head(classifier, kind, train, x0, labels, answers, options.runs)
            if getattr(Auto, "uses_head", False):
                head = row.pop("fitted")
                folder = options.runs / f"{options.model}-{kind}-{n}"
                row["race"] = by_auto(classifier, test, folder, head)[0]
            row.pop("fitted", None)
            row = {**common, "per_class": n if per_class else None, **row, "auto": generative}
            row["threads"] = torch.get_num_threads()
            append("probe_table", row, classifier)
            print(row, flush=True)


def training_part(
    spec: str, classifier: DiffusionClassifier, n: int, per_class: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """x0 and labels of the first n training images, in all or of each class, in random order."""
    data = open_dataset(spec, classifier.names, part="train")
    order = torch.randperm(len(data.examples), generator=torch.Generator().manual_seed(0))
    seen: dict[int, int] = {}
    chosen = []
    for i in order.tolist():
        label = data.examples[i].label
        seen[label] = seen.get(label, 0) + 1
        if seen[label] <= n if per_class else len(chosen) < n:
            chosen.append(data.examples[i])
    x0 = torch.cat(
        [
            classifier.encode([e.load() for e in chosen[start : start + 1000]])
            for start in range(0, len(chosen), 1000)
        ]
    )
    return x0, torch.tensor([e.label for e in chosen])


def by_auto(
    classifier: DiffusionClassifier, test: DataSet, run: Path, head: Head | None = None
) -> tuple[dict[str, Any], torch.Tensor]:
    """Figures and answers int64 [n] of the generative classifier, perhaps from a head."""
    summary = evaluate(classifier, test, run, head=head)
    records = read_records(run)
    answers = torch.tensor([records[e.id]["index"] for e in test.examples])
    keys = ("accuracy", "standard_error", "evaluations_per_image", "seconds_per_image")
    return {key: getattr(summary, key) for key in keys}, answers


def by_head(
    classifier: DiffusionClassifier,
    kind: str,
    train: tuple[torch.Tensor, torch.Tensor],
    x0: torch.Tensor,
    labels: torch.Tensor,
    answers: torch.Tensor,
    runs: Path,
) -> dict[str, Any]:
    """Figures of a head that is learned from ``train``."""
    start = time.perf_counter()
    given = None if kind == "losses" else train[1]
    fitted = classifier.fit_head(latents=train[0], labels=given, head=kind, cache=runs / "features")
    trained = time.perf_counter() - start
    start = time.perf_counter()
    scores = classifier.head_scores(fitted.head, latents=x0)
    seconds = (time.perf_counter() - start) / len(x0)
    accuracy = (scores.argmax(dim=1) == labels).double().mean().item()
    recall, right = recall_at(scores, answers), recall_at(scores, labels)
    head = fitted.head
    return {
        "head": kind,
        "images": len(train[0]),
        "layer": head.layer,
        "timestep": head.timestep,
        "grid": head.grid,
        "penalty": fitted.penalty,
        "validation": fitted.score,
        "accuracy": accuracy,
        "standard_error": math.sqrt(accuracy * (1 - accuracy) / len(x0)),
        "evaluations_per_image": 1,
        "seconds_per_image": seconds,
        "training_seconds": trained,
        "recall": {n: recall[n - 1] for n in RANKS if n <= len(recall)},
        "recall_of_label": {n: right[n - 1] for n in RANKS if n <= len(right)},
        "fitted": head,
    }


if __name__ == "__main__":
    main()
