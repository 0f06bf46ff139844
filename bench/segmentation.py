"""How well error maps segment the scenes, beside thresholds, attention maps and filled boxes.

    python -m bench.segmentation detect --run RUN --limit 200     # goes on where it stopped
    python -m bench.segmentation score --run RUN --limit 200

``detect`` searches the held-out scenes for objects and keeps them in RUN/detections.jsonl;
``score`` gives all methods the same objects, and then the annotated ones (``--boxes annotated``:
only these, and no run is needed). What has a parameter has it fitted to the first 60 training
scenes with their annotated boxes. Appends to bench/results/segmentation.jsonl.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.records import append
from bench.segmentation_baselines import Attention, digits_of_components, filled, in_boxes, otsu
from dive_fast import Detections, DiffusionClassifier, LayoutDetector
from dive_fast.core.segmentation import SegmentationRule
from dive_fast.data.scenes import NAMES, Scenes, load_masks, load_scenes
from dive_fast.predict.segmenting_layouts import MAP_PROBES

N_CLASSES = len(NAMES) + 1
TRAINING = 60
SEARCH = {"rough_probes": 3, "rounds": 1, "step_probes": 4, "final_probes": 12}
AUTOCAST = "bfloat16"  # of the search
AT_ONCE = 20  # scenes that share batches
LEVELS = range(10, 160, 5)  # grey levels that a fitted threshold is chosen from
SHARES = np.linspace(0.05, 0.95, 19)  # of the largest attention
RESAMPLED = 500

Masks = np.ndarray  # int64 [N, 32, 32]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["detect", "score"])
    parser.add_argument("--run", type=Path, default="runs/segmentation", help="of the objects")
    parser.add_argument("--boxes", choices=["found", "annotated"], help="default: both")
    parser.add_argument("--limit", type=int, default=200, help="held-out scenes")
    parser.add_argument("--noise", type=float, default=0.0, help="added, a share of white")
    options = parser.parse_args()
    if options.what == "detect":
        detect(options.run, options.limit)
    else:
        score(options.run, options.limit, options.noise, options.boxes)


def detect(run: Path, limit: int) -> None:
    """Searches scenes that have no line yet."""
    made = load_scenes("test", limit)
    detector = LayoutDetector.from_pretrained("scenes", autocast=AUTOCAST)
    run.mkdir(parents=True, exist_ok=True)
    path = run / "detections.jsonl"
    done = {row["i"] for row in map(json.loads, path.open())} if path.exists() else set()
    left = [i for i in range(limit) if i not in done]
    for start in range(0, len(left), AT_ONCE):
        pairs = ((i, made.images[i]) for i in left[start : start + AT_ONCE])
        with path.open("a") as file:
            for i, found in detector.stream(pairs, **SEARCH):
                file.write(json.dumps({"i": i, **found.to_dict()}) + "\n")


def score(run: Path, limit: int, noise: float, boxes: str | None) -> None:
    """Measures all methods and appends one row for each."""
    detector = LayoutDetector.from_pretrained("scenes")
    train, train_masks = load_scenes("train", TRAINING), load_masks("train", TRAINING)
    test, truth = noisy(load_scenes("test", limit), noise), load_masks("test", limit)
    objects = {}
    if boxes != "annotated":
        objects["found"] = found_objects(run, limit, detector)
    if boxes != "found":
        objects["annotated"] = annotated(test, detector)
    common = {"scenes": limit, "noise": noise}
    methods = fitted_methods(detector, train, train_masks)
    for boxes, given in objects.items():
        for name, method in methods.items():
            labels, cost = method(test, given)
            row = {"method": name, "boxes": boxes, **figures(labels, truth), **common}
            row["map_evaluations"] = cost
            if boxes == "found":
                searched = float(np.mean([one.evaluations for one in given]))
                row |= {"search": SEARCH, "autocast": AUTOCAST, "search_evaluations": searched}
            if name == "error maps":
                row["rule"] = detector.model.segmentation.to_dict()
            print(json.dumps({key: row[key] for key in ("method", "boxes", "miou", "error")}))
            append("segmentation", row, detector)
    classifier = DiffusionClassifier.from_pretrained("digits")
    labels = np.stack([digits_of_components(classifier, image) for image in test.images])
    row = {"method": "Otsu, components, digits", "boxes": "none", **figures(labels, truth)}
    row |= common
    print(json.dumps({key: row[key] for key in ("method", "boxes", "miou", "error")}))
    append("segmentation", row, classifier)


Method = Callable[[Scenes, Sequence[Detections]], tuple[Masks, float]]


def fitted_methods(detector: LayoutDetector, train: Scenes, masks: Masks) -> dict[str, Method]:
    """All methods by name; their parameters are fitted to training scenes here."""
    given = annotated(train, detector)
    default = detector._segmentation_rule(None)
    print(detector.fit_segmentation(list(train.images), masks, detections=given))

    measured: dict[int, list[Any]] = {}  # the maps are the same under every rule

    def by_maps(rule: SegmentationRule) -> Method:
        def method(made: Scenes, objects: Sequence[Detections]) -> tuple[Masks, float]:
            if id(objects) not in measured:
                pairs = enumerate(made.images)
                stream = detector._object_maps(pairs, dict(enumerate(objects)), MAP_PROBES, None)
                measured[id(objects)] = sorted(stream, key=lambda done: done[0].key)
            found = [detector._segmentation(*done, rule) for done in measured[id(objects)]]
            labels = np.stack([one.labels.numpy() for one in found])
            return labels, float(np.mean([one.evaluations for one in found]))

        return method

    def by_levels(levels: Sequence[float]) -> Method:
        def method(made: Scenes, objects: Sequence[Detections]) -> tuple[Masks, float]:
            pairs = zip(made.images, objects, levels, strict=True)
            return np.stack([in_boxes(image > level, one) for image, one, level in pairs]), 0.0

        return method

    def fixed_level(level: float) -> Method:
        return lambda made, objects: by_levels([level] * len(objects))(made, objects)

    level = best(LEVELS, lambda x: figures(fixed_level(x)(train, given)[0], masks)["miou"])
    attention = Attention(detector)
    maps = attention.maps(train, given)
    cuts = {
        inside: best(
            SHARES,
            lambda x, inside=inside: figures(attention.cut(maps, given, x, inside), masks)["miou"],
        )
        for inside in (False, True)
    }
    print("threshold", level, "attention", cuts)

    def by_attention(inside: bool) -> Method:
        def method(made: Scenes, objects: Sequence[Detections]) -> tuple[Masks, float]:
            found = attention.maps(made, objects)
            return attention.cut(found, objects, cuts[inside], inside), float(attention.probes)

        return method

    return {
        "boxes filled": lambda made, objects: (np.stack([filled(one) for one in objects]), 0.0),
        "Otsu in boxes": lambda made, objects: by_levels([otsu(x) for x in made.images])(
            made, objects
        ),
        f"fitted threshold ({level}) in boxes": fixed_level(level),
        "attention": by_attention(False),
        "attention in boxes": by_attention(True),
        "error maps, nothing fitted": by_maps(default),
        "error maps": by_maps(detector.model.segmentation),
    }


def best(among: Sequence[float], value: Callable[[float], float]) -> float:
    return float(max(among, key=value))


def found_objects(run: Path, limit: int, detector: LayoutDetector) -> list[Detections]:
    rows = {row["i"]: row for row in map(json.loads, (run / "detections.jsonl").open())}
    if missing := [i for i in range(limit) if i not in rows]:
        raise SystemExit(f"{len(missing)} scenes have no objects yet: run detect.")
    fields = ("boxes", "indices", "confidences", "class_probabilities", "evaluations")
    values = [[rows[i][field] for field in fields] for i in range(limit)]
    return [
        Detections(boxes, ids, sure, detector.names, table, evaluations)
        for boxes, ids, sure, table, evaluations in values
    ]


def annotated(made: Scenes, detector: LayoutDetector) -> list[Detections]:
    """The true objects of each scene."""
    return [
        Detections(boxes[:n].astype(float), ids[:n], np.ones(n), detector.names)
        for boxes, ids, n in zip(made.boxes, made.class_ids, made.counts, strict=True)
    ]


def noisy(made: Scenes, noise: float) -> Scenes:
    """The scenes with Gaussian noise, the same at every call."""
    if not noise:
        return made
    drawn = np.random.default_rng(0).normal(0, 255 * noise, made.images.shape)
    return made._replace(images=(made.images + drawn).round().clip(0, 255).astype(np.uint8))


def figures(labels: Masks, truth: Masks) -> dict[str, Any]:
    """mIoU over the 11 classes, counted over all scenes, and its standard error between scenes."""
    counts = np.stack([confusion(a, b) for a, b in zip(labels, truth, strict=True)])
    draw = np.random.default_rng(0).integers
    samples = [ious(counts[draw(0, len(counts), len(counts))].sum(0)) for _ in range(RESAMPLED)]
    each, whole = ious(counts.sum(axis=0)), counts.sum(axis=0)
    ink = whole[:-1].sum() + whole[-1, :-1].sum()
    return {
        "miou": float(np.nanmean(each)),
        "error": float(np.std([np.nanmean(sample) for sample in samples])),
        "iou": dict(zip((*NAMES, "background"), each.tolist(), strict=True)),
        # Of digit against background, whatever the digit.
        "ink_iou": float(whole[:-1, :-1].sum() / ink),
        "accuracy": float(np.diag(whole).sum() / whole.sum()),
    }


def confusion(labels: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Counts int64 [11, 11], by truth and answer."""
    pairs = truth.ravel() * N_CLASSES + labels.ravel()
    return np.bincount(pairs, minlength=N_CLASSES**2).reshape(N_CLASSES, N_CLASSES)


def ious(counts: np.ndarray) -> np.ndarray:
    """Intersection over union of each class; NaN where it neither is nor is said to be."""
    hits = np.diag(counts)
    union = counts.sum(axis=0) + counts.sum(axis=1) - hits
    return np.where(union > 0, hits / np.maximum(union, 1), np.nan)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
