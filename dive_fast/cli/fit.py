"""``dive-fast fit``: fits temperature and timesteps to images, and stores them with the model."""

from __future__ import annotations

import argparse
import sys

from dive_fast.cli import evaluate_detections
from dive_fast.cli.options import (
    CLASSIFIER,
    DETECTOR,
    add_model_options,
    add_strategy_options,
    chosen_strategy,
    count,
    load_classifier,
    load_detector,
)

DESCRIPTION = """\
Fits to labelled images, prints what it changes, and writes it into dive_fast.json beside the model:

  timesteps  which timesteps part the right class from its rivals; probes are then taken there
  shortlist  what one gradient says of every class; strategy auto then measures fewer of them
  beta       the temperature of log p(y | x0) = -beta L(y; x0), for honest probabilities

Best use images that the model was not trained on: of those it is surer than of others. Timesteps
and shortlist can be fitted without data, to images that the model generates itself (--generate N).
A shortlist measures every class of up to 60 images; --limit takes fewer. Beta is fitted to the
answers of --strategy enumerate unless said.

Of a detector (--data scenes, or a COCO annotation file with --images) beta is fitted: to the first
100 training scenes (--limit takes others, up to 1,000), or to annotated images, by the search that
the options name. --model is then scenes unless said, --strategy guided (default) or invert, and
--probes 48. A prior is left out."""

PARTS = ("timesteps", "shortlist", "beta")
SHORTLIST_IMAGES = 60
SCENES_TO_FIT = 100


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "fit",
        help="fit timesteps and probabilities to images",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--data",
        metavar="digits|scenes|DIR|FILE.npz|FILE.json",
        help="digits or scenes (the training part), a folder with one sub-folder per class, an "
        ".npz with images and labels (or x_train and y_train), or a COCO annotation file",
    )
    parser.add_argument(
        "--images", metavar="DIR", help="the pictures of a COCO annotation file (detection)"
    )
    parser.add_argument(
        "--generate", type=count, metavar="N", help="fit to N images of the model's own"
    )
    parser.add_argument(
        "--what",
        type=_parts,
        metavar="timesteps,shortlist,beta",
        help="what to fit (default: all; without --data timesteps and shortlist)",
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="the directory whose dive_fast.json takes the values (default: the model's own; "
        "needed for models of the zoo and the hub)",
    )
    parser.add_argument(
        "--limit",
        type=count,
        metavar="N",
        help="a random subset of N images; of scenes the first N",
    )
    add_model_options(parser)
    add_strategy_options(parser)
    parser.set_defaults(run=run, model=None, prior="none", prior_weight=None)


def _parts(text: str) -> tuple[str, ...]:
    asked = text.split(",")
    if not set(asked) <= set(PARTS):
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(PARTS)}, got {text!r}")
    return tuple(part for part in PARTS if part in asked)


def run(options: argparse.Namespace) -> int:
    from dive_fast.data import load_all, open_dataset, select
    from dive_fast.errors import DiveFastError

    if evaluate_detections.is_detection(options):
        options.model = options.model or DETECTOR
        return run_detection(options)
    options.model = options.model or CLASSIFIER
    options.strategy = options.strategy or "enumerate"
    strategy = chosen_strategy(options)
    what = options.what or (PARTS if options.data else PARTS[:-1])
    if options.data is None and (options.generate is None or "beta" in what):
        needed = "--data" if "beta" in what else "--data or --generate"
        raise DiveFastError(f"fitting {' and '.join(what)} needs {needed}.")
    classifier = load_classifier(options)
    _check_out(options, classifier)
    common = {"seed": options.seed, "progress": sys.stderr.isatty()}
    images = labels = None
    if options.data is not None:
        data = open_dataset(options.data, classifier.names, part="train")
        images, labels = load_all(select(data, options.limit, options.seed))
    if "timesteps" in what:
        given = {"generate": options.generate}
        if options.generate is None:
            given = {"images": images, "labels": labels}
        print(as_text(classifier.fit_timesteps(**given, **common)))
    if "shortlist" in what:
        given = {"generate": options.generate}
        if options.generate is None:
            given = {"images": images[:SHORTLIST_IMAGES]}
        learned = classifier.fit_shortlist(**given, **common)
        print(f"shortlist: slope {learned.slope:g}, curvature of {len(learned.curvature)} classes")
    if "beta" in what:
        record = classifier.calibrate(
            images,
            labels,
            strategy=strategy,
            probes=options.probes,
            timesteps=options.timesteps,
            **common,
        )
        print(record)
    print(f"written to {classifier.save_fitted(options.out)}")
    return 0


def run_detection(options: argparse.Namespace) -> int:
    from dive_fast.errors import DiveFastError

    if options.what not in (None, ("beta",)):
        raise DiveFastError(f"of a detector beta can be fitted, got {','.join(options.what)}.")
    if options.generate is not None:
        raise DiveFastError("--generate is for classifiers; a detector needs annotated images.")
    strategy = evaluate_detections.checked_strategy(options)
    with evaluate_detections.detection_data(options, "train", SCENES_TO_FIT) as data:
        detector = load_detector(options, data.names)
        _check_out(options, detector)
        for problem in data.problems:
            print(f"dive-fast: {problem}", file=sys.stderr)
        record = detector.calibrate(
            data,
            strategy=strategy,
            probes=options.probes,
            seed=options.seed,
            progress=sys.stderr.isatty(),
        )
    print(record)
    print(f"written to {detector.save_fitted(options.out)}")
    return 0


def _check_out(options: argparse.Namespace, fitted) -> None:
    """That there is a place for the values, asked before they are computed."""
    from dive_fast.errors import DiveFastError

    if options.out is None and fitted.directory is None:
        raise DiveFastError(
            f"{options.model} has no model directory of yours to write to: name one with --out."
        )


def as_text(timesteps) -> str:
    """The density in a row of bars, one per bin, and in numbers."""
    mean = sum(timesteps.density) / len(timesteps.density)
    relative = [q / mean for q in timesteps.density]
    bars = "".join("▁▂▃▄▅▆▇█"[min(7, int(7 * q / max(relative)))] for q in relative)
    numbers = " ".join(f"{q:.1f}" for q in relative)
    return f"probes over t = 0 to {timesteps.n_timesteps}: {bars}\nrelative to uniform: {numbers}"
