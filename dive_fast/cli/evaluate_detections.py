"""``dive-fast evaluate`` with scenes or a COCO annotation file: the twelve COCO numbers."""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import sys
import tempfile
from collections.abc import Iterator
from typing import TYPE_CHECKING

from tqdm import tqdm

from dive_fast.cli.options import SCENES, chosen_layout_strategy, load_detector
from dive_fast.cli.prior_options import tell_of_proportion

if TYPE_CHECKING:  # torch is not loaded for the help
    from dive_fast.data.coco import CocoDataset
    from dive_fast.strategies.layout import LayoutStrategy

# Of the options for classifiers, what a detector has no use for.
FOR_CLASSIFIERS = ("preset", "timesteps", "average")


def run(options: argparse.Namespace) -> int:
    strategy = checked_strategy(options)
    with detection_data(options, "test", None) as data:
        return _evaluate(options, strategy, data)


def is_detection(options: argparse.Namespace) -> bool:
    """Whether the data are annotated with boxes."""
    data = options.data or ""
    return options.images is not None or data == SCENES or data.endswith(".json")


def checked_strategy(options: argparse.Namespace) -> LayoutStrategy:
    """The search, after a look at what else the options say.

    Raises:
        DiveFastError: options that do not go with detection, or a search that does not exist.
    """
    from dive_fast.errors import DataError

    scenes = options.data == SCENES
    if scenes and options.images is not None:
        raise DataError("--images is for annotation files; the scenes bring their own pictures.")
    if not scenes and options.images is None:
        raise DataError(f"expected --images DIR, the pictures of {options.data}, got none.")
    for name in FOR_CLASSIFIERS:
        if getattr(options, name) is not None:
            raise DataError(f"--{name} is for classifiers; {options.data} is for detectors.")
    if options.timestep_embedding != "auto":
        raise DataError(f"--timestep-embedding is for DiTs; {options.data} is for detectors.")
    return chosen_layout_strategy(options)


@contextlib.contextmanager
def detection_data(
    options: argparse.Namespace, part: str, n_scenes: int | None
) -> Iterator[CocoDataset]:
    """The annotated pictures that ``--data``, ``--images`` and ``--limit`` name.

    The scenes' files are there as long as the context is entered.

    Args:
        part: of the scenes, "train" or "test".
        n_scenes: how many without ``--limit``; None for all that there are for tests.
    """
    from dive_fast.data.coco import read_coco
    from dive_fast.data.scenes import N_TEST, write_scenes

    if options.data != SCENES:
        yield read_coco(options.data, options.images).select(options.limit, options.seed)
        return
    with tempfile.TemporaryDirectory(prefix="scenes-") as folder:
        yield write_scenes(folder, part, min(options.limit or n_scenes or N_TEST, N_TEST))


def _evaluate(options: argparse.Namespace, strategy: LayoutStrategy, data: CocoDataset) -> int:
    from dive_fast.evaluation.detection import evaluate_detections

    detector = load_detector(options, data.names)
    tell_of_proportion(detector)
    for problem in data.problems:
        print(f"dive-fast: {problem}", file=sys.stderr)
    chosen = {"strategy": strategy, "probes": options.probes, "seed": options.seed}
    try:
        summary = evaluate_detections(
            _Chosen(detector, chosen),
            data,
            options.out,
            config=detector.identity(**chosen),
            progress=sys.stderr.isatty(),
        )
    except KeyboardInterrupt:
        tqdm.write(f"dive-fast: interrupted; run again to go on from {options.out}.", sys.stderr)
        return 130
    print(json.dumps(summary.to_dict()) if options.json else as_text(summary))
    return 2 if summary.failed else 0


class _Chosen:
    """A detector with its search and probes."""

    def __init__(self, detector, chosen: dict) -> None:
        self.names = detector.names
        self.stream = functools.partial(detector.stream, **chosen)


def as_text(summary) -> str:
    """The summary, one figure a line."""
    if summary.n == 0:
        return f"no image could be read ({summary.failed} failed)"
    lines = [
        f"{name:22} {'-' if value is None else f'{value:.3f}'}"
        for name, value in {**summary.scores, "AP_one_class": summary.ap_one_class}.items()
    ]
    lines += [
        f"images                 {summary.n}",
        f"objects per image      {summary.objects_per_image:.2f}",
        f"evaluations per image  {summary.evaluations_per_image:,.0f}",
        f"seconds per image      {summary.seconds_per_image:.3f}",
    ]
    if summary.failed:
        lines.append(f"images that failed     {summary.failed}")
    return "\n".join(lines)
