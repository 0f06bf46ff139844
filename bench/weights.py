"""Learned weights of the timesteps against uniform ones, on images that were not fitted to.

    python -m bench.weights --model DIR --data DIR/data.npz --fit 200 --limit 400 --tag clean
    python -m bench.weights --model digits --data digits --fit 200 --limit 197

Images are of the part that the model was not trained on: ``x0_test`` and ``y_test`` of an .npz of
``bench.outside_models``, else the test part of what ``open_dataset`` takes. The first ``--fit`` of
a random order are fitted to, the next ``--limit`` measured, on equally many probes each way:

- ``uniform``: even timesteps that count alike, beta fitted to the same images as the weights;
- ``multiplied``: the same losses times w(t);
- ``timesteps``: the plain mean over the model's learned timesteps, where it has such;
- ``weights``: what a classifier does, its probes where w(t) (and learned timesteps) say.

The negative control shuffles the labels of the fitted images ``--shuffles`` times: each of them
should be refused. Appends to bench/results/weights.jsonl.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from scipy.stats import binomtest

from bench.records import append
from dive_fast import DiffusionClassifier, LossWeights
from dive_fast.core.weight_learning import MARGIN, fit, learn
from dive_fast.data import load_all, open_dataset, select
from dive_fast.predict.calibration import expected_calibration_error
from dive_fast.predict.fitting_weights import measured
from dive_fast.strategies import Auto


def images_of(options: argparse.Namespace, clf: DiffusionClassifier):
    """x0 [N, C, h, w] and labels [N] of held-out images in a random order, noise added if asked."""
    total = options.fit + options.limit
    data = Path(options.data)
    arrays = np.load(data) if data.suffix == ".npz" else {}
    if "x0_test" in arrays:
        x0, labels = (torch.from_numpy(arrays[key]) for key in ("x0_test", "y_test"))
        order = torch.randperm(len(x0), generator=torch.Generator().manual_seed(options.seed))
        x0, labels = x0[order[:total]], labels[order[:total]]
    else:
        chosen = select(open_dataset(options.data, clf.names), total, options.seed)
        images, labels = load_all(chosen)
        x0, labels = clf.encode(images), torch.as_tensor(labels)
        order = torch.randperm(len(x0), generator=torch.Generator().manual_seed(options.seed))
        x0, labels = x0[order], labels[order]
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(options.seed + 1))
    return x0 + options.noise * noise, labels


def figures(losses: torch.Tensor, labels: torch.Tensor, beta: float) -> dict:
    """Accuracy, -log p(label) and calibration error of mean losses [B, C]."""
    log_p = (-beta * losses.double()).log_softmax(dim=1)
    right = losses.argmin(dim=1) == labels
    return {
        "accuracy": right.double().mean().item(),
        "nll": -log_p.gather(1, labels[:, None]).mean().item(),
        "ece": expected_calibration_error(log_p.max(dim=1).values.exp(), right),
    }


def paired(before: torch.Tensor, after: torch.Tensor, labels: torch.Tensor) -> dict:
    """Difference of the accuracies with its standard error, and McNemar's exact test."""
    a, b = before.argmin(dim=1) == labels, after.argmin(dim=1) == labels
    difference = b.double() - a.double()
    gained, lost = int((b & ~a).sum()), int((a & ~b).sum())
    return {
        "difference": difference.mean().item(),
        "standard_error": difference.std().item() / math.sqrt(len(difference)),
        "gained": gained,
        "lost": lost,
        "mcnemar_p": binomtest(gained, gained + lost).pvalue if gained + lost else 1.0,
    }


def held_out(
    clf: DiffusionClassifier,
    x0: torch.Tensor,
    labels: torch.Tensor,
    weights: LossWeights,
    beta: float,
    options: argparse.Namespace,
) -> list[dict]:
    """One row for each number of probes."""
    most, seed = max(options.probes), options.seed + 1000
    even = clf.probe_list(Auto(), most, seed, "uniform", "uniform")
    own = clf.probe_list(Auto(), most, seed, weights=weights)
    times = clf.probe_list(Auto(), most, seed, "uniform", weights).weights
    progress = sys.stderr.isatty()
    plain = clf.losses(latents=x0, probes=even, progress=progress)
    placed = clf.losses(latents=x0, probes=own, progress=progress)
    before = plain
    if clf.model.timesteps is not None:
        learned = clf.probe_list(Auto(), most, seed, "learned", "uniform")
        before = clf.losses(latents=x0, probes=learned, progress=progress)
    rows = []
    for k in options.probes:
        found = {
            "uniform": (plain[:, :, :k].mean(dim=2), beta),
            "multiplied": ((plain * times)[:, :, :k].mean(dim=2), weights.beta),
            "timesteps": (before[:, :, :k].mean(dim=2), beta),
            "weights": (placed[:, :, :k].mean(dim=2), weights.beta),
        }
        row = {"probes": k, **{name: figures(x, labels, b) for name, (x, b) in found.items()}}
        for one, other in (
            ("uniform", "multiplied"),
            ("uniform", "weights"),
            ("timesteps", "weights"),
        ):
            row[f"{other} against {one}"] = paired(found[one][0], found[other][0], labels)
        rows.append(row)
    return rows


def control(apart: np.ndarray, folds: np.ndarray, n_timesteps: int, shuffles: int) -> dict:
    """How often labels without meaning pass, by two standard errors and by one.

    The label is drawn among the classes that were measured.
    """
    generator = np.random.default_rng(0)
    passed = {"margin": 0, "one standard error": 0}
    for _ in range(shuffles):
        every = np.pad(apart, ((0, 0), (1, 0), (0, 0)))
        label = generator.integers(every.shape[1], size=len(every))
        rows = np.arange(len(every))
        own = every[rows, label]
        others = np.stack([np.delete(every[i], label[i], axis=0) for i in rows])
        found = learn(others - own[:, None], folds, n_timesteps)
        best = max(found.trials, key=lambda trial: trial.gain)
        passed["margin"] += found.weights is not None
        passed["one standard error"] += best.gain > best.error and best.right >= found.right
    return {"shuffles": shuffles, "standard_errors": MARGIN, **passed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--tag", required=True, help="what the row is called by")
    parser.add_argument("--fit", type=int, default=200, help="images (default: 200)")
    parser.add_argument("--limit", type=int, default=300, help="images (default: 300)")
    parser.add_argument("--fit-probes", type=int, default=64, help="(default: 64)")
    parser.add_argument("--probes", type=int, nargs="+", default=[16, 64], help="(default: 16 64)")
    parser.add_argument("--noise", type=float, default=0.0, help="standard deviation, of x0")
    parser.add_argument("--shuffles", type=int, default=20, help="(default: 20)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only-fit", action="store_true", help="nothing is measured held out")
    options = parser.parse_args()
    clf = DiffusionClassifier.from_pretrained(options.model, batch_size=64)
    x0, labels = images_of(options, clf)
    n, start = options.fit, time.perf_counter()
    found = measured(clf, x0[:n], labels[:n], options.fit_probes, seed=options.seed, progress=False)
    n_timesteps = len(clf.model.schedule)
    learned = learn(found.apart, found.folds, n_timesteps)
    best = max(learned.trials, key=lambda trial: trial.gain)
    row = {
        "tag": options.tag,
        "fitted_on": n,
        "fit_probes": options.fit_probes,
        "noise": options.noise,
        "seed": options.seed,
        "fit_evaluations": found.evaluations,
        "fit_seconds": round(time.perf_counter() - start, 1),
        "uniform_right": learned.right,
        "uniform_nll": learned.nll,
        "best": dataclasses.asdict(best),
        "chosen": None if learned.weights is None else learned.weights.to_dict(),
        "control": control(found.apart, found.folds, n_timesteps, options.shuffles),
    }
    if learned.weights is not None and not options.only_fit:
        beta = float(fit(found.apart, None)[0])
        row["beta"] = beta
        row["limit"] = len(x0) - n
        row["held_out"] = held_out(clf, x0[n:], labels[n:], learned.weights, beta, options)
    print(json.dumps(row, indent=1))
    append("weights", row, clf)


if __name__ == "__main__":
    main()
