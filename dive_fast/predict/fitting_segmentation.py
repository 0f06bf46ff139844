"""The three numbers of a ``SegmentationRule``, fitted to annotated masks by maximum likelihood.

    max over gamma, sigma, b of  sum over places of log P(the class that the mask says | place)

For one sigma that is logistic regression with two parameters; sigma is the best of a few.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dive_fast.core.segmentation import SegmentationRule, smooth
from dive_fast.errors import DiveFastError, shown

SIGMAS = (0.0, 1 / 64, 1 / 32, 1 / 16, 1 / 8)  # of a map's sides
UNKNOWN = -1  # a place of which a mask says nothing
# Where masks can be explained without an error gamma would grow for ever; this pulls it back a bit.
_PULL = 1e-4


@dataclass(frozen=True)
class SegmentationFit:
    """What a fit found.

    Attributes:
        rule: as it is now on the model.
        places: how many had a class in a mask.
        log_likelihood_before, log_likelihood_after: mean of log P(the mask's class | place), nats.
        right_before, right_after: share of these places whose most probable class is the mask's.
    """

    rule: SegmentationRule
    places: int
    log_likelihood_before: float
    log_likelihood_after: float
    right_before: float
    right_after: float

    def __str__(self) -> str:
        rule = self.rule
        return (
            f"gamma {rule.gamma:.4g}, sigma {rule.sigma:.4g} of the sides, background "
            f"{rule.background:+.3g}: {self.right_before:.1%} -> {self.right_after:.1%} of "
            f"{self.places:,} places right, log-likelihood {self.log_likelihood_before:.4f} -> "
            f"{self.log_likelihood_after:.4f}"
        )


@dataclass(frozen=True)
class Annotated:
    """One image of a fit.

    Attributes:
        evidence: float [n, h, w], of classes or objects, the background last where there is one.
        possible: bool [n, h, w], which of them a place may show.
        right: bool [n, h, w], which of them are what the mask says.
    """

    evidence: Tensor
    possible: Tensor
    right: Tensor

    @classmethod
    def of(cls, evidence: Tensor, mask: Tensor) -> Annotated:
        """Where every class may be everywhere; mask int64 [h, w]."""
        rows = torch.arange(len(evidence))[:, None, None]
        return cls(evidence, torch.ones_like(evidence, dtype=torch.bool), rows == mask)


def fit_rule(
    images: Sequence[Annotated], before: SegmentationRule, background: bool
) -> SegmentationFit:
    """The rule that gives the masks the highest likelihood.

    Args:
        before: where the search for gamma starts, and what its end is compared with.
        background: whether the last row of each evidence is that; else b stays 0.

    Raises:
        DiveFastError: no place has a known class that it may show, or a value is not finite.
    """
    if not all(bool(image.evidence.isfinite().all()) for image in images):
        raise DiveFastError("expected finite losses to fit to, got NaN or infinity.")
    if not any(bool((image.right & image.possible).any()) for image in images):
        raise DiveFastError("expected masks with classes to fit to, got none that can be shown.")
    best: tuple[float, SegmentationRule] | None = None
    for sigma in SIGMAS:
        gamma, offset = _regression(images, sigma, before.gamma, background)
        rule = SegmentationRule(gamma, sigma, offset)
        likelihood, _, _ = _judged(images, rule, background)
        if best is None or likelihood > best[0]:
            best = likelihood, rule
    old, new = (_judged(images, rule, background) for rule in (before, best[1]))
    return SegmentationFit(best[1], new[2], old[0], new[0], old[1], new[1])


def on_map(
    mask: Any, expected: tuple[int, int], size: tuple[int, int], n_names: int
) -> torch.Tensor:
    """A mask as int64 of the map's size (h, w), by its nearest pixels.

    Args:
        mask: whole numbers of the size ``expected`` (h, w): rows of the names, or -1.

    Raises:
        DiveFastError: it is no such mask.
    """
    try:
        found = np.asarray(mask)
    except (TypeError, ValueError, RuntimeError):
        raise DiveFastError(f"expected a mask of whole numbers, got {shown(mask)}.") from None
    if found.dtype.kind not in "iu" or found.shape != tuple(expected):
        what = f"{found.dtype} {list(found.shape)}"
        raise DiveFastError(
            f"expected a mask of whole numbers of its image's size {list(expected)}, got {what}."
        )
    low, high = int(found.min()), int(found.max())
    if low < UNKNOWN or high >= n_names:
        raise DiveFastError(
            f"expected a mask of numbers in [-1, {n_names}), got {low if low < UNKNOWN else high}."
        )
    image = Image.fromarray(found.astype(np.int32))
    return torch.from_numpy(np.array(image.resize(size[::-1], Image.Resampling.NEAREST))).long()


def _places(image: Annotated, sigma: float) -> tuple[Tensor, Tensor, Tensor]:
    """Evidence, possible and right of the places that count, [n, P] each."""
    right = image.right & image.possible
    counts = right.any(dim=0)
    return smooth(image.evidence, sigma)[:, counts], image.possible[:, counts], right[:, counts]


def _log_ratio(scores: Tensor, possible: Tensor, right: Tensor) -> Tensor:
    """log P(right | place) of scores [n, P], float64 [P]."""
    everything = scores.masked_fill(~possible, -math.inf).logsumexp(dim=0)
    return scores.masked_fill(~right, -math.inf).logsumexp(dim=0) - everything


def _regression(
    images: Sequence[Annotated], sigma: float, gamma: float, background: bool
) -> tuple[float, float]:
    """gamma and b of the highest likelihood at one sigma."""
    parts = [_places(image, sigma) for image in images]
    parts = [part for part in parts if part[0].shape[1]]
    total = sum(part[0].shape[1] for part in parts)
    with torch.enable_grad():
        logs = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([logs], max_iter=60, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = _PULL * logs[0].square()
            for evidence, possible, right in parts:
                scores = gamma * logs[0].exp() * evidence
                if background:
                    scores = torch.cat([scores[:-1], scores[-1:] + logs[1]])
                loss = loss - _log_ratio(scores, possible, right).sum() / total
            loss.backward()
            return loss

        optimizer.step(closure)
    log_factor, offset = logs.detach().tolist()
    return gamma * math.exp(log_factor), offset if background else 0.0


def _judged(
    images: Sequence[Annotated], rule: SegmentationRule, background: bool
) -> tuple[float, float, int]:
    """Mean log-likelihood, share of places that are right, and their number."""
    likelihood, hits, total = 0.0, 0, 0
    for image in images:
        scores = rule.scores(image.evidence, background)
        right = image.right & image.possible
        counts = right.any(dim=0)
        kept, possible, right = scores[:, counts], image.possible[:, counts], right[:, counts]
        likelihood += float(_log_ratio(kept, possible, right).sum())
        best = kept.masked_fill(~possible, -math.inf).argmax(dim=0)
        hits += int(right.gather(0, best[None]).sum())
        total += int(counts.sum())
    return likelihood / total, hits / total, total
