"""``dive-fast evaluate``: accuracy on labelled images."""

from __future__ import annotations

import argparse
import json
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
)
from dive_fast.cli.prior_options import add_prior_options, refuse_detector_options

DESCRIPTION = """\
Classifies labelled images and reports accuracy, evaluations and seconds per image; or detects in
the held-out scenes or the images of a COCO annotation file and reports the twelve COCO numbers;
--model is then scenes unless said, --strategy guided (default) or invert, and --probes 48.

RUN/run.json holds the configuration, RUN/results.jsonl one line per image, appended as they come.
Interrupted and run again with the same options it goes on where it stopped. An image that cannot
be read is recorded with its error and the rest go on; the exit code is then 2.

A text-conditional model without --classes is asked about the names of the sub-folders, or about the
categories of the annotation file."""


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "evaluate",
        help="measure accuracy on labelled images",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--data",
        required=True,
        metavar="digits|scenes|DIR|FILE.npz|FILE.json",
        help="digits or scenes (the held-out ones), a folder with one sub-folder per class, an "
        ".npz with images and labels (or x_test and y_test), or a COCO annotation file",
    )
    parser.add_argument(
        "--images", metavar="DIR", help="the pictures of a COCO annotation file (detection)"
    )
    parser.add_argument("--out", required=True, metavar="RUN", help="the run directory")
    parser.add_argument(
        "--limit",
        type=count,
        metavar="N",
        help="a random subset of N images; of scenes the first N",
    )
    add_model_options(parser)
    add_prior_options(parser.add_argument_group("layouts (detection)"))
    add_strategy_options(parser)
    parser.add_argument("--json", action="store_true", help="print the summary as a JSON object")
    parser.set_defaults(run=run, model=None)


def run(options: argparse.Namespace) -> int:
    if evaluate_detections.is_detection(options):
        options.model = options.model or DETECTOR
        return evaluate_detections.run(options)
    from dive_fast.data import folder_classes, open_dataset, select
    from dive_fast.evaluation.classification import evaluate

    refuse_detector_options(options)
    options.model = options.model or CLASSIFIER
    strategy = chosen_strategy(options)
    classifier = load_classifier(options, folder_classes(options.data))
    data = select(open_dataset(options.data, classifier.names), options.limit, options.seed)
    try:
        summary = evaluate(
            classifier,
            data,
            options.out,
            strategy=strategy,
            probes=options.probes,
            seed=options.seed,
            timesteps=options.timesteps,
            progress=sys.stderr.isatty(),
        )
    except KeyboardInterrupt:
        print(f"dive-fast: interrupted; run again to go on from {options.out}.", file=sys.stderr)
        return 130
    if options.json:
        print(json.dumps(summary.to_dict(), allow_nan=False))
    else:
        print(as_text(summary))
    return 2 if summary.failed else 0


def as_text(summary) -> str:
    """The summary, one figure a line."""
    if summary.n == 0:
        return f"no image could be read ({summary.failed} failed)"
    lines = [
        f"accuracy                 {summary.accuracy:.2%} +- {summary.standard_error:.2%}",
        f"mean per-class accuracy  {summary.mean_per_class_accuracy:.2%}",
        f"calibration error        {summary.expected_calibration_error:.2%}",
        f"images                   {summary.n}",
        f"evaluations per image    {summary.evaluations_per_image:,.0f}",
        f"seconds per image        {summary.seconds_per_image:.3f}",
    ]
    if summary.fill_rate is not None:
        lines.append(f"batches filled           {summary.fill_rate:.1%}")
    if summary.failed:
        lines.append(f"images that failed       {summary.failed}")
    return "\n".join(lines)
