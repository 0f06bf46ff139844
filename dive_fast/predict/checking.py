"""``auto`` tried on images that were measured before: what a fitted shortlist is worth."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from dive_fast.core.probes import ProbeList
from dive_fast.core.requests import Answer, Gradients, Losses, LossesAndGradients, Search
from dive_fast.core.shortlist import Check, Shortlist
from dive_fast.core.vocabulary import Vocabulary
from dive_fast.strategies import Auto, Task

LEVELS = (0.8, 0.9, 0.95, 0.98, 0.99, 0.999)


@dataclass(frozen=True)
class Measured:
    """One image: all losses, and what the gradient at the mean of the rows says.

    Attributes:
        losses: float32 [C, K].
        base: float32 [G], l at v0 on the first G probes.
        slopes: float32 [C, units of G], g . (v_c - v0) of each unit's gradient.
    """

    losses: torch.Tensor
    base: torch.Tensor
    slopes: torch.Tensor


def checks(
    images: Iterable[Measured],
    fitted: Iterable[Shortlist | None],
    probes: ProbeList,
    levels: Sequence[float] = LEVELS,
) -> tuple[Check, ...]:
    """How ``auto`` does at every ``min_agreement``, against enumeration over the same probes.

    Args:
        images: such as have equally many gradients.
        fitted: for every image a shortlist that did not see it; None for ``auto`` without one.
        probes: K of them, that the losses were measured on.
    """
    pairs = list(zip(images, fitted, strict=True))
    classes = len(pairs[0][0].losses)
    # With unit vectors for rows, a gradient's product with a row is its entry.
    rows = Vocabulary(torch.eye(classes), [str(c) for c in range(classes)])
    # No gradient is known beyond what was measured.
    looked, found = min(Auto.gradient_probes, len(pairs[0][0].base)), []
    for level in levels:
        auto = Auto(min_agreement=level, gradient_probes=looked)
        wrong, evaluations = 0, 0
        for image, shortlist in pairs:
            bare = None if shortlist is None else replace(shortlist, checks=())
            answer, cost = replay(auto.search(Task(rows, probes, shortlist=bare)), image)
            wrong += answer.index != int(image.losses.double().mean(dim=1).argmin())
            evaluations += cost
        found.append(Check(level, len(pairs), wrong, round(evaluations / len(pairs), 2)))
    return tuple(found)


def replay(search: Search, image: Measured) -> tuple[Answer, int]:
    """The answer of a search that is told from memory, and the evaluations that it would cost."""
    reply, evaluations = None, 0
    while True:
        try:
            request = search.send(reply)
        except StopIteration as stop:
            return stop.value, evaluations
        ids = request.probe_ids
        evaluations += request.passes * len(request.conditions) * len(ids)
        if isinstance(request, Losses):
            reply = image.losses[request.conditions][:, ids]
        elif isinstance(request, Gradients) and request.relaxed:
            units = torch.unique(ids // request.per)
            gradients = image.slopes[:, units].T[:, None]
            reply = LossesAndGradients(image.base[ids][None], gradients)
        else:
            raise TypeError(f"{type(request).__name__} was not measured.")
