"""Ways to learn timesteps, against one another, by cross-validation on the digits' training part.

    python -m bench.timestep_ablation --limit 100

Losses of every class on 1,000 probes, spread evenly, are measured once (on digits moved a little,
as for the temperature); what each way would have answered is read from them. Rows are the mean over
40 rotations of the van der Corput sequence and four folds: timesteps learned on three, answers on
the fourth. Appends to bench/results/timestep_ablation.jsonl.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import torch

from dive_fast import DiffusionClassifier
from dive_fast.core.probes import van_der_corput
from dive_fast.core.timesteps import BINS, estimate
from dive_fast.data.digits import load_digits
from dive_fast.evaluation.machine import environment
from dive_fast.training.dit import DIGITS, augment_images

RESULTS = Path(__file__).parent / "results" / "timestep_ablation.jsonl"
COUNTS = (2, 4, 8, 16, 32, 64)
PROBES = 1000
POOL = 240
RIVALS = 3
FOLDS, ROTATIONS = 4, 40

Learned = tuple[torch.Tensor, torch.Tensor]  # density and weights, [BINS] each


def moments(losses: torch.Tensor, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance, over images, rivals and probes, of l(rival) - l(right) in each bin."""
    difference = losses[:, 1:].double() - losses[:, :1].double()
    bins = [difference[:, :, timesteps * BINS // 1000 == b] for b in range(BINS)]
    return torch.stack([b.mean() for b in bins]).clamp_min(0), torch.stack([b.var() for b in bins])


def uniform(losses: torch.Tensor, timesteps: torch.Tensor) -> Learned:
    return torch.ones(BINS), torch.ones(BINS)


def weights_only(losses: torch.Tensor, timesteps: torch.Tensor) -> Learned:
    mean, variance = moments(losses, timesteps)
    return torch.ones(BINS), mean / variance


def density_only(losses: torch.Tensor, timesteps: torch.Tensor) -> Learned:
    mean, variance = moments(losses, timesteps)
    return mean**2 / variance, torch.ones(BINS)


def density_and_weights(losses: torch.Tensor, timesteps: torch.Tensor) -> Learned:
    mean, variance = moments(losses, timesteps)
    return mean**2 / variance, mean / variance


def importance(losses: torch.Tensor, timesteps: torch.Tensor) -> Learned:
    learned = estimate(losses, timesteps, 1000)
    return torch.tensor(learned.density), torch.tensor(learned.weights)


WAYS: dict[str, Callable[[torch.Tensor, torch.Tensor], Learned]] = {
    "uniform": uniform,
    "weights only: mu / sigma^2 (Fisher)": weights_only,
    "density only: mu^2 / sigma^2": density_only,
    "density mu^2 / sigma^2 with weights mu / sigma^2": density_and_weights,
    "density q ~ sigma within an image, weights 1 / q: ours": importance,
}


def measure(n: int) -> dict[str, torch.Tensor]:
    """Losses [n, 10, 1000], those on 250 probes of another seed, and labels, moved digits."""
    classifier = DiffusionClassifier.from_pretrained("digits")
    train = load_digits("train")
    generator = torch.Generator().manual_seed(5)
    config = dataclasses.replace(DIGITS, augment=1.0)
    # Moved together, so that a smaller limit is part of a larger one.
    x0 = augment_images(classifier.encode(train.images[:POOL]), config, generator)[:n]
    return {
        "main": classifier.losses(latents=x0, probes=PROBES, seed=0, progress=True),
        "ref": classifier.losses(latents=x0, probes=250, seed=1, progress=True),
        "labels": torch.from_numpy(train.labels[:n]),
    }


def with_rivals(losses: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The right class and its nearest rivals: [N, 1 + RIVALS, K]."""
    rows = torch.arange(len(labels))
    means = losses.mean(dim=2)
    means[rows, labels] = -torch.inf
    order = means.argsort(dim=1)[:, : 1 + RIVALS]
    return losses[rows[:, None], order]


def columns(density: torch.Tensor, rotation: float, timesteps: torch.Tensor) -> list[int]:
    """The measured probes nearest to the quantiles of the density, none twice."""
    edges = torch.cat([torch.zeros(1), density.double().cumsum(0) / density.double().sum()])
    free = torch.ones(len(timesteps), dtype=torch.bool)
    chosen = []
    for term in van_der_corput(max(COUNTS)):
        u = (term + rotation) % 1
        b = min(int((edges[1:] <= u).sum()), BINS - 1)
        t = (b + (u - edges[b]) / (edges[b + 1] - edges[b])) * 1000 / BINS
        distance = (timesteps - t).abs().masked_fill(~free, torch.inf)
        chosen.append(int(distance.argmin()))
        free[chosen[-1]] = False
    return chosen


def compare(found: dict[str, torch.Tensor]) -> dict[str, dict[str, list[float]]]:
    """Accuracy and agreement of every way at every number of probes."""
    losses, labels = found["main"], found["labels"]
    reference = found["ref"].mean(dim=2).argmin(dim=1)
    timesteps = torch.tensor([int(u * 1000) for u in van_der_corput(PROBES)])
    folds = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1)).chunk(FOLDS)
    rotations = torch.rand(ROTATIONS, generator=torch.Generator().manual_seed(0)).tolist()
    rows = {}
    for title, way in WAYS.items():
        right, agree = torch.zeros(len(COUNTS)), torch.zeros(len(COUNTS))
        for test in folds:
            train = torch.cat([fold for fold in folds if fold is not test])
            density, weights = way(with_rivals(losses[train], labels[train]), timesteps)
            for rotation in rotations:
                picked = columns(density, rotation, timesteps)
                w = weights[timesteps[picked] * BINS // 1000]
                running = (losses[test][:, :, picked] * w).cumsum(dim=2)
                for i, k in enumerate(COUNTS):
                    answer = running[:, :, k - 1].argmin(dim=1)
                    right[i] += (answer == labels[test]).sum()
                    agree[i] += (answer == reference[test]).sum()
        total = len(labels) * ROTATIONS
        rows[title] = {
            "accuracy": (right / total).tolist(),
            "agreement": (agree / total).tolist(),
        }
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--limit", type=int, default=100, help="training digits, at most 240 (default: 100)"
    )
    parser.add_argument("--losses", type=Path, help="keep the losses here, and read them again")
    options = parser.parse_args()
    if options.losses is not None and options.losses.exists():
        found = torch.load(options.losses, weights_only=True)
    else:
        found = measure(options.limit)
        if options.losses is not None:
            torch.save(found, options.losses)
    found = {name: value[: options.limit] for name, value in found.items()}
    rows = compare(found)
    print(f"| timesteps | {' | '.join(map(str, COUNTS))} |")
    print(f"|---|{'---|' * len(COUNTS)}")
    for title, row in rows.items():
        print(f"| {title} | {' | '.join(f'{x:.1%}' for x in row['accuracy'])} |")
    record = {"n": len(found["labels"]), "counts": COUNTS, "rows": rows}
    record["environment"] = environment(DiffusionClassifier.from_pretrained("digits"))
    RESULTS.parent.mkdir(exist_ok=True)
    with open(RESULTS, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
