"""Options for the prior over layouts, which detectors have and classifiers have not."""

from __future__ import annotations

import argparse
import math
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dive_fast.predict.detector import LayoutDetector


def weight(text: str) -> float:
    """A number of at least 0."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, got {text!r}")
    return value


def add_prior_options(group: argparse._ArgumentGroup) -> None:
    """The options of a detector that say which layouts are usual."""
    group.add_argument(
        "--prior",
        metavar="auto|none|DIR",
        help="the prior over layouts: the model's own where it has one (auto, the default), none, "
        "or a directory that 'dive-fast train-prior' wrote",
    )
    group.add_argument(
        "--prior-weight",
        type=weight,
        metavar="X",
        help="what log p(layout) counts beside -beta times the loss (default: 0.5)",
    )


def tell_of_proportion(detector: LayoutDetector) -> None:
    """Says on stderr that the prior may be far too heavy."""
    if detector.prior_out_of_proportion:
        print(
            f"dive-fast: the beta of {detector.model.name} is not fitted, so its prior may be far "
            "too heavy: dive-fast fit, --prior none or a smaller --prior-weight mends that.",
            file=sys.stderr,
        )


def refuse_detector_options(options: argparse.Namespace) -> None:
    """That nothing was asked of a classifier that only detectors have.

    Raises:
        DataError: it was.
    """
    from dive_fast.errors import DataError

    for name in ("prior", "prior_weight"):
        if getattr(options, name) is not None:
            option = name.replace("_", "-")
            raise DataError(f"--{option} is for detectors; {options.data} is for classifiers.")
