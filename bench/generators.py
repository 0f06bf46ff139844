"""Which generator knows more: checkpoints of a training of our own, by what they classify.

    python -m bench.generators train --data mnist_28px.npz --out runs/mnist-small
    python -m bench.generators compare --data mnist_28px.npz --model runs/mnist-small \
        --runs runs/generators
    python -m bench.generators plot --out docs/images

``compare`` runs ``compare_generators`` over the checkpoints, draws samples of each with the
library's own sampler, and measures precision, recall (Kynkaanniemi 2019), density and coverage
(Naeem 2020) of them against held-out images, by the package ``prdc`` (pip install prdc). Spaces: 50
principal components of the pixels, and 64 hidden units of a small classifier; both are fitted to
the training part. FID and its like need Inception's features of photographs, which mean nothing on
28 x 28 digits.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from bench.records import RESULTS, append_line
from dive_fast import DiffusionClassifier, sample
from dive_fast.data import open_dataset, select
from dive_fast.data.mnist import load_mnist
from dive_fast.data.npz import LabelledImages
from dive_fast.evaluation import compare_generators
from dive_fast.evaluation.checkpoints import find_checkpoints
from dive_fast.evaluation.machine import environment
from dive_fast.training.dit import MNIST, train_transformer
from dive_fast.training.loop import checkpoint_folder, doubling_steps, prepare_directory
from dive_fast.training.zoo import write_model

# Smaller than the zoo's, for half an hour of one busy core.
SMALL = replace(MNIST, width=96, batch_size=48, steps=6400, warmup_steps=300)
KEPT = 8
OF_SAMPLES = ("precision", "recall", "density", "coverage")
NEAREST = 5  # neighbours, as published
Features = Callable[[np.ndarray], np.ndarray]


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
        keep=lambda step, model: write_model(checkpoint_folder(out, step), model, data.names),
    )


def compare(options: argparse.Namespace) -> None:
    """The checkpoints' score and their samples' figures, and how the ranks of both agree."""
    found = {f"step {c.step}": c for c in find_checkpoints(options.model)}
    load = DiffusionClassifier.from_pretrained
    classifier = load(list(found.values())[-1].path)
    data = select(open_dataset(options.data, classifier.names), options.images, 0)
    scored = compare_generators(
        {name: partial(load, checkpoint.path) for name, checkpoint in found.items()},
        data,
        Path(options.runs) / "compare",
        steps={name: checkpoint.step for name, checkpoint in found.items()},
        reference=list(found)[-1],
        probes=options.probes,
        likelihood_probes=options.likelihood_probes,
        progress=True,
    )
    training, held_out = (load_mnist(options.data, part) for part in ("train", "test"))
    spaces = dict(_spaces(training, held_out))
    real = held_out.images[np.random.default_rng(0).permutation(len(held_out.images))]
    of_samples = [
        {
            name: _prdc(features(real[: options.real]), features(drawn))
            for name, features in spaces.items()
        }
        for drawn in (_drawn(c.path, options, c.step) for c in found.values())
    ]
    row = {
        "images": scored.n,
        "probes": options.probes,
        "likelihood_probes": options.likelihood_probes,
        "samples": options.samples,
        "real": options.real,
        "sampler": f"DDIM, {options.steps} steps, guidance 1",
        "checkpoints": [
            {"step": r.step, "score": {n: asdict(e) for n, e in r.figures.items()}, "samples": s}
            for r, s in zip(scored.rows, of_samples, strict=True)
        ],
        "differences_to_the_last": [
            None if r.difference is None else asdict(r.difference) for r in scored.rows
        ],
        "evaluations_per_image": scored.rows[0].evaluations,
    }
    row["rank_correlations"] = {
        "all checkpoints": _correlations(row["checkpoints"]),
        f"the last {KEPT // 2}": _correlations(row["checkpoints"][-KEPT // 2 :]),
    }
    print(json.dumps(row, indent=1))
    # Without the place where the checkpoints lie.
    here = {**environment(classifier), "model": list(found)[-1]}
    append_line(RESULTS / "generators.jsonl", row, here)


def _drawn(path: Path, options: argparse.Namespace, step: int) -> np.ndarray:
    """Samples of every class in turn, uint8 [N, h, w]; kept, for a bench that was killed."""
    kept = Path(options.runs) / f"samples-{step}-{options.samples}-{options.steps}.npy"
    if not kept.exists():
        model = DiffusionClassifier.from_pretrained(path).model
        classes = np.arange(options.samples) % len(model.vocabulary)
        x0 = sample(model, classes, steps=options.steps, progress=True)
        pixels = x0[:, 0].add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
        np.save(kept, pixels.numpy())
    return np.load(kept)


def _spaces(training: LabelledImages, held_out: LabelledImages) -> Iterator[tuple[str, Features]]:
    """The spaces in which samples are compared, by name: functions of uint8 [N, h, w]."""
    from sklearn.decomposition import PCA
    from sklearn.neural_network import MLPClassifier

    def flat(images: np.ndarray) -> np.ndarray:
        return images.reshape(len(images), -1).astype(np.float32) / 255

    rows = np.random.default_rng(0).permutation(len(training.images))[:20_000]
    x, y = flat(training.images[rows]), training.labels[rows]
    pca = PCA(50, random_state=0).fit(x)
    yield "pixels, 50 components", lambda images: pca.transform(flat(images))
    network = MLPClassifier((128, 64), max_iter=15, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a few rounds are enough here
        network.fit(x, y)
    right = network.score(flat(held_out.images), held_out.labels)
    print(f"the small classifier: {right:.2%} of the held-out images")

    def hidden(images: np.ndarray) -> np.ndarray:
        found = flat(images)
        for weight, bias in zip(network.coefs_[:-1], network.intercepts_[:-1], strict=True):
            found = np.maximum(found @ weight + bias, 0)
        return found

    yield "classifier, 64 hidden units", hidden


def _prdc(real: np.ndarray, drawn: np.ndarray) -> dict[str, float]:
    from prdc import compute_prdc

    with contextlib.redirect_stdout(io.StringIO()):  # it prints how many there are
        found = compute_prdc(real, drawn, NEAREST)
    return {name: float(found[name]) for name in OF_SAMPLES}


def _correlations(checkpoints: list[dict]) -> dict[str, dict[str, dict[str, float]]]:
    """Spearman's of every score with every figure of the samples; mean ranks and nll negated."""
    from scipy.stats import spearmanr

    found: dict[str, dict[str, dict[str, float]]] = {}
    for score in checkpoints[0]["score"]:
        sign = -1 if score in ("rank", "nll") else 1
        values = [sign * c["score"][score]["value"] for c in checkpoints]
        for space in checkpoints[0]["samples"]:
            for figure in OF_SAMPLES:
                others = [c["samples"][space][figure] for c in checkpoints]
                rho = float(spearmanr(values, others).statistic)
                found.setdefault(score, {}).setdefault(space, {})[figure] = round(rho, 3)
    return found


def plot(options: argparse.Namespace) -> None:
    """The latest row: the score and the samples' figures over the steps."""
    from matplotlib import pyplot

    lines = (RESULTS / "generators.jsonl").read_text(encoding="utf-8").splitlines()
    checkpoints = json.loads(lines[-1])["checkpoints"]
    steps = [c["step"] for c in checkpoints]
    figure, panels = pyplot.subplots(1, 4, figsize=(12, 2.9), layout="constrained")
    for panel, (name, title) in zip(
        panels,
        (("accuracy", "accuracy"), ("margin", "margin of the right class, nats")),
        strict=False,
    ):
        low, value, high = (
            [c["score"][name][end] for c in checkpoints] for end in ("low", "value", "high")
        )
        panel.plot(steps, value, marker="o", markersize=3)
        panel.fill_between(steps, low, high, alpha=0.25, linewidth=0)
        panel.set_title(title, fontsize=9)
    for panel, space in zip(panels[2:], checkpoints[0]["samples"], strict=True):
        for name in OF_SAMPLES:
            values = [c["samples"][space][name] for c in checkpoints]
            panel.plot(steps, values, marker="o", markersize=3, label=name)
        panel.set_title(f"samples: {space}", fontsize=9)
    names = panels[-1].get_legend_handles_labels()
    figure.legend(*names, fontsize=8, loc="outside right center")
    for panel in panels:
        panel.set_xscale("log")
        panel.set_xlabel("steps of the training")
        panel.grid(linewidth=0.4)
    figure.savefig(Path(options.out) / "generators.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    training = commands.add_parser("train")
    training.add_argument("--data", required=True)
    training.add_argument("--out", required=True)
    training.set_defaults(run=train)
    comparing = commands.add_parser("compare")
    comparing.add_argument("--data", required=True)
    comparing.add_argument("--model", required=True, help="what train wrote")
    comparing.add_argument("--runs", required=True)
    for name, default in (
        ("images", 200), ("probes", 40), ("likelihood-probes", 40), ("samples", 500),
        ("real", 1000), ("steps", 50),
    ):  # fmt: skip
        comparing.add_argument(f"--{name}", type=int, default=default)
    comparing.set_defaults(run=compare)
    plotting = commands.add_parser("plot")
    plotting.add_argument("--out", default="docs/images")
    plotting.set_defaults(run=plot)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
