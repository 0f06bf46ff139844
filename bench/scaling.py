"""What an answer costs over the number of classes, and over the number of images at once.

    python -m bench.scaling --model omniglot --data omniglot242_32px.npz --images 40

Fewer classes are the first ones of the vocabulary, with held-out images of just those. Appends to
bench/results/scaling.jsonl; `python -m bench.plot_strategies` draws it.
"""

from __future__ import annotations

import argparse
import copy
import time

import torch

from bench.records import append
from dive_fast import DiffusionClassifier
from dive_fast.core.vocabulary import Vocabulary
from dive_fast.data import load_all, open_dataset, select
from dive_fast.strategies import Auto, Enumerate, Race

K = 250
CLASSES = (2, 5, 10, 20, 40, 80, 160, 242)
IMAGES = (1, 2, 4, 8, 16, 32)
# Beyond these numbers of classes they take too long here; enumeration costs C K by definition.
UP_TO = {"auto": 1000, "race": 20, "enumerate": 20}


def restricted(model, n_classes: int):
    """The same network that may only answer the first classes."""
    smaller = copy.copy(model)
    vocabulary = model.vocabulary
    smaller.vocabulary = Vocabulary(
        vocabulary.table[:n_classes], vocabulary.names[:n_classes], vocabulary.unconditional
    )
    return smaller


def timed(classifier: DiffusionClassifier, x0: torch.Tensor, strategy) -> dict:
    start = time.perf_counter()
    answers = classifier(latents=x0, strategy=strategy, probes=K)
    return {
        "evaluations_per_image": sum(a.evaluations for a in answers) / len(answers),
        "seconds_per_image": (time.perf_counter() - start) / len(answers),
        "answers": [a.index for a in answers],
    }


def over_classes(options: argparse.Namespace) -> None:
    whole = DiffusionClassifier.from_pretrained(options.model)
    data = open_dataset(options.data, whole.names)
    for n in options.classes:
        classifier = DiffusionClassifier(restricted(whole.model, n))
        mine = [e for e in data.examples if e.label < n]
        few = select(type(data)(data.name, mine, data.names), options.images, seed=0)
        images, labels = load_all(few)
        x0 = classifier.encode(images)
        for name, strategy in (("auto", Auto()), ("race", Race()), ("enumerate", Enumerate())):
            if n > UP_TO[name]:
                continue
            row = timed(classifier, x0, strategy)
            right = sum(a == y for a, y in zip(row.pop("answers"), labels.tolist(), strict=True))
            row |= {"over": "classes", "classes": n, "images": len(x0), "strategy": name}
            row |= {"model": options.model, "accuracy": right / len(x0)}
            append("scaling", row, classifier)
            print(row, flush=True)


def over_images(options: argparse.Namespace) -> None:
    classifier = DiffusionClassifier.from_pretrained(options.model)
    data = select(open_dataset(options.data, classifier.names), max(IMAGES), seed=0)
    x0 = classifier.encode(load_all(data)[0])
    together = None
    for n in sorted(IMAGES, reverse=True):
        # The same images whatever their number at once, so that only the packing differs.
        rows = [timed(classifier, part, Auto()) for part in x0.split(n)]
        answers = [a for row in rows for a in row["answers"]]
        together = answers if together is None else together
        assert answers == together, "the answers depend on how many images run at once"
        row = {
            "over": "images",
            "images": n,
            "classes": len(classifier.names),
            "strategy": "auto",
            "model": options.model,
            "evaluations_per_image": sum(r["evaluations_per_image"] for r in rows) / len(rows),
            "seconds_per_image": sum(r["seconds_per_image"] for r in rows) / len(rows),
        }
        append("scaling", row, classifier)
        print(row, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="digits")
    parser.add_argument("--data", default="digits")
    parser.add_argument("--images", type=int, default=40, help="per number of classes")
    parser.add_argument("--over", choices=["images", "classes"], help="one of the two only")
    parser.add_argument("--classes", type=int, nargs="+", default=CLASSES)
    options = parser.parse_args()
    if options.over != "classes":
        over_images(options)
    if options.over != "images":
        over_classes(options)


if __name__ == "__main__":
    main()
