"""Options that several commands share."""

from __future__ import annotations

import argparse


def count(text: str) -> int:
    """A whole number of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return value


def seed(text: str) -> int:
    """A whole number that every generator takes."""
    try:
        value = int(text)
    except ValueError:
        value = -1
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(
            f"expected a whole number from 0 to 2^63 - 1, got {text!r}"
        )
    return value


def add_model_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        default="digits",
        metavar="digits|DIR|HUB_ID",
        help="the built-in model of handwritten digits (default), a diffusers model directory, "
        "or a hub id such as facebook/DiT-XL-2-256",
    )
    group.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: cuda where there is one)")
    group.add_argument("--dtype", default="float32", help="float32 (default), bfloat16 or float16")
    group.add_argument(
        "--batch-size",
        type=count,
        default=256,
        metavar="ROWS",
        help="rows per forward of the network at most (default: 256); halved when memory runs out",
    )
    group.add_argument("--allow-pickle", action="store_true", help="also load pickled .bin weights")
    group.add_argument(
        "--timestep-embedding",
        default="auto",
        metavar="auto|diffusers|original",
        help="which frequencies a DiT was trained with (default: auto)",
    )
    group.add_argument(
        "--fitted",
        metavar="DIR",
        help="the directory that 'dive-fast fit --out' wrote (default: the model's own)",
    )


def add_strategy_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("strategy")
    group.add_argument(
        "--strategy",
        metavar="enumerate|race|invert",
        help="enumerate: try every class; race: drop classes that cannot win; "
        "invert: optimise the condition (default)",
    )
    group.add_argument(
        "--preset",
        metavar="dive-paper|diffusion-classifier",
        help="published settings instead of ours: of invert, or of enumerate",
    )
    group.add_argument(
        "--probes",
        type=count,
        metavar="K",
        help="(timestep, noise) pairs per image (default: 100; dive-paper 250)",
    )
    group.add_argument(
        "--timesteps",
        choices=["learned", "uniform"],
        help="take probes where the model's fitted timesteps say, or evenly (default: learned "
        "where the model has them; presets are uniform)",
    )
    group.add_argument("--seed", type=seed, default=0, help="of noise and draws (default: 0)")


def load_classifier(options: argparse.Namespace):
    """The classifier that the model options name."""
    from dive_fast.classify import DiffusionClassifier

    classifier = DiffusionClassifier.from_pretrained(
        options.model,
        dtype=options.dtype,
        device=options.device,
        batch_size=options.batch_size,
        allow_pickle=options.allow_pickle,
        timestep_embedding=options.timestep_embedding,
    )
    if options.fitted is not None:
        classifier.load_fitted(options.fitted)
    return classifier
