"""What follows the training of a layout-to-image model: fitted values, and an honest figure."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from dive_fast.data.coco import CocoDataset, class_categories
from dive_fast.data.coco.readable import readable
from dive_fast.errors import DataError, DiveFastError
from dive_fast.evaluation.coco_scores import pycocotools, score
from dive_fast.predict.detector import LayoutDetector
from dive_fast.predict.fitting_search import SearchFit

log = logging.getLogger(__name__)
EVALUATIONS = 10_000  # of one image, about: a fit takes several searches of it, a figure one
PROBES = 24  # of a search: half of the usual number, on a CPU
FEWEST, MOST = 8, 100  # images that are fitted to, and that are measured


@dataclass(frozen=True)
class ExpectedDetector:
    """What to expect of a detector, of images neither trained on nor fitted to.

    Attributes:
        AP, AP50: as COCO has them, in [0, 1]; None where nothing was annotated.
        n: images that were searched.
        objects, annotated: an image, the mean.
        evaluations, seconds: an image, the mean.
        margin, prior_weight, beta: as fitted; ``prior_weight`` None without a prior.
        fitted_to: images that they were fitted to.
    """

    AP: float | None
    AP50: float | None
    n: int
    objects: float
    annotated: float
    evaluations: float
    seconds: float
    margin: float
    prior_weight: float | None
    beta: float
    fitted_to: int

    def __str__(self) -> str:
        ap, ap50 = ("none" if value is None else f"{value:.3f}" for value in (self.AP, self.AP50))
        return (
            f"fitted to {self.fitted_to} images; on {self.n} others, not learned or fitted to, AP "
            f"{ap}, AP50 {ap50}, {self.objects:.1f} boxes an image where {self.annotated:.1f} are "
            f"annotated, {self.evaluations:,.0f} evaluations and {self.seconds:.1f} seconds each"
        )


def fit_and_measure(
    detector: LayoutDetector, held_out: CocoDataset, budget: int, seed: int, progress: bool
) -> ExpectedDetector:
    """Fits beta, margin and the prior's weight to one half of the images and scores the other.

    Args:
        detector: its model takes the values.
        held_out: images that were not learned from.
        budget: evaluations for all of it, about.

    Raises:
        DiveFastError: fewer than two images, or nothing was found that a fit could be made of.
    """
    images = shuffled(held_out, seed)
    affordable = max(FEWEST, min(MOST, budget // EVALUATIONS // 2))
    half = min(affordable, len(images) // 2)
    if half == 0:
        raise DiveFastError(f"expected two held-out images to fit to, got {len(images)}.")
    to_fit, to_measure = images[:half], images[half : 2 * half]
    part = dataclasses.replace(held_out, images=to_fit)
    fit = detector.fit_search(part, probes=PROBES, seed=seed, progress=progress)
    return measure(detector, dataclasses.replace(held_out, images=to_measure), fit, seed, progress)


def measure(
    detector: LayoutDetector, data: CocoDataset, fit: SearchFit, seed: int, progress: bool
) -> ExpectedDetector:
    """Searches images with other noises than those of the fit, and scores what is found."""
    ids = class_categories(data, detector.names)
    annotated = {image.id: int((~image.crowd).sum()) for image in data.images}
    results, found, there = [], [], 0
    stream = detector.stream(
        readable(data.images), seed=seed + 1, progress=len(data.images) if progress else None
    )
    for key, detections in stream:
        results += detections.to_coco(key, ids, every_class=True)
        found.append(detections)
        there += annotated[key]
    if not found:
        raise DataError(f"{data.source}: expected held-out images that can be read, got none.")
    numbers = _scores(data, results)
    n = len(found)
    return ExpectedDetector(
        numbers["AP"],
        numbers["AP50"],
        n,
        sum(len(one.class_id) for one in found) / n,
        there / n,
        sum(one.evaluations for one in found) / n,
        sum(one.seconds for one in found) / n,
        fit.margin,
        fit.prior_weight,
        detector.model.inverse_temperature,
        fit.images,
    )


def _scores(data: CocoDataset, results: list[dict[str, Any]]) -> dict[str, float | None]:
    """The COCO numbers; without the extra that computes them AP is None, and a warning says so."""
    try:
        pycocotools()
    except DiveFastError as error:
        log.warning("no AP: %s", error)
        return {"AP": None, "AP50": None}
    return score(data, results)


def fitted_or_told(
    detector: LayoutDetector,
    held_out: CocoDataset,
    budget: int,
    seed: int,
    progress: bool,
    tell: Callable[[str], object],
) -> ExpectedDetector | None:
    """``fit_and_measure``; a sentence where a model is too poor for a margin and beta."""
    try:
        return fit_and_measure(detector, held_out, budget, seed, progress)
    except DiveFastError as error:
        tell(
            f"margin and beta are not fitted ({str(error).rstrip('.')}): train longer, or let "
            "dive-fast diagnose say what is missing."
        )
        return None


def shuffled(data: CocoDataset, seed: int) -> tuple[Any, ...]:
    """The images in a random order: tiles of one photograph may follow each other."""
    order = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(seed))
    return tuple(data.images[i] for i in order.tolist())
