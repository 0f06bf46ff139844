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
    parser.add_argument(
        "--images",
        metavar="DIR",
        help="the folder of the images: with it the weight of the prior is fitted in the end, with "
        "margin and beta, to images that were held out, and what to expect is measured",
    )
    parser.add_argument("--steps", type=count, metavar="N", help="of the training (default: 10000)")
    add_course_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from dive_fast.training.prior import check_fit, fit_prior, train_layout_prior

    if options.images is not None:
        check_fit(options.annotations, options.images, options.model)

    def tell(sentence: str) -> None:
        print(f"dive-fast: {sentence}", file=sys.stderr)

    trained = train_layout_prior(
        options.annotations,
        options.model,
        options.out,
        steps=options.steps,
        seed=options.seed,
        bf16=options.bf16,
        log_to=options.log_to,
        tell=tell,
    )
    learned = "scenes made anew" if trained.n_train is None else f"{trained.n_train} layouts"
    print(
        f"{options.out}: loss {trained.held_out_loss:.4f} of {trained.n_held_out} held-out "
        f"layouts, learned from {learned}"
    )
    if options.images is not None:
        found = fit_prior(
            options.annotations,
            options.images,
            options.model,
            options.out,
            seed=options.seed,
            tell=tell,
        )
        if found is not None:
            print(f"weight of the prior {found.prior_weight:g}: {found}")
    return 0
