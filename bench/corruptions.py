"""A generative classifier and a small discriminative network on corrupted digits of MNIST.

python -m bench.corruptions --data mnist_28px.npz --runs runs/corruptions

Both see the same pictures. The network learns from the 60,000 training images, clean ones, for a
fixed number of epochs: nothing is chosen on the test part. Interrupted, it goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from bench.records import append
from dive_fast import DiffusionClassifier
from dive_fast.data import DataSet, corrupted, load_all, open_dataset, select
from dive_fast.data.corruptions import GROUPS, read_corruptions
from dive_fast.data.images import as_images
from dive_fast.evaluation import evaluate_corruptions
from dive_fast.evaluation.corruptions import CLEAN
from dive_fast.evaluation.table import RunTable

EPOCHS, BATCH = 2, 128


def small_network() -> nn.Module:
    """Two convolutions and two linear layers, 421,642 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Dropout(0.5), nn.Linear(64 * 49, 128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip


def learned(path: str, names: tuple[str, ...], seed: int, kept: Path) -> nn.Module:
    """The network after its training, whose weights lie in a file from then on."""
    torch.manual_seed(seed)
    network = small_network()
    if kept.exists():
        network.load_state_dict(torch.load(kept, weights_only=True))
        return network.eval()
    data = open_dataset(path, names, part="train")
    x0, labels = _tensor(data), torch.as_tensor(data.labels)
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    start = time.perf_counter()
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(x0)).split(BATCH):
            loss = nn.functional.cross_entropy(network(x0[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    print(f"the small network learned for {time.perf_counter() - start:.0f} s", flush=True)
    kept.parent.mkdir(parents=True, exist_ok=True)
    torch.save(network.state_dict(), kept)
    return network.eval()


@torch.no_grad()
def wrong(network: nn.Module, data: DataSet) -> np.ndarray:
    """Whether each image is answered wrong, bool [n]."""
    return network(_tensor(data)).argmax(dim=1).numpy() != data.labels


def _tensor(data: DataSet) -> torch.Tensor:
    """float32 [n, 1, 28, 28] in [-1, 1], as the generative model sees them."""
    return torch.stack(as_images(load_all(data)[0], 28, 1))


def mean(values: np.ndarray) -> list[float]:
    """Of images [n], with its standard error."""
    return [float(values.mean()), float(values.std(ddof=1)) / len(values) ** 0.5]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--runs", required=True)
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--severities", default="1,3,5")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    clf = DiffusionClassifier.from_pretrained("mnist")
    runs = Path(args.runs)
    network = learned(args.data, clf.names, args.seed, runs / f"network-{args.seed}.pt")
    whole = open_dataset(args.data, clf.names)
    clean_error = float(wrong(network, whole).mean())
    print(f"small network: {clean_error:.2%} wrong of {len(whole.examples)}", flush=True)
    data = select(whole, args.limit, args.seed)
    chosen = read_corruptions(
        [f"all:{severity}" for severity in args.severities.split(",")], args.seed
    )
    table = evaluate_corruptions(clf, data, runs, chosen, seed=args.seed, progress=True)
    generative = {name: _wrong(runs / name, data) for name in (CLEAN, *map(str, chosen))}
    other = {CLEAN: wrong(network, data)}
    for c in chosen:
        images = corrupted(data, c.name, c.severity, image_shape=clf.model.image_shape, seed=c.seed)
        other[str(c)] = wrong(network, images)
    row = {"images": len(data.examples), "severities": args.severities, "seed": args.seed}
    row |= {
        "network": {
            "parameters": sum(p.numel() for p in network.parameters()),
            "epochs": EPOCHS,
            "test error": clean_error,
        },
        "evaluations": {r.run: r.evaluations for r in table.rows},
        "errors": {},
        "cells": {n: [mean(generative[n]), mean(other[n])] for n in generative},
    }
    groups = {"clean": [CLEAN]}
    groups |= {c.name: [str(d) for d in chosen if d.name == c.name] for c in chosen}
    groups |= {g: [str(c) for c in chosen if c.name in GROUPS[g]] for g in list(GROUPS)[:4]}
    groups |= {f"severity {s}": [str(c) for c in chosen if c.severity == int(s)]
               for s in args.severities.split(",")}  # fmt: skip
    groups["all"] = list(map(str, chosen))
    for group, names in groups.items():
        one, two = (np.mean([of[n] for n in names], axis=0) for of in (generative, other))
        row["errors"][group] = [mean(one), mean(two), mean(one - two)]
        print(group, *(f"{value:.1%} +- {error:.1%}" for value, error in row["errors"][group]))
    print(json.dumps(row["network"]))
    append("corruptions", row, clf)


def _wrong(path: Path, data: DataSet) -> np.ndarray:
    """Whether the generative classifier answered wrong, in the order of the data."""
    table = RunTable.read(path)
    found = dict(zip(table.ids, (~table.correct).tolist(), strict=True))
    return np.array([found[key] for key in data.ids])


if __name__ == "__main__":
    main()
