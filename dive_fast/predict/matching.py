"""Which found objects are which annotated ones: best first, each at most once."""

from __future__ import annotations

import torch
from torch import Tensor


def intersection_over_union(a: Tensor, b: Tensor) -> Tensor:
    """Of every box of ``a`` [n, 4] with every box of ``b`` [m, 4], xyxy: [n, m]."""
    low = torch.maximum(a[:, None, :2], b[None, :, :2])
    high = torch.minimum(a[:, None, 2:], b[None, :, 2:])
    inside = (high - low).clamp(min=0).prod(dim=2)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(dim=1) for boxes in (a, b)]
    return inside / (areas[0][:, None] + areas[1][None] - inside)


def match(
    boxes: Tensor,
    confidence: Tensor,
    truth: Tensor,
    allowed: Tensor | None = None,
    least: float = 0.5,
) -> Tensor:
    """For each found box the annotated one that it finds.

    The most confident box chooses first: of the annotated boxes that are still free, the one that
    it overlaps most.

    Args:
        boxes: found, xyxy [n, 4].
        confidence: [n].
        truth: annotated, xyxy [m, 4] in the same unit.
        allowed: bool [n, m], which pairs may be; all if None.
        least: intersection over union of a pair, at least.

    Returns:
        int64 [n], rows of ``truth``, or -1.
    """
    found = torch.full((len(boxes),), -1)
    if len(truth) == 0:
        return found
    overlap = intersection_over_union(boxes.double(), truth.double())
    if allowed is not None:
        overlap = overlap.where(allowed, -1.0)
    for i in confidence.argsort(descending=True, stable=True).tolist():
        best = int(overlap[i].argmax())
        if overlap[i, best] >= least:
            found[i] = best
            overlap[:, best] = -1.0
    return found
