"""``dive-fast fit``: fits the probabilities' temperature to labelled images."""

from __future__ import annotations

import argparse
import sys

from dive_fast.cli.options import add_model_options, add_strategy_options, count, load_classifier

DESCRIPTION = """\
Fits beta, the temperature of log p(y | x0) = -beta L(y; x0), to labelled images, prints what it
changes, and writes it into dive_fast.json beside the model.

Use images that the model was not trained on: of those it is surer than of others."""


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "fit",
        help="fit probabilities to labelled images",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--data",
        required=True,
        metavar="digits|DIR|FILE.npz",
        help="digits (the training part), a folder with one sub-folder per class, or an .npz with "
        "images and labels (or x_train and y_train)",
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="the directory whose dive_fast.json takes the values (default: the model's own; "
        "needed for models of the zoo and the hub)",
    )
    parser.add_argument("--limit", type=count, metavar="N", help="a random subset of N images")
    add_model_options(parser)
    add_strategy_options(parser)
    parser.set_defaults(run=run, strategy="enumerate")


def run(options: argparse.Namespace) -> int:
    from dive_fast.data import load_all, open_dataset, select
    from dive_fast.errors import DiveFastError
    from dive_fast.strategies import resolve_strategy

    strategy = resolve_strategy(options.strategy, options.preset, {})
    classifier = load_classifier(options)
    if options.out is None and classifier.directory is None:
        raise DiveFastError(
            f"{options.model} has no model directory of yours to write to: name one with --out."
        )
    data = select(
        open_dataset(options.data, classifier.names, part="train"), options.limit, options.seed
    )
    images, labels = load_all(data)
    record = classifier.calibrate(
        images,
        labels,
        strategy=strategy,
        probes=options.probes,
        seed=options.seed,
        timesteps=options.timesteps,
        progress=sys.stderr.isatty(),
    )
    print(record)
    print(f"written to {classifier.save_fitted(options.out)}")
    return 0
