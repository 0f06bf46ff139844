"""``dive-fast train``: makes a model of the zoo anew."""

from __future__ import annotations

import argparse

from dive_fast.cli.options import add_log_to
from dive_fast.cli.values import count, seed


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "train",
        help="reproduce a model of the zoo",
        description="Trains a model of the zoo from its real images and writes a diffusers model "
        "directory. Cut off and started again it goes on where it stopped.",
    )
    choices = ["digits", "mnist", "omniglot", "scenes"]
    parser.add_argument("model", choices=choices, help="which model")
    parser.add_argument(
        "--data",
        metavar="FILE.npz",
        help="the images of mnist or omniglot; digits and scenes come with scikit-learn",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="the model directory")
    parser.add_argument(
        "--steps", type=count, metavar="N", help="fewer steps than the zoo's, for a try"
    )
    add_checkpoints(parser)
    add_course_options(parser)
    parser.set_defaults(run=run)


def add_checkpoints(parser: argparse.ArgumentParser) -> None:
    """Of the commands that train what classifies."""
    parser.add_argument(
        "--checkpoints",
        type=count,
        default=0,
        metavar="N",
        help="also keep N model directories in DIR/checkpoints, each after twice the steps of the "
        "one before, for 'dive-fast compare --checkpoints'",
    )


def add_course_options(parser: argparse.ArgumentParser) -> None:
    """What every training command takes."""
    parser.add_argument("--seed", type=seed, default=0, help="of the training (default: 0)")
    parser.add_argument(
        "--bf16",
        action="store_true",
        help="compute the network in bfloat16; its weights stay float32",
    )
    add_log_to(parser)


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", help="that trains: cpu, cuda, cuda:1 ... (default: cuda where there is one)"
    )


def run(options: argparse.Namespace) -> int:
    if options.model == "scenes":
        return run_scenes(options)
    from dive_fast.training.zoo import train_zoo_model

    expected = train_zoo_model(
        options.model,
        options.out,
        data=options.data,
        steps=options.steps,
        seed=options.seed,
        bf16=options.bf16,
        checkpoints=options.checkpoints,
        log_to=options.log_to,
    )
    print(
        f"{options.out}: {expected['accuracy']:.2%} of {expected['n']} held-out images by "
        f"{expected['strategy']}, {expected['probes']} probes"
    )
    return 0


def run_scenes(options: argparse.Namespace) -> int:
    from dive_fast.errors import DataError, DiveFastError
    from dive_fast.training.scenes import train_scenes

    if options.data is not None:
        raise DataError(
            f"the scenes are made of scikit-learn's digits: expected no --data, got {options.data}."
        )
    if options.checkpoints:
        raise DiveFastError("--checkpoints is for models that classify: expected none for scenes.")
    losses = train_scenes(
        options.out,
        steps=options.steps,
        seed=options.seed,
        bf16=options.bf16,
        log_to=options.log_to,
    )
    print(
        f"{options.out}: loss of held-out scenes {losses['layout']:.4f} with their layout, "
        f"{losses['empty']:.4f} with that of an empty canvas"
    )
    return 0
