"""When an object counts as found: margin and prior weight, from what a generous search found.

Each object that was found is right or wrong, so all that is to be chosen is where to draw the line:

    share_i = 1 - (L(y) - (w / beta) log p(y)) / (the same without object i)

The prior's weight w gives the labels of the objects the highest likelihood under

    p(c | rest, x0) = softmax over classes and "not there" of -beta L + w log p

and the margin makes F1 = 2 TP / (found + annotated) of the objects with a larger share highest.

A generous search may go astray, where objects that it need not have found explain parts of others.
So others with larger margins are judged beside it, some of which scan windows of the usual sizes of
the annotated objects, and what the search of the highest F1 had is kept. One that scans looks for
little and answers with what lies beyond the line (``final_margin``): what it need not have found
explains nothing of the others, and without it what it has found would lie elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dive_fast.core.detection import Size
from dive_fast.data.coco import CocoDataset
from dive_fast.predict.calibration import Calibration
from dive_fast.strategies.layout import Box, Guided
from dive_fast.strategies.layout.boxes import overlap

WEIGHTS = (0.0, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)  # of a prior, that are tried
LEAST_MARGIN = 0.002  # of the search whose objects are judged
SMALL_MARGIN = 0.02  # between it and the usual one
MOST_SIZES, ALIKE = 3, 0.5  # usual sizes at most; overlap beyond which two are one


class Observed(NamedTuple):
    """Objects that a search found in annotated images, and how many are annotated.

    Attributes:
        losses: float64 [n, C + 1], of every class in place of the object's, last without it.
        labels: int64 [n], what it is; C for "not there".
        answers: int64 [n], what it was called.
        prices: -log p of the same layouts, nats, float64 [n, C + 1]; None without a prior.
        annotated: objects that could be found.
        images: that were searched.
    """

    losses: Tensor
    labels: Tensor
    answers: Tensor
    prices: Tensor | None
    annotated: int
    images: int


@dataclass(frozen=True)
class SearchFit:
    """What a fit of a detector's search found.

    Attributes:
        calibration: of beta.
        margin: share of the loss that an object has to explain.
        prior_weight: w; None without a prior.
        sizes: of the windows that were scanned; none without a scan.
        final_margin: share that an object has to explain in the end, with a scan.
        precision, recall: of the objects beyond the margin, on the images of the fit.
        annotated, images: how many were fitted to.
    """

    calibration: Calibration
    margin: float
    prior_weight: float | None
    sizes: tuple[Size, ...]
    final_margin: float | None
    precision: float
    recall: float
    annotated: int
    images: int

    def __str__(self) -> str:
        lines = [str(self.calibration), f"{'margin':28}{self.margin:10.2%}"]
        if self.prior_weight is not None:
            lines.append(f"{'weight of the prior':28}{self.prior_weight:10g}")
        if self.sizes:
            sizes = ", ".join(f"{width:.0%} x {height:.0%}" for width, height in self.sizes)
            lines.append(f"windows that are scanned    {sizes} of an image")
        if self.final_margin is not None:
            lines.append(f"{'margin in the end':28}{self.final_margin:10.2%}")
        lines.append(
            f"so {self.recall:.0%} of the {self.annotated} annotated objects of {self.images} "
            f"images are found by name, and {self.precision:.0%} of what is found is right"
        )
        return "\n".join(lines)


def searches(strategy: Any, sizes: tuple[Size, ...]) -> list[Any]:
    """The searches that are judged: the generous one first, those that scan last.

    One of somebody's own need not have a margin, and is judged as it is.
    """
    if getattr(strategy, "margin", None) is None:
        return [strategy]
    with_margin = [replace(strategy, margin=m) for m in (LEAST_MARGIN, strategy.usual_margin)]
    if not isinstance(strategy, Guided):
        return with_margin
    found = [replace(each, sizes=()) for each in with_margin]
    margins = (SMALL_MARGIN, strategy.usual_margin) if sizes else ()
    return found + [replace(strategy, margin=margin, sizes=sizes) for margin in margins]


def usual_sizes(data: CocoDataset, class_of: Mapping[int, int]) -> tuple[Size, ...]:
    """Median width and height of each class's annotated objects, shares of their images.

    Of the most frequent class first; of sizes that nearly are the same one, the first.

    Args:
        class_of: the detector's class of each category that it knows.
    """
    by_class: dict[int, list[Tensor]] = {}
    for image in data.images:
        sides = (image.boxes[:, 2:] - image.boxes[:, :2]).double() / torch.tensor(image.size)
        for category, share, crowd in zip(
            image.class_ids.tolist(), sides, image.crowd.tolist(), strict=True
        ):
            if not crowd and (c := class_of.get(data.category_ids[category])) is not None:
                by_class.setdefault(c, []).append(share)
    sizes: list[Size] = []
    for shares in sorted(by_class.values(), key=len, reverse=True):
        # The mean of the two in the middle.
        middle = torch.stack(shares).quantile(0.5, dim=0).clamp(max=1.0)
        size = tuple(round(share, 4) for share in middle.tolist())
        # Of windows around one point the intersection over union is that of ones in one corner.
        alike = (overlap(Box(0, 0, *size), Box(0, 0, *other)) for other in sizes)
        if min(size) > 0 and max(alike, default=0) < ALIKE:
            sizes.append(size)
    return tuple(sizes[:MOST_SIZES])


def choose_weight(observed: Observed, beta: float, lapse: float) -> float | None:
    """The prior's weight of the highest likelihood; the smallest of equal ones."""
    if observed.prices is None:
        return None
    n = observed.losses.shape[1]
    likelihoods = []
    for weight in WEIGHTS:
        logits = -beta * observed.losses - weight * observed.prices
        p = logits.softmax(dim=1).gather(1, observed.labels[:, None])[:, 0]
        likelihoods.append(float((p * (1 - lapse) + lapse / n).log().sum()))
    return WEIGHTS[likelihoods.index(max(likelihoods))]


def choose_margin(
    observed: Observed, beta: float, weight: float | None
) -> tuple[float, float, float]:
    """The margin of the highest F1, and the precision and recall there.

    It is the geometric mean of the share of the last object that is kept and of the first that is
    not, or 0.002: where nothing is wrong it stays low.
    """
    shares, order = _shares(observed, beta, weight).sort(descending=True)
    right = (observed.labels == observed.answers)[order].double().cumsum(0)
    kept = torch.arange(1, len(shares) + 1)
    best = int((right / (kept + observed.annotated)).argmax())  # F1 / 2
    first_out = float(shares[best + 1]) if best + 1 < len(shares) else 0.0
    margin = math.sqrt(max(LEAST_MARGIN, float(shares[best])) * max(LEAST_MARGIN, first_out))
    return margin, float(right[best] / kept[best]), float(right[best] / observed.annotated)


def judge_margin(
    observed: Observed, beta: float, weight: float | None, margin: float
) -> tuple[float, float]:
    """Precision and recall of the objects that explain at least the margin; 0 of none."""
    kept = _shares(observed, beta, weight) >= margin
    right = int((observed.labels == observed.answers)[kept].sum())
    return right / max(1, int(kept.sum())), right / observed.annotated


def f1(precision: float, recall: float) -> float:
    """Their harmonic mean."""
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _shares(observed: Observed, beta: float, weight: float | None) -> Tensor:
    """What each object explains, of the loss and the prior together, [n]."""
    losses = observed.losses
    if weight:
        losses = losses + weight / beta * observed.prices
    with_it = losses.gather(1, observed.answers[:, None])[:, 0]
    return 1 - with_it / losses[:, -1]
