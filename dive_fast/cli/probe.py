"""``dive-fast probe``: a head on the network's features, beside the generative answer."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dive_fast.cli.loading import chosen_strategy, load_classifier
from dive_fast.cli.options import DATA, OTHER_DATA, add_classifier_options
from dive_fast.cli.values import count

if TYPE_CHECKING:  # torch is not loaded for the help
    from dive_fast.data import DataSet
    from dive_fast.predict.classifier import DiffusionClassifier
    from dive_fast.predict.probing import FittedHead

log = logging.getLogger(__name__)

DESCRIPTION = """\
Learns a head on the features of a frozen model's network, and measures it beside the generative
answer on the same images. One evaluation answers an image.

  linear     logistic regression of the labels on the activations of a block, averaged over 1, 4 or
             16 cells of the image
  attention  the same on its tokens, pooled by a learned query
  losses     ridge regression of the losses that enumeration measures; the labels are not used, but
             learning costs classes x 24 evaluations an image

Layer, timestep and cells are chosen on a validation part of --data. The test images take no
part in any choice. All is written below RUN: the head (head.safetensors), which 'dive-fast
evaluate --head' takes, the figures (probe.json), and what was computed; interrupted and run again
with the same options it goes on where it stopped.

Heads need scikit-learn: pip install 'dive_fast[probe]'."""

RANKS = (1, 2, 4, 10)  # of the recall that is printed


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "probe",
        help="learn a head on the network's features",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--data",
        required=True,
        metavar=DATA,
        help="images to learn from: digits (the training part), a folder with one sub-folder per "
        f"class, an .npz with images and labels (or x_train and y_train), {OTHER_DATA}",
    )
    parser.add_argument(
        "--test",
        required=True,
        metavar=DATA,
        help="images to measure on: digits (the held-out ones), a folder, an .npz with images and "
        "labels (or x_test and y_test), or another of these",
    )
    parser.add_argument("--out", required=True, metavar="RUN", help="the run directory")
    parser.add_argument(
        "--head",
        default="linear",
        choices=["linear", "attention", "losses"],
        help="what is learned (default: linear)",
    )
    parser.add_argument(
        "--layer", metavar="NAME", help="the block that is read (default: the best of six)"
    )
    parser.add_argument(
        "--timestep", type=_timestep, metavar="T", help="of x_t (default: the best of five)"
    )
    parser.add_argument(
        "--grid", type=count, metavar="G", help="average over G x G cells (default: 1, 2 or 4)"
    )
    parser.add_argument(
        "--train-limit", type=count, metavar="N", help="a random subset of N images to learn from"
    )
    parser.add_argument(
        "--limit",
        type=count,
        metavar="N",
        help="a random subset of N test images for both, as the generative answer takes long",
    )
    parser.add_argument("--json", action="store_true", help="print the figures as a JSON object")
    add_classifier_options(parser)
    parser.set_defaults(run=run)


def _timestep(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}") from None


def run(options: argparse.Namespace) -> int:
    from dive_fast.data import folder_classes, open_dataset, select
    from dive_fast.errors import DataError
    from dive_fast.evaluation import RunDirectory
    from dive_fast.evaluation.machine import environment

    strategy = chosen_strategy(options)
    classifier = load_classifier(options, folder_classes(options.data))
    train = open_dataset(options.data, classifier.names, part="train")
    train = select(train, options.train_limit, options.seed)
    test = select(open_dataset(options.test, classifier.names), options.limit, options.seed)
    if train.content == test.content:
        raise DataError(f"{options.test}: expected other images to measure on than to learn from.")
    # A layer or a timestep that is none shall not wait until all images are read.
    layers, timesteps = classifier.blocks_to_try(options.layer, options.timestep)
    asked = {"strategy": strategy, "probes": options.probes, "timesteps": options.timesteps}
    asked["weights"] = options.weights
    config = {
        **classifier.identity(**asked, seed=options.seed),
        "learned": {
            "head": options.head,
            "layers": layers,
            "timesteps": timesteps,
            "grid": options.grid,
        },
        "data": train.identity(),
        "test": test.identity(),
    }
    try:
        with RunDirectory.open(options.out, config, environment(classifier)):
            figures, fitted = _measured(options, classifier, strategy, train, test)
            _write(Path(options.out) / "probe.json", figures)
    except KeyboardInterrupt:
        log.warning("interrupted; run again to go on from %s.", options.out)
        return 130
    print(json.dumps(figures, allow_nan=False) if options.json else as_text(figures, fitted))
    return 0


def _measured(
    options: argparse.Namespace,
    classifier: DiffusionClassifier,
    strategy: Any,
    train: DataSet,
    test: DataSet,
) -> tuple[dict[str, Any], FittedHead]:
    """Learns the head and measures both ways to answer."""
    import torch

    from dive_fast.evaluation import evaluate

    out, bar = Path(options.out), sys.stderr.isatty()
    cache = out / "features"
    x0, labels = _latents(classifier, train, cache)
    fitted = classifier.fit_head(
        latents=x0,
        labels=None if options.head == "losses" else labels,
        head=options.head,
        layer=options.layer,
        timestep=options.timestep,
        grid=options.grid,
        seed=options.seed,
        cache=cache,
        progress=bar,
    )
    fitted.head.save(out / "head.safetensors")
    x0, labels = _latents(classifier, test, cache)
    scores = classifier.head_scores(fitted.head, latents=x0, seed=options.seed + 1, cache=cache)
    right = (scores.argmax(dim=1) == torch.as_tensor(labels)).double().mean().item()
    generative = evaluate(
        classifier,
        test,
        out / "generative",
        strategy=strategy,
        probes=options.probes,
        seed=options.seed,
        timesteps=options.timesteps,
        weights=options.weights,
        progress=bar,
    )
    head = fitted.head
    figures = {
        "head": head.kind,
        "layer": head.layer,
        "timestep": head.timestep,
        "grid": head.grid,
        "penalty": fitted.penalty,
        "trained_on": len(train.examples),
        "held_out": fitted.held_out,
        "score": fitted.score,
        "trials": [dataclasses.asdict(trial) for trial in fitted.trials],
        "recall": list(head.recall),
        "n": len(test.examples),
        "accuracy": right,
        "standard_error": math.sqrt(right * (1 - right) / len(test.examples)),
        "generative": generative.to_dict(),
    }
    return figures, fitted


def _latents(classifier: DiffusionClassifier, data: DataSet, cache: Path) -> tuple[Any, Any]:
    """x0 and labels of all images, the latents kept as they come.

    Raises:
        ImageError: an image cannot be read.
    """

    from dive_fast.predict.chunks import Chunks

    def compute(start: int, stop: int) -> Any:
        return classifier.encode([example.load() for example in data.examples[start:stop]])

    name = f"x0-{data.identity()['fingerprint']}"
    x0 = Chunks(cache).get(name, len(data.examples), compute)
    return x0, data.labels


def _write(path: Path, figures: dict[str, Any]) -> None:
    from dive_fast.core.files import replacing

    with replacing(path) as file:
        file.write(json.dumps(figures, indent=2, allow_nan=False).encode() + b"\n")


def as_text(figures: dict[str, Any], fitted: FittedHead) -> str:
    """The validation table, and both answers."""
    recall, generative = figures["recall"], figures["generative"]
    shares = [f"{recall[n - 1]:.1%} in {n}" for n in RANKS if n <= len(recall)]
    lines = [
        *validation_table(fitted),
        f"chosen: {_where(figures)}; mean 1 / rank {fitted.score:.3f} on "
        f"{fitted.held_out} held-out images",
        f"the generative answer is among the head's first: {', '.join(shares)}",
        "",
        f"{figures['n']:>6} test images {'accuracy':>17} {'evaluations':>12}",
        _row(figures["head"], figures["accuracy"], figures["standard_error"], 1),
    ]
    if generative["n"]:
        keys = ("accuracy", "standard_error", "evaluations_per_image")
        lines.append(_row("generative", *(generative[key] for key in keys)))
    return "\n".join(lines)


def validation_table(fitted: FittedHead) -> list[str]:
    """Lines of layers, columns of timesteps, under the finest grid; [] where nothing was chosen."""
    if len(fitted.trials) == 1:
        return []
    grid = fitted.trials[0].grid
    scores = {(t.layer, t.timestep): t.score for t in fitted.trials if t.grid == grid}
    layers = list(dict.fromkeys(layer for layer, _ in scores))
    timesteps = sorted({timestep for _, timestep in scores})
    width = max(map(len, layers))
    title = f"mean 1 / rank by a ridge on {grid} x {grid} cells, layer by timestep:"
    lines = [title, " " * width + "".join(f"{t:>8}" for t in timesteps)]
    for layer in layers:
        lines.append(f"{layer:{width}}" + "".join(f"{scores[layer, t]:>8.3f}" for t in timesteps))
    for trial in fitted.trials:
        if trial.grid != grid:
            cells = f"{trial.grid} x {trial.grid} cells"
            lines.append(f"{cells} of {trial.layer}, t = {trial.timestep}: {trial.score:.3f}")
    return [*lines, ""]


def _where(figures: dict[str, Any]) -> str:
    grid = figures["grid"]
    cells = "tokens" if grid is None else f"{grid} x {grid} cells"
    return f"{cells} of {figures['layer']} at t = {figures['timestep']}"


def _row(name: str, accuracy: float, error: float, evaluations: float) -> str:
    return f"{name:18} {f'{accuracy:.2%} +- {error:.2%}':>17} {evaluations:>12,.0f}"
