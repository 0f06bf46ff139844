"""``dive-fast train-classes``: a classifier made of labelled photographs of one's own."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from dive_fast.cli.options import DATA, OTHER_DATA, add_readers
from dive_fast.cli.train import add_checkpoints, add_course_options, add_device
from dive_fast.cli.values import count, share, weight

if TYPE_CHECKING:  # torch is not loaded for the help
    from dive_fast.training.classes import ClassTrainingConfig, TrainedClasses

DESCRIPTION = """\
Trains a class-conditional diffusion transformer on labelled pictures, fits what the classifier
needs to pictures that were held out, and says what to expect of it on others that were held out,
too. Every command takes the directory as --model afterwards.

Cut off and started again it goes on where it stopped. Meanwhile --out has the losses
(training.jsonl) and what the model draws (samples/)."""


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "train-classes",
        help="train a classifier on labelled pictures of your own",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--data",
        required=True,
        metavar=DATA,
        help="labelled pictures: a folder with one sub-folder per class, an .npz with images and "
        f"labels (or x_train and y_train), digits (the training part), {OTHER_DATA}",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="the model directory")
    parser.add_argument(
        "--classes",
        metavar="NAMES|FILE",
        help="names of the classes, with commas between or one a line (default: those of the data)",
    )
    parser.add_argument(
        "--held-out",
        type=share,
        default=0.15,
        metavar="X",
        help="share of every class that is not trained on: half to fit, half to measure "
        "(default: 0.15)",
    )
    parser.add_argument(
        "--group-by",
        metavar="REGEX",
        help="pictures in whose file names this finds the same, such as '^[0-9]+' the same number, "
        "are held out together or not at all: of one burst, one photograph, one animal",
    )
    _add_network(parser)
    _add_augmentation(parser)
    group = parser.add_argument_group("course")
    for name, default, text in (
        ("steps", 2000, "of the training"),
        ("batch-size", 32, "pictures in a step, each with its class and --rivals others"),
        ("samples-every", 500, "steps from one drawing to the next"),
    ):
        text = f"{text} (default: {default})"
        group.add_argument(f"--{name}", type=count, default=default, metavar="N", help=text)
    group.add_argument(
        "--learning-rate", type=weight, default=1e-3, metavar="X", help="(default: 0.001)"
    )
    group.add_argument(
        "--contrast",
        type=weight,
        default=0.1,
        metavar="X",
        help="how much it counts that the right class explains a picture better than "
        "others do; 0 to learn the pictures alone (default: 0.1)",
    )
    group.add_argument(
        "--rivals",
        type=count,
        default=3,
        metavar="N",
        help="the others that are asked of each picture, with --contrast (default: 3)",
    )
    group.add_argument(
        "--threads",
        type=count,
        metavar="N",
        help="threads of the CPU (default: what OMP_NUM_THREADS says, else all cores)",
    )
    add_readers(parser)
    add_checkpoints(parser)
    add_course_options(parser)
    add_device(parser)
    parser.set_defaults(run=run)


def _add_network(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("network")
    for name, default, text in (
        ("size", 32, "side of the pictures, in pixels"),
        ("patch-size", 8, "side of the transformer's patches, in pixels or latents"),
        ("width", 128, "of the transformer"),
        ("layers", 4, "of the transformer"),
        ("heads", 4, "of its attention"),
    ):
        text = f"{text} (default: {default})"
        group.add_argument(f"--{name}", type=count, default=default, metavar="N", help=text)
    group.add_argument(
        "--self-condition",
        action="store_true",
        help="features of the network's middle condition its later blocks",
    )
    group.add_argument("--grey", action="store_true", help="one channel instead of three")
    group.add_argument(
        "--vae",
        metavar="DIR|HUB_ID",
        help="learn the latents of this AutoencoderTiny, TAEF2 or AutoencoderKL (default: pixels)",
    )
    group.add_argument(
        "--objective",
        choices=["ddpm", "flow", "x0"],
        default="x0",
        help="predict the noise, of a flow noise - data, or the picture (default: x0)",
    )


def _add_augmentation(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("augmentation")
    group.add_argument(
        "--no-flip", action="store_true", help="do not mirror pictures, such as of characters"
    )
    group.add_argument(
        "--crop",
        type=weight,
        default=0.3,
        metavar="X",
        help="enlarge parts of pictures whose side is up to this share smaller; 0 for none "
        "(default: 0.3)",
    )
    group.add_argument(
        "--colour",
        type=weight,
        default=0.3,
        metavar="X",
        help="change brightness, contrast and saturation by up to this share; 0 for none "
        "(default: 0.3)",
    )
    group.add_argument(
        "--copies",
        type=count,
        default=7,
        metavar="N",
        help="augmented copies of a picture whose latents are computed, with --vae (default: 7)",
    )


def run(options: argparse.Namespace) -> int:
    from dive_fast.cli.loading import class_names
    from dive_fast.core.threads import choose_threads
    from dive_fast.training.classes import train_classes

    if options.threads is not None:
        choose_threads(options.threads)
    trained = train_classes(
        options.data,
        options.out,
        config=_config(options),
        vae=options.vae,
        classes=None if options.classes is None else list(class_names(options.classes)),
        held_out=options.held_out,
        group_by=options.group_by,
        readers=options.readers,
        checkpoints=options.checkpoints,
        log_to=options.log_to,
        device=options.device,
        tell=lambda sentence: print(f"dive-fast: {sentence}", file=sys.stderr),
    )
    print(as_text(options.out, trained))
    return 0


def _config(options: argparse.Namespace) -> ClassTrainingConfig:
    from dive_fast.training.augmentation import Augmentation
    from dive_fast.training.classes import ClassTrainingConfig

    return ClassTrainingConfig(
        image_size=options.size,
        grey=options.grey,
        patch_size=options.patch_size,
        width=options.width,
        layers=options.layers,
        heads=options.heads,
        self_condition=options.self_condition,
        objective=options.objective,
        augmentation=Augmentation(
            flip=not options.no_flip, crop=options.crop, colour=options.colour
        ),
        copies=options.copies,
        contrast=options.contrast,
        rivals=options.rivals,
        steps=options.steps,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        samples_every=options.samples_every,
        seed=options.seed,
        bf16=options.bf16,
    )


def as_text(out: str, trained: TrainedClasses) -> str:
    """What came out, and what to expect."""
    losses, expected = trained.losses, trained.expected
    n_train, n_fit, n_test = trained.parts
    return "\n".join(
        [
            f"{out}: learned from {n_train} pictures in {trained.seconds / 60:.1f} minutes; loss "
            f"of held-out pictures {losses['held_out']:.4f} with their class, "
            f"{losses['none']:.4f} with none",
            f"fitted to {n_fit} pictures; of {expected.n} others, neither learned nor fitted to, "
            f"{expected.accuracy:.1%} +- {expected.standard_error:.1%} are right by "
            f"{expected.strategy} (guessing: {1 / trained.n_classes:.1%}), "
            f"{expected.evaluations:,.0f} evaluations and {expected.seconds:.2f} seconds each",
        ]
    )
