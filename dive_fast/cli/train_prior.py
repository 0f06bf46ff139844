"""``dive-fast train-prior``: learns which layouts are usual."""

from __future__ import annotations

import argparse
import sys

from dive_fast.cli.train import add_course_options
from dive_fast.cli.values import count


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "train-prior",
        help="train a prior over the layouts of annotated images",
        description="Trains a diffusion prior over the layouts of a data set, in the token "
        "embeddings of a layout-to-image model. A tenth of the images is held out. Cut off and "
        "started again it goes on where it stopped.",
    )
    parser.add_argument(
        "--annotations",
        required=True,
        metavar="FILE.json|FILE.npz|scenes",
        help="a COCO annotation file, boxes as arrays, or the zoo's training scenes",
    )
    parser.add_argument(
        "--model", required=True, metavar="DIR|HUB_ID", help="the layout-to-image model"
    )
    parser.add_argument(
        "--out",
        required=True,
        metavar="DIR",
        help="the prior's directory",
    )
    parser.add_argument("--steps", type=count, metavar="N", help="of the training (default: 10000)")
    add_course_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from dive_fast.training.prior import train_layout_prior

    trained = train_layout_prior(
        options.annotations,
        options.model,
        options.out,
        steps=options.steps,
        seed=options.seed,
        bf16=options.bf16,
        log_to=options.log_to,
        tell=lambda sentence: print(f"dive-fast: {sentence}", file=sys.stderr),
    )
    learned = "scenes made anew" if trained.n_train is None else f"{trained.n_train} layouts"
    print(
        f"{options.out}: loss {trained.held_out_loss:.4f} of {trained.n_held_out} held-out "
        f"layouts, learned from {learned}"
    )
    return 0
