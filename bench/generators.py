"""Which generator knows more: checkpoints of a training of our own, by what they classify.

python -m bench.generators train --data mnist_28px.npz --out runs/generators
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from dive_fast.data.mnist import load_mnist
from dive_fast.training.dit import MNIST, train_transformer
from dive_fast.training.loop import doubling_steps, prepare_directory
from dive_fast.training.zoo import CHECKPOINTS, write_model

# Smaller than the zoo's, for 20 minutes of one thread.
SMALL = replace(MNIST, width=96, batch_size=48, steps=6400, warmup_steps=300)
KEPT = 8


def train(options: argparse.Namespace) -> None:
    """A small transformer on MNIST's training part, and what it was on its way."""
    data, out = load_mnist(options.data, "train"), Path(options.out)
    prepare_directory(out)
    train_transformer(
        data.images,
        data.labels,
        SMALL,
        out,
        checkpoints=doubling_steps(KEPT, SMALL.steps),
        keep=lambda step, model: write_model(
            out / CHECKPOINTS / f"checkpoint-{step}", model, data.names
        ),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    training = commands.add_parser("train")
    training.add_argument("--data", required=True)
    training.add_argument("--out", required=True)
    training.set_defaults(run=train)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
