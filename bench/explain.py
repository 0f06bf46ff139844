"""How often a map names the right half of a picture that is put together of two.

    python -m bench.explain --data mnist_28px.npz

The left half of each picture is that of a test image of class a, the right half that of one of
another class b; a and b are told to ``explain``. Right is red (a) on the left and blue (b) on the
right. Nothing is chosen on these pictures. Appends to bench/results/explain.jsonl.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch

from dive_fast import DiffusionClassifier
from dive_fast.data.mnist import load_mnist
from dive_fast.evaluation.machine import environment
from dive_fast.predict.explanation import Explanation

RESULTS = Path(__file__).parent / "results" / "explain.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="MNIST's file")
    parser.add_argument("--limit", type=int, default=100, help="pictures")
    parser.add_argument("--probes", type=int, default=64)
    options = parser.parse_args()
    test = load_mnist(options.data, "test")
    pictures, pairs = halves(test.images, test.labels, options.limit)
    classifier = DiffusionClassifier.from_pretrained("mnist")
    a, b = ([int(c) for c in column] for column in pairs.T)
    found = classifier.explain(list(pictures), a, b, probes=options.probes)
    figures = summary(found)
    record = {
        "model": "mnist", "pictures": len(found), "probes": options.probes,
        **figures, "environment": environment(classifier),
    }  # fmt: skip
    print(json.dumps(figures, indent=2))
    with RESULTS.open("a") as file:
        file.write(json.dumps(record) + "\n")


def halves(images: np.ndarray, labels: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """n pictures uint8 [n, h, w], and the classes of their halves [n, 2]."""
    order = np.random.default_rng(0).permutation(len(images))
    pairs = [(i, j) for i, j in zip(order[::2], order[1::2], strict=True) if labels[i] != labels[j]]
    left, right = np.array(pairs[:n]).T
    made = images[left].copy()
    middle = made.shape[2] // 2
    made[:, :, middle:] = images[right][:, :, middle:]
    return made, np.stack([labels[left], labels[right]], axis=1)


def summary(found: list[Explanation]) -> dict[str, float]:
    """Shares that are right, of halves by their mean and of places by their smoothed sign."""
    raw = torch.stack([one.difference for one in found])
    smooth = torch.stack([one.smoothed()[0] for one in found])
    sure = torch.stack([one.significant() for one in found])
    middle = raw.shape[2] // 2
    sign = torch.ones(raw.shape[1:])
    sign[:, middle:] = -1
    means = torch.stack([raw[..., :middle].mean(dim=(1, 2)), -raw[..., middle:].mean(dim=(1, 2))])
    right = smooth * sign > 0
    # The halves of a picture are not independent: the error is taken between pictures.
    halves_right = (means > 0).double().mean(dim=0)
    return {
        "halves_right": halves_right.mean().item(),
        "halves_standard_error": halves_right.std().item() / math.sqrt(len(found)),
        "left_more_for_a_than_right": (means.sum(dim=0) > 0).double().mean().item(),
        "places_right": right.double().mean().item(),
        "significant": sure.double().mean().item(),
        "significant_places_right": right[sure].double().mean().item(),
    }


if __name__ == "__main__":
    main()
