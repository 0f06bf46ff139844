"""The end of every search: each object decided again, exactly, on common probes.

Its class, or that it is not there, is what explains the image best while all others stay; removing
an object and looking what is lost (leave-one-out) is also its confidence.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dive_fast.strategies.layout.board import (
    Board,
    Items,
    LayoutAnswer,
    Steps,
    measure,
    with_class,
    without,
)
from dive_fast.strategies.layout.boxes import overlap

LIKELY = 3  # classes that are measured on all probes
DUPLICATE = 0.7  # intersection over union of two objects that are one


def decide(board: Board, items: Items, i: int, probe_ids: Tensor) -> Steps:
    """Losses [C + 1] of the layout with object i of every class, and last without it.

    All are measured on the first third of the probes, the best ``LIKELY`` classes and none on the
    rest. The other classes keep the distance to the best one that they had there.
    """
    classes = range(len(board.layout_format.names))
    layouts = [with_class(items, i, c) for c in classes] + [without(items, i)]
    first = max(1, len(probe_ids) // 3)
    losses = yield from measure(board, layouts, probe_ids[:first])
    if first == len(probe_ids):
        return losses
    likely = [*losses[:-1].argsort()[:LIKELY].tolist(), len(classes)]
    rest = yield from measure(board, [layouts[c] for c in likely], probe_ids[first:])
    share = first / len(probe_ids)
    whole = losses + (1 - share) * (rest[0] - losses[likely[0]])
    whole[likely] = share * losses[likely] + (1 - share) * rest
    return whole


def settle(board: Board, items: Items, probe_ids: Tensor, margin: float, rounds: int = 2) -> Steps:
    """Decides object by object until nothing changes, at most ``rounds`` times.

    Args:
        margin: an object has to make the loss better by more than this share of it.

    Returns:
        a ``LayoutAnswer``.
    """
    items, before, rows = drop_duplicates(items), None, []
    for _ in range(rounds):
        before, i, rows = items, 0, []
        while i < len(items):
            losses = yield from decide(board, items, i, probe_ids)
            best = int(losses[:-1].argmin())
            if losses[-1] * (1 - margin) <= losses[best]:
                items = without(items, i)
                continue
            items = with_class(items, i, best)
            rows.append(losses)
            i += 1
        items = drop_duplicates(items)
        if items == before:
            break
    if items != before:
        # The rows belong to layouts on the way.
        rows = []
        for i in range(len(items)):
            rows.append((yield from decide(board, items, i, probe_ids)))
    n_classes = len(board.layout_format.names)
    table = torch.stack(rows) if rows else torch.empty(0, n_classes + 1, dtype=torch.float64)
    if rows:
        loss = float(table[0, items[0].class_id])
    else:
        loss = float((yield from measure(board, [()], probe_ids))[0])
    return LayoutAnswer(items, table, loss)


def drop_duplicates(items: Items) -> Items:
    """Of objects in nearly the same place, the first."""
    kept: list = []
    for item in items:
        if all(overlap(item.box, other.box) < DUPLICATE for other in kept):
            kept.append(item)
    return tuple(kept)
