"""``dive-fast train-layout``: a layout-to-image model of annotated images."""

from __future__ import annotations

import argparse
import sys

from dive_fast.cli.train import add_course_options, add_device
from dive_fast.cli.values import count


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "train-layout",
        help="train a layout-to-image model on annotated images",
        description="Trains a layout-to-image model on a data set in COCO's form, for detect and "
        "evaluate. Images are squashed to a square, flipped at random, and a tenth of them is "
        "held out. Cut off and started again it goes on where it stopped.",
    )
    parser.add_argument(
        "--annotations", required=True, metavar="FILE.json", help="a COCO annotation file"
    )
    parser.add_argument("--images", required=True, metavar="DIR", help="the folder of its images")
    parser.add_argument("--out", required=True, metavar="DIR", help="the model directory")
    parser.add_argument(
        "--max-objects", type=count, default=30, metavar="N", help="in an image (default: 30)"
    )
    sizes = {
        "size": (64, "side of the images, in pixels"),
        "patch-size": (8, "side of the transformer's patches, in pixels"),
        "channels": (128, "of the transformer"),
        "layers": (6, "of the transformer"),
        "steps": (8000, "of the training"),
        "batch-size": (16, "images in a step, each with its layout and three others"),
    }
    for name, (default, text) in sizes.items():
        text = f"{text} (default: {default})"
        parser.add_argument(f"--{name}", type=count, default=default, metavar="N", help=text)
    add_course_options(parser)
    add_device(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    import dataclasses

    from dive_fast.training.annotated import config_of_size, train_annotated

    config = dataclasses.replace(
        config_of_size(options.size),
        patch_size=options.patch_size,
        channels=options.channels,
        layers=options.layers,
        steps=options.steps,
        batch_size=options.batch_size,
        seed=options.seed,
        bf16=options.bf16,
    )
    trained = train_annotated(
        options.annotations,
        options.images,
        options.out,
        max_objects=options.max_objects,
        config=config,
        log_to=options.log_to,
        device=options.device,
        tell=lambda sentence: print(f"dive-fast: {sentence}", file=sys.stderr),
    )
    losses = trained.expected
    print(
        f"{options.out}: loss of {trained.n_held_out} held-out images {losses['layout']:.4f} "
        f"with their layout, {losses['empty']:.4f} without objects; learned from {trained.n_train}"
    )
    if trained.detector is not None:
        print(trained.detector)
    return 0
