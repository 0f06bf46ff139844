"""Searches for layouts, with and without the prior, and both projections, on annotated images.

    python -m bench.detection --model DIR --data scenes --limit 200 --runs runs/detection
    python -m bench.detection --model DIR --data test.json --images photos --strategies guided \
        --prior none,auto --prior-weight 0.02,0.05,0.2 --runs runs/cells

Every variant writes a run directory below --runs: cut off and started again it goes on there
(seconds are then those of all sessions). Appends one line a variant to --out.

What a search would cost that tries all boxes, with B = (G (G - 1) / 2)^2 boxes on the grid, C
classes, K probes, n objects found in an image and at most M:

    one object after the other    (n + 1) B C K evaluations; the last round finds that none is left
    all layouts                   K sum_{m=0}^M (B C)^m / m! evaluations, given as a power of ten
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench.records import RESULTS, append_line
from dive_fast import LayoutDetector
from dive_fast.core.layouts import LayoutFormat
from dive_fast.data.coco import CocoDataset, class_categories, read_coco
from dive_fast.data.scenes import write_scenes
from dive_fast.errors import DiveFastError
from dive_fast.evaluation import evaluate_detections, read_records
from dive_fast.evaluation.machine import environment
from dive_fast.predict.detector import PRIOR_WEIGHT
from dive_fast.predict.matching import match
from dive_fast.strategies.layout import InvertLayout, LayoutStrategy, resolve_layout_strategy

SURE = 0.5  # confidence from which an object counts in precision and recall
PROJECTIONS = ("joint", "independent")


@dataclass(frozen=True)
class Variant:
    """A search and its prior.

    Attributes:
        strategy: with its settings.
        prior: "none", "auto" or a directory.
        weight: of the prior; no matter without one.
    """

    strategy: LayoutStrategy
    prior: str = "none"
    weight: float = PRIOR_WEIGHT

    @property
    def name(self) -> str:
        """Also of the run directory."""
        parts = [self.strategy.name]
        if isinstance(self.strategy, InvertLayout):
            parts.append(PROJECTIONS[not self.strategy.joint_boxes])
        if self.prior != "none":
            parts += ["prior", f"{self.weight:g}"]
            parts += [Path(self.prior).name] if self.prior != "auto" else []
        return "-".join(parts)


def variants(
    strategies: Sequence[str],
    priors: Sequence[str],
    projections: Sequence[str],
    weights: Sequence[float],
) -> list[Variant]:
    """All combinations that differ: only ``invert`` projects, only priors have weights."""
    found = []
    for name in strategies:
        strategy = resolve_layout_strategy(name, {})
        kinds = [strategy]
        if isinstance(strategy, InvertLayout):
            kinds = [replace(strategy, joint_boxes=p == PROJECTIONS[0]) for p in projections]
        for kind in kinds:
            for prior in priors:
                found += [Variant(kind, prior, w) for w in (weights if prior != "none" else [0.0])]
    return found


def run_variant(
    variant: Variant,
    model: str | Path,
    data: CocoDataset,
    runs: Path,
    probes: int | None = None,
    batch_size: int | None = None,
) -> tuple[dict[str, Any], LayoutDetector]:
    """Searches the images, or the rest of them; the figures, and the detector."""
    prior = {"none": None}.get(variant.prior, variant.prior)
    detector = LayoutDetector.from_pretrained(
        model,
        prior,
        prior_weight=None if prior is None else variant.weight,
        batch_size=batch_size,
    )
    chosen = {"strategy": variant.strategy, "probes": probes}
    config = detector.identity(**chosen)
    summary = evaluate_detections(
        detector, data, runs / variant.name, progress=sys.stderr.isatty(), **chosen
    )
    objects = summary.objects_per_image or 0.0
    return {
        "model": str(model),
        "data": data.identity(),
        "variant": variant.name,
        **{key: config[key] for key in ("strategy", "probes", "beta")},
        "prior": config.get("prior"),
        **summary.to_dict(),
        "found": found_objects(read_records(runs / variant.name), data, detector.names),
        "brute_force": brute_force(detector.model.layout_format, config["probes"], objects),
        "threads": torch.get_num_threads(),
    }, detector


def found_objects(
    records: Mapping[str, Mapping[str, Any]], data: CocoDataset, names: Sequence[str]
) -> dict[str, float | None]:
    """How many annotated objects were found (intersection over union at least 0.5).

    Returns:
        "places" and "objects": the share that was found at all, and with its class; for objects of
        confidence 0.5 at least "place_precision", "place_recall", "precision" and "recall", the
        last two with the class. None of nothing.
    """
    number = class_categories(data, names)
    counts = dict.fromkeys(("truth", "sure", "places", "objects", "sure_places", "sure_objects"), 0)
    for image in data.images:
        record = records.get(str(image.id))
        if record is None or "error" in record:
            continue
        boxes = torch.tensor(record["boxes"], dtype=torch.float64).view(-1, 4)
        confidence = torch.tensor(record["confidences"], dtype=torch.float64)
        known = [number[c] for c in record["indices"]]
        kept = ~image.crowd
        truth, labels = image.boxes[kept], image.class_ids[kept].tolist()
        same = [[k == data.category_ids[c] for c in labels] for k in known]
        allowed = torch.tensor(same, dtype=torch.bool).view(len(boxes), len(truth))
        place, named = match(boxes, confidence, truth), match(boxes, confidence, truth, allowed)
        sure = confidence >= SURE
        counts["truth"] += len(truth)
        counts["sure"] += int(sure.sum())
        # The most confident choose first, so the sure ones are matched as if they were alone.
        for key, found in (("places", place), ("objects", named)):
            counts[key] += int((found >= 0).sum())
            counts[f"sure_{key}"] += int((found[sure] >= 0).sum())

    def share(key: str, of: str) -> float | None:
        return counts[key] / counts[of] if counts[of] else None

    return {
        "places": share("places", "truth"),
        "objects": share("objects", "truth"),
        "place_precision": share("sure_places", "sure"),
        "place_recall": share("sure_places", "truth"),
        "precision": share("sure_objects", "sure"),
        "recall": share("sure_objects", "truth"),
    }


def brute_force(layout: LayoutFormat, probes: int, objects: float) -> dict[str, float]:
    """Evaluations of one image by the two formulas above."""
    boxes = (layout.grid * (layout.grid - 1) // 2) ** 2
    one = boxes * len(layout.names)
    terms = [m * math.log(one) - math.lgamma(m + 1) for m in range(layout.max_objects + 1)]
    top = max(terms)
    together = top + math.log(sum(math.exp(term - top) for term in terms)) + math.log(probes)
    return {
        "boxes": boxes,
        "one_after_the_other": (objects + 1) * one * probes,
        "all_layouts_log10": together / math.log(10),
    }


def open_data(options: argparse.Namespace) -> CocoDataset:
    if options.data == "scenes":
        return write_scenes(options.runs / "scenes", n=options.limit)
    return read_coco(options.data, options.images).select(options.limit)


def words(text: str) -> list[str]:
    return text.split(",")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="scenes")
    parser.add_argument("--data", default="scenes", help="scenes, or a COCO annotation file")
    parser.add_argument("--images", help="the images of an annotation file")
    parser.add_argument("--limit", type=int, default=200, help="pictures; of scenes the first ones")
    parser.add_argument("--strategies", type=words, default=["guided", "invert"])
    parser.add_argument("--prior", type=words, default=["none", "auto"], help="or directories")
    parser.add_argument(
        "--prior-weight",
        type=lambda text: [float(word) for word in words(text)],
        default=[PRIOR_WEIGHT],
    )
    parser.add_argument("--projection", type=words, default=list(PROJECTIONS))
    parser.add_argument("--probes", type=int, help="of the search (default: its own)")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--runs", type=Path, default=Path("runs/detection"))
    parser.add_argument("--out", type=Path, default=RESULTS / "detection.jsonl")
    options = parser.parse_args(arguments)
    if unknown := set(options.projection) - set(PROJECTIONS):
        parser.error(f"expected projections of {', '.join(PROJECTIONS)}, got {unknown.pop()!r}")
    given = sys.argv[1:] if arguments is None else arguments
    command = " ".join(["python -m bench.detection", *given])
    try:
        chosen = variants(
            options.strategies, options.prior, options.projection, options.prior_weight
        )
        data = open_data(options)
        for variant in chosen:
            row, detector = run_variant(
                variant, options.model, data, options.runs, options.probes, options.batch_size
            )
            append_line(options.out, {**row, "command": command}, environment(detector))
            shown = ("AP", "AP50", "evaluations_per_image", "seconds_per_image", "found")
            print(variant.name, {key: row[key] for key in shown}, flush=True)
    except DiveFastError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
