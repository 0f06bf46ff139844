"""Which block, timestep and pool a linear classifier on features is best with.

    python -m bench.features --model digits
    python -m bench.features --model mnist --data mnist_28px.npz

On the training part alone: logistic regression (C = 0.1, standardised) learns from the first
images of a random order and is measured on the last 400. One noise. Appends to
bench/results/features.jsonl.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from dive_fast import DiffusionClassifier
from dive_fast.data.digits import load_digits
from dive_fast.data.mnist import load_mnist
from dive_fast.evaluation.machine import environment

RESULTS = Path(__file__).parent / "results" / "features.jsonl"
TIMESTEPS = (0, 10, 20, 50, 100, 200, 400, 700)
HELD_OUT = 400


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="digits", choices=("digits", "mnist"))
    parser.add_argument("--data", help="MNIST's file")
    parser.add_argument("--labelled", type=int, default=1000, help="images to learn from")
    options = parser.parse_args()
    data = load_digits("train") if options.model == "digits" else load_mnist(options.data, "train")
    classifier = DiffusionClassifier.from_pretrained(options.model)
    order = np.random.default_rng(0).permutation(len(data.images))
    order = order[: options.labelled + HELD_OUT]
    labels, x0 = np.asarray(data.labels)[order], classifier.encode(list(data.images[order]))
    for pool in ("mean", "attention"):
        print(f"\n{pool}: t", *classifier.layers, sep=" | ")
        for t in TIMESTEPS:
            row = [
                accuracy(
                    classifier.features(latents=x0, layer=layer, timestep=t, pool=pool).numpy(),
                    labels,
                )
                for layer in classifier.layers
            ]
            print(t, *(f"{100 * value:.1f}%" for value in row), sep=" | ", flush=True)
            record = {
                "model": options.model, "pool": pool, "timestep": t, "labelled": options.labelled,
                "held_out": HELD_OUT, "accuracy": row, "environment": environment(classifier),
            }  # fmt: skip
            with RESULTS.open("a") as file:
                file.write(json.dumps(record) + "\n")


def accuracy(features: np.ndarray, labels: np.ndarray) -> float:
    """Of the last images, by a linear classifier on the others."""
    linear = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=300))
    linear.fit(features[:-HELD_OUT], labels[:-HELD_OUT])
    return linear.score(features[-HELD_OUT:], labels[-HELD_OUT:])


if __name__ == "__main__":
    main()
