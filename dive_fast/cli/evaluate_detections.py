"""``dive-fast evaluate`` with scenes or a COCO annotation file: the twelve COCO numbers."""

from __future__ import annotations

import argparse
import functools
import json
import sys
import tempfile
from typing import TYPE_CHECKING

from tqdm import tqdm

from dive_fast.cli.options import SCENES, chosen_layout_strategy, load_detector

if TYPE_CHECKING:  # torch is not loaded for the help
    from dive_fast.coco import CocoDataset
    from dive_fast.strategies.layout import LayoutStrategy

# Of the options for classifiers, what a detector has no use for.
FOR_CLASSIFIERS = ("preset", "timesteps", "fitted", "classes", "template", "average")


def run(options: argparse.Namespace) -> int:
    from dive_fast.coco import read_coco
    from dive_fast.errors import DataError
    from dive_fast.zoo.scenes_coco import N_TEST, write_scenes

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
    strategy = chosen_layout_strategy(options)
    if not scenes:
        data = read_coco(options.data, options.images)
        return _evaluate(options, strategy, data.select(options.limit, options.seed))
    with tempfile.TemporaryDirectory(prefix="scenes-") as folder:
        n = N_TEST if options.limit is None else min(options.limit, N_TEST)
        return _evaluate(options, strategy, write_scenes(folder, n=n))


def _evaluate(options: argparse.Namespace, strategy: LayoutStrategy, data: CocoDataset) -> int:
    from dive_fast.evaluate_detections import evaluate_detections

    detector = load_detector(options)
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
        self.detect_stream = functools.partial(detector.detect_stream, **chosen)


def as_text(summary) -> str:
    """The summary, one figure a line."""
    if summary.n == 0:
        return f"no image could be read ({summary.failed} failed)"
    lines = [
        f"{name:22} {'-' if value is None else f'{value:.3f}'}"
        for name, value in summary.scores.items()
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
