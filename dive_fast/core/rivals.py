"""Layouts that nearly explain an image: the annotated one with one thing wrong.

A search meets others first: some objects are found, not all, and their boxes lie about right.
``partial_layouts`` are such, and they have rivals with one thing more wrong, too.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dive_fast.core.layouts import LayoutFormat

MOVED_BY = 0.3  # of a side, standard deviation
LEAST_MOVED, MOST_MOVED = 0.1, 0.75  # intersection over union with where it was
OTHER = 0.5  # intersection over union below which a box is another object's
TRIES = 8
ABOUT = 0.1  # of a side, standard deviation of what lies about right
LEAST_RIGHT = 0.6  # intersection over union of that with where the object is
WORSE = 0.15  # what a moved one loses of that at least


def partial_layouts(
    tokens: Tensor, layout: LayoutFormat, share: float, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """What a search has on its way: from none to all of the objects, half of them about right.

    Every object stays in its slot. How many are kept is uniform.

    Args:
        tokens: int64 [B, S], annotated layouts without crop.
        share: of the layouts; the others stay as they are.

    Returns:
        int64 [B, S], and bool [B], which were changed.
    """
    class_ids, sides = (each.numpy().copy() for each in layout.read(tokens))
    chosen = rng.random(len(tokens)) < share
    for row in np.flatnonzero(chosen):
        present = rng.permutation(np.flatnonzero(class_ids[row] >= 0))
        kept = rng.integers(len(present) + 1)
        class_ids[row, present[kept:]] = -1
        for i in present[:kept]:
            if rng.random() < 0.5:
                sides[row, i] = _about(sides[row, i], layout.grid, rng)
    partial = layout.write(torch.from_numpy(class_ids), torch.from_numpy(sides))
    chosen = torch.from_numpy(chosen)
    return torch.where(chosen[:, None], partial, tokens), chosen


def rival_layouts(
    tokens: Tensor,
    layout: LayoutFormat,
    count: int,
    rng: np.random.Generator,
    nameless: Tensor | None = None,
    annotated: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Layouts with one thing wrong: an object missing, too many, moved, or of another class.

    What is too many has the size and class of an object somewhere in the batch, and is none of
    those that a partial layout misses; what is moved lies further from where the object is.
    Objects stand in the first slots, so shuffle them: where they stand must not tell them from
    annotated ones.

    Args:
        tokens: int64 [B, S], without crop.
        count: k, rivals of each.
        nameless: bool [B], layouts whose classes do not count; none if None.
        annotated: int64 [B, S], what ``partial_layouts`` were made of; ``tokens`` if None.

    Returns:
        int64 [B, k, S], and bool [B, k], where nothing could be wrong and it is the layout itself.
    """
    class_ids, sides = (each.numpy() for each in layout.read(tokens))
    whole = layout.read(tokens if annotated is None else annotated)
    true_ids, true_sides = (each.numpy() for each in whole)
    present = true_ids >= 0
    pool = np.concatenate([true_ids[present][:, None], true_sides[present]], axis=1)
    found, same = [], []
    unnamed = [False] * len(tokens) if nameless is None else nameless.tolist()
    for row, (ids, boxes, is_nameless) in enumerate(zip(class_ids, sides, unnamed, strict=True)):
        held = np.concatenate([ids[ids >= 0][:, None], boxes[ids >= 0]], axis=1)
        names = 1 if is_nameless else len(layout.names)
        base = _Base(
            held, true_sides[row, ids >= 0], true_sides[row, (ids < 0) & (true_ids[row] >= 0)]
        )
        rivals = [_rival(base, pool, layout, names, rng) for _ in range(count)]
        found += rivals
        same.append([np.array_equal(rival, held) for rival in rivals])
    rows = np.full((len(found), layout.max_objects, 5), -1)
    for row, rival in zip(rows, found, strict=True):
        row[: len(rival)] = rival
    written = layout.write(torch.from_numpy(rows[..., 0]), torch.from_numpy(rows[..., 1:]))
    return written.view(len(tokens), count, -1), torch.tensor(same)


class _Base(NamedTuple):
    """A layout that has rivals.

    Attributes:
        held: rows (class, left, top, right, bottom).
        true: where these objects are, the sides.
        missing: where those are that it does not hold.
    """

    held: np.ndarray
    true: np.ndarray
    missing: np.ndarray


def _rival(
    base: _Base,
    pool: np.ndarray,
    layout: LayoutFormat,
    names: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """One of a layout, rows as its own; the layout itself if none is."""
    held, kinds = base.held, []
    if len(held):
        kinds += ["missing", "moved"]
        kinds += ["renamed"] if names > 1 else []
    if len(pool) and len(held) < layout.max_objects:
        kinds.append("extra")
    if not kinds:
        return held
    kind = kinds[rng.integers(len(kinds))]
    if kind == "extra":
        return _with_extra(base, pool, layout.grid, rng)
    i = rng.integers(len(held))
    if kind == "missing":
        return np.delete(held, i, axis=0)
    changed = held.copy()
    if kind == "renamed":
        changed[i, 0] = (held[i, 0] + rng.integers(1, names)) % names
    else:
        changed[i, 1:] = _moved(held[i, 1:], base.true[i], layout.grid, rng)
    return changed


def _with_extra(base: _Base, pool: np.ndarray, grid: int, rng: np.random.Generator) -> np.ndarray:
    """One object more, anywhere but in the place of one of its class or of a missing one."""
    held = base.held
    for _ in range(TRIES):
        extra = pool[rng.integers(len(pool))].copy()
        width, height = extra[3] - extra[1], extra[4] - extra[2]
        left, top = rng.integers(grid - width), rng.integers(grid - height)
        extra[1:] = left, top, left + width, top + height
        same = held[held[:, 0] == extra[0], 1:]
        if _apart(extra[1:], same, OTHER) and _apart(extra[1:], base.missing, LEAST_MOVED):
            return np.concatenate([held, extra[None]])
    return held


def _apart(box: np.ndarray, others: np.ndarray, below: float) -> bool:
    return not len(others) or bool(_overlaps(box, others).max() < below)


def _about(true: np.ndarray, grid: int, rng: np.random.Generator) -> np.ndarray:
    """A box that is about where the object is."""
    size = np.tile(true[2:] - true[:2], 2)
    for _ in range(TRIES):
        box = np.rint(true + rng.normal(0.0, ABOUT, 4) * size).clip(0, grid - 1).astype(int)
        if (box[2:] > box[:2]).all() and _overlaps(box, true[None])[0] >= LEAST_RIGHT:
            return box
    return true


def _moved(box: np.ndarray, true: np.ndarray, grid: int, rng: np.random.Generator) -> np.ndarray:
    """Its sides elsewhere, so that it is no good box of the object any more."""
    most = min(MOST_MOVED, _overlaps(box, true[None])[0] - WORSE)
    size = np.tile(box[2:] - box[:2], 2)
    for _ in range(TRIES):
        moved = np.rint(box + rng.normal(0.0, MOVED_BY, 4) * size).clip(0, grid - 1).astype(int)
        if (moved[2:] > moved[:2]).all() and (LEAST_MOVED < _overlaps(moved, true[None])[0] < most):
            return moved
    return box


def _overlaps(box: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Intersection over union of one box with others [n, 4]."""
    low, high = np.maximum(box[:2], others[:, :2]), np.minimum(box[2:], others[:, 2:])
    inside = (high - low).clip(0).prod(axis=1)
    areas = (box[2:] - box[:2]).prod() + (others[:, 2:] - others[:, :2]).prod(axis=1)
    return inside / (areas - inside)
