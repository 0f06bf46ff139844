"""``dive-fast diagnose``: whether a detector's model or its search is the gap."""

from __future__ import annotations

import argparse
import json
import logging
import sys

from dive_fast.cli.jobs import annotated_images, is_detection
from dive_fast.cli.loading import chosen_layout_strategy, load_detector
from dive_fast.cli.options import add_detector_options
from dive_fast.cli.values import count

log = logging.getLogger(__name__)

DESCRIPTION = """\
Compares, on images with annotated boxes, the annotated layout with what the search finds, and asks
of each object how much of the picture it explains, against the noise of that estimate. Says whether
to search harder, to train longer, to use more pixels, or to give margin or prior less weight.

  explains   median share of the loss that an object explains
  certain    objects that explain more than nothing there, by 3 standard errors
  placed     objects whose box, moved by a third, explains less, by 3 standard errors
  named      objects whose class explains more than the mean of the classes, by 3 standard errors
  probes     that make the median object certain
  found      objects that the search finds (IoU 0.5); right: and calls by their name

Images that the model was not trained on say what a detector will do; those of the training say how
much of that is the training. docs/diagnose.md has an example."""

IMAGES = 30


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "diagnose",
        help="say what a detector lacks: training, pixels or search",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--data",
        required=True,
        metavar="FILE.json|scenes",
        help="a COCO annotation file, or the zoo's scenes",
    )
    parser.add_argument("--images", metavar="DIR", help="the folder of its images")
    parser.add_argument(
        "--limit", type=count, default=IMAGES, metavar="N",
        help=f"a random subset of N images; of scenes the first N (default: {IMAGES})",
    )  # fmt: skip
    parser.add_argument(
        "--diagnosis-probes", type=count, metavar="N", help="of every measurement (default: 96)"
    )
    add_detector_options(parser)
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from dive_fast.errors import DataError

    if not is_detection(options):
        raise DataError(
            f"expected --data scenes or a COCO annotation file, got {options.data}: a diagnosis is "
            "of a detector."
        )
    strategy = chosen_layout_strategy(options)
    given = options.diagnosis_probes
    extra = {} if given is None else {"diagnosis_probes": given}
    with annotated_images(options, "test") as data:
        detector = load_detector(options, data.names)
        data.tell_problems(log.warning)
        found = detector.diagnose(
            data,
            strategy=strategy,
            probes=options.probes,
            seed=options.seed,
            progress=sys.stderr.isatty(),
            **extra,
        )
    print(json.dumps(found.to_dict(), indent=2, allow_nan=False) if options.json else found)
    return 0
