"""The temperature that makes log p(y | x0) = -beta L(y; x0) mean something."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from dive_fast.errors import DiveFastError


def fit_beta(losses: torch.Tensor, labels: torch.Tensor) -> float:
    """The beta that gives labelled images the highest likelihood.

    Minimises the cross-entropy of softmax(-beta L) over beta > 0 by golden-section search over
    log beta (it is convex in beta). The targets are Platt's, (n + 1) / (n + 2) for the label, so
    that beta stays finite where every image is answered right (Platt, 1999).

    Args:
        losses: float [B, C], mean loss of each class over the probes.
        labels: int64 [B].

    Raises:
        DiveFastError: shapes that do not fit.
    """
    if losses.ndim != 2 or labels.shape != losses.shape[:1] or len(labels) == 0:
        raise DiveFastError(
            f"expected losses [B, C] and labels [B], got {list(losses.shape)} "
            f"and {list(labels.shape)}."
        )
    energy = losses.double()
    n, c = losses.shape
    target = torch.full((n, c), 1 / (n + 2) / max(c - 1, 1), dtype=torch.float64)
    target[torch.arange(n), labels] = (n + 1) / (n + 2)

    def cross_entropy(log_beta: float) -> float:
        return F.cross_entropy(-math.exp(log_beta) * energy, target).item()

    low, high, ratio = math.log(1e-3), math.log(1e7), (math.sqrt(5) - 1) / 2
    for _ in range(80):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        if cross_entropy(left) < cross_entropy(right):
            high = right
        else:
            low = left
    return math.exp((low + high) / 2)
