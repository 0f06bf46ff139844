"""The right class against its nearest rivals: what timesteps and weights are learned from."""

from __future__ import annotations

import torch

from dive_fast.core.requests import Answer, Losses, Search

# Rivals of the right class are found on this many probes, where there are more than are wanted.
SCREEN_PROBES = 20


def compared_losses(n_classes: int, label: int | None, k: int, rivals: int) -> Search:
    """Losses of the right class and its nearest rivals: ``trace["losses"]`` [1 + R, k]."""
    order = torch.arange(n_classes)
    if label is not None:
        order = order[order != label]
    if label is None or len(order) > rivals:
        losses = yield Losses(order, torch.arange(min(SCREEN_PROBES, k)))
        order = order[losses.mean(dim=1).argsort()]
    if label is None:
        label, order = int(order[0]), order[1:]
    compared = torch.cat([torch.tensor([label]), order[:rivals]])
    losses = yield Losses(compared, torch.arange(k))
    means = torch.full((n_classes,), torch.nan)
    means[compared] = losses.mean(dim=1)
    return Answer(label, means, means.isfinite() * k, {"losses": losses})
