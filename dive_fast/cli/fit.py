"""``dive-fast fit``: fits temperature and timesteps to images, and stores them with the model."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from typing import Any

from dive_fast.cli.jobs import annotated_images, is_detection
from dive_fast.cli.loading import (
    chosen_layout_strategy,
    chosen_strategy,
    load_classifier,
    load_detector,
    strategy_settings,
)
from dive_fast.cli.options import DATA, OTHER_DATA, add_options_of_both
from dive_fast.cli.values import count

log = logging.getLogger(__name__)

DESCRIPTION = """\
Fits a frozen model's few free numbers to images with known answers, prints what it changes, and
writes them into dive_fast.json beside the model, where every command finds them. Use images that
were not in the model's training, or it will be too sure. The data say what is fitted:

  classifier  --data digits, a folder by class, an .npz or a table, wds: or hf:
              timesteps, shortlist and beta, or what --what names
    timesteps   where probes tell the right class from its rivals; they are then taken there
    shortlist   what one gradient says of every class; strategy auto then measures fewer of them
                (learned from 60 random images, each of which measures every class, and tried on
                each of them with what the others say)
    beta        the temperature of log p(y | x0) = -beta L(y; x0), for honest probabilities,
                fitted to the answers of --strategy (default: enumerate)
    weights     what the loss at each timestep counts (only if --what names it: it changes what
                is answered), with a beta of their own; from 500 random images unless --limit says
                otherwise, each of which costs --probes times the right class and its nine nearest
                rivals. Uniform weights stay where images left out are not answered better
    Timesteps and shortlist need no labels: --unlabelled takes any images, best such as will be
    classified. With --generate N the model makes its own, which are easier than real ones.

  detector    --data scenes, or a COCO annotation file with --images
    timesteps   where probes tell annotated layouts from others with one thing wrong, and what
                each counts (only if --what names it)
    search      when an object counts as found: the margin, the weight of the prior (if the model
                has one), whether windows of the usual sizes of objects are scanned, and beta,
                fitted to what --strategy (default: guided) finds with low margins and with the
                usual one, without prior, on --probes, which later searches have too; of the
                scenes in the first 100 (--limit takes up to 1,000)
    beta        only the temperature of the confidences, for the margin that is in use"""

OF_DETECTORS = ("timesteps", "search", "beta")
USUAL = ("timesteps", "shortlist", "beta")
# In this order: a shortlist and beta belong to the weights. They change answers, so must be named.
PARTS = ("weights", *USUAL)
SHORTLIST_IMAGES = 60
WEIGHTS_IMAGES = 500
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
        metavar=f"{DATA}|scenes|FILE.json",
        help="for a classifier digits (the training part), a folder with one sub-folder per class, "
        f"an .npz with images and labels (or x_train and y_train), {OTHER_DATA}; for a "
        "detector scenes (the "
        "training part), or a COCO annotation file",
    )
    parser.add_argument(
        "--what",
        type=_parts,
        metavar="timesteps,shortlist,beta,weights",
        help="what to fit (default: timesteps, shortlist and beta; without --data timesteps and "
        "shortlist; of a detector search; timesteps as well, or beta alone, if named)",
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
    group = add_options_of_both(parser, strategy="enumerate", prior=False)
    group.add_argument(
        "--generate",
        type=count,
        metavar="N",
        help="fit timesteps and shortlist to N images of the model's own",
    )
    group.add_argument(
        "--unlabelled",
        metavar="DIR|GLOB|FILE",
        help="fit timesteps and shortlist to images without labels",
    )
    parser.set_defaults(run=run)


def _parts(text: str) -> tuple[str, ...]:
    asked, known = text.split(","), dict.fromkeys((*PARTS, *OF_DETECTORS))
    if not set(asked) <= set(known):
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(known)}, got {text!r}")
    return tuple(part for part in known if part in asked)


def run(options: argparse.Namespace) -> int:
    fit = _fit_detector if is_detection(options) else _fit_classifier
    fitted = fit(options)
    print(f"written to {fitted.save_fitted(options.out)}")
    return 0


def _fit_classifier(options: argparse.Namespace):
    from dive_fast.data import load_all, open_dataset, select
    from dive_fast.errors import DiveFastError

    options.strategy = options.strategy or "enumerate"
    strategy = chosen_strategy(options)
    what = options.what or (USUAL if options.data else USUAL[:-1])
    if "search" in what:
        raise DiveFastError("search is fitted to a detector, got a classifier's data.")
    given = [x for x in (options.data, options.generate, options.unlabelled) if x is not None]
    if {"beta", "weights"} & set(what) and options.data is None:
        raise DiveFastError(f"fitting {' and '.join(what)} needs --data.")
    if options.generate is not None and options.unlabelled is not None:
        raise DiveFastError("expected --generate or --unlabelled, got both.")
    if not given:
        raise DiveFastError(
            f"fitting {' and '.join(what)} needs --data, --unlabelled or --generate."
        )
    classifier = load_classifier(options)
    _check_out(options, classifier)
    common = {"seed": options.seed, "progress": sys.stderr.isatty()}
    images = labels = None
    if options.data is not None:
        data = open_dataset(options.data, classifier.names, part="train")
        images, labels = load_all(select(data, options.limit, options.seed))
    source = _unlabelled(options, images, labels)
    if "weights" in what:
        print(_fitted_weights(classifier, images, labels, options, common))
        # Whether there are any was for the fit to say, and what follows takes what it said.
        options.weights = None if options.weights == "learned" else options.weights
    if "timesteps" in what:
        print(as_text(classifier.fit_timesteps(**source, **common)))
    if "shortlist" in what:
        few = _some({key: source[key] for key in source if key != "labels"}, options.seed)
        few["weights"] = options.weights
        print(shortlist_text(classifier.fit_shortlist(**few, **common)))
    if "beta" in what:
        record = classifier.calibrate(
            images,
            labels,
            strategy=strategy,
            probes=options.probes,
            timesteps=options.timesteps,
            weights=options.weights,
            **common,
        )
        print(record)
    return classifier


def _fitted_weights(classifier, images, labels, options: argparse.Namespace, common):
    """Learns the weights, from a part of many images; says before what that costs."""
    from dive_fast.predict.fitting_weights import PROBES, RIVALS, evaluations_per_image

    n = min(len(images), options.limit or WEIGHTS_IMAGES)
    probes = PROBES if options.probes is None else options.probes
    cost = evaluations_per_image(len(classifier.names), probes, RIVALS)
    print(f"weights: {n:,} images of {cost:,} evaluations each, {n * cost:,} in all", flush=True)
    images, labels = (_picked(x, n, options.seed) for x in (images, labels))
    return classifier.fit_weights(images, labels, probes=probes, **common)


def _unlabelled(options: argparse.Namespace, images, labels) -> dict[str, Any]:
    """What timesteps and shortlist are fitted to, as arguments of ``fit_timesteps``."""
    from dive_fast.data.paths import expand_inputs

    if options.generate is not None:
        return {"generate": options.generate}
    if options.unlabelled is None:
        return {"images": images, "labels": labels}
    found = expand_inputs([options.unlabelled])
    if error := next((error for _, error in found if error is not None), None):
        raise error
    paths = [path for path, _ in found]
    return {"images": _picked(paths, options.limit, options.seed)}


def _some(source: dict[str, Any], seed: int) -> dict[str, Any]:
    """As many random images as a shortlist is learned from."""
    images = source.get("images")
    if images is None:
        return source
    return {"images": _picked(images, SHORTLIST_IMAGES, seed)}


def _picked(images: Sequence[Any], limit: int | None, seed: int) -> list[Any]:
    """So many random images in their order; None means all."""
    from dive_fast.data.labelled import chosen

    return [images[i] for i in chosen(len(images), limit, seed)]


def shortlist_text(shortlist) -> str:
    """What was learned, and how ``auto`` did with it on images that were left out."""
    lines = [
        f"shortlist: slope {shortlist.slope:g}, curvature of {len(shortlist.curvature)} classes"
    ]
    if not shortlist.checks:
        return lines[0]
    lines += [
        f"tried on {shortlist.checks[0].images} images, each left out in its turn:",
    ]
    lines += [
        f"  min_agreement {x.min_agreement:<6g} {x.images - x.wrong} of {x.images} as enumerated, "
        f"{x.evaluations:,.0f} evaluations"
        for x in shortlist.checks
    ]
    return "\n".join(lines)


def _fit_detector(options: argparse.Namespace):
    from dive_fast.errors import DiveFastError

    what = options.what or ("search",)
    only_beta = what == ("beta",)
    if not only_beta and not set(what) <= {"timesteps", "search"}:
        raise DiveFastError(
            "of a detector timesteps and search can be fitted, or beta alone, got "
            f"{','.join(what)}."
        )
    options.prior, options.prior_weight = "none" if only_beta else None, None
    strategy = chosen_layout_strategy(options)
    if not only_beta and "margin" in strategy_settings(options):
        raise DiveFastError("margin is what is fitted: leave it out of --set, or fit --what beta.")
    with annotated_images(options, "train", SCENES_TO_FIT) as data:
        detector = load_detector(options, data.names, to_fit=True)
        _check_out(options, detector)
        data.tell_problems(log.warning)
        common = {"seed": options.seed, "progress": sys.stderr.isatty()}
        if "timesteps" in what:
            print(detector.fit_timesteps(data, **common), flush=True)
        if what != ("timesteps",):
            fit = detector.calibrate if only_beta else detector.fit_search
            print(fit(data, strategy=strategy, probes=options.probes, **common))
    return detector


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
