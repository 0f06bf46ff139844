"""Layouts that nearly explain an image: the annotated one with one thing wrong."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dive_fast.core.layouts import LayoutFormat

MOVED_BY = 0.3  # of a side, standard deviation
LEAST_MOVED, MOST_MOVED = 0.1, 0.75  # intersection over union with where it was
OTHER = 0.5  # intersection over union below which a box is another object's
TRIES = 8


def rival_layouts(
    tokens: Tensor,
    layout: LayoutFormat,
    count: int,
    rng: np.random.Generator,
    nameless: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Layouts with one thing wrong: an object missing, too many, moved, or of another class.

    What is too many has the size and class of an object somewhere in the batch. Objects stand in
    the first slots, so shuffle them: where they stand must not tell them from annotated ones.

    Args:
        tokens: int64 [B, S], without crop.
        count: k, rivals of each.
        nameless: bool [B], layouts whose classes do not count; none if None.

    Returns:
        int64 [B, k, S], and bool [B, k], where nothing could be wrong and it is the layout itself.
    """
    class_ids, sides = (each.numpy() for each in layout.read(tokens))
    present = class_ids >= 0
    pool = np.concatenate([class_ids[present][:, None], sides[present]], axis=1)
    found, same = [], []
    unnamed = [False] * len(tokens) if nameless is None else nameless.tolist()
    for ids, boxes, is_nameless in zip(class_ids, sides, unnamed, strict=True):
        held = np.concatenate([ids[ids >= 0][:, None], boxes[ids >= 0]], axis=1)
        names = 1 if is_nameless else len(layout.names)
        rivals = [_rival(held, pool, layout, names, rng) for _ in range(count)]
        found += rivals
        same.append([np.array_equal(rival, held) for rival in rivals])
    rows = np.full((len(found), layout.max_objects, 5), -1)
    for row, rival in zip(rows, found, strict=True):
        row[: len(rival)] = rival
    written = layout.write(torch.from_numpy(rows[..., 0]), torch.from_numpy(rows[..., 1:]))
    return written.view(len(tokens), count, -1), torch.tensor(same)


def _rival(
    held: np.ndarray,
    pool: np.ndarray,
    layout: LayoutFormat,
    names: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """One of a layout, rows (class, left, top, right, bottom); the layout itself if none is."""
    kinds = []
    if len(held):
        kinds += ["missing", "moved"]
        kinds += ["renamed"] if names > 1 else []
    if len(pool) and len(held) < layout.max_objects:
        kinds.append("extra")
    if not kinds:
        return held
    kind = kinds[rng.integers(len(kinds))]
    if kind == "extra":
        return _with_extra(held, pool, layout.grid, rng)
    i = rng.integers(len(held))
    if kind == "missing":
        return np.delete(held, i, axis=0)
    changed = held.copy()
    if kind == "renamed":
        changed[i, 0] = (held[i, 0] + rng.integers(1, names)) % names
    else:
        changed[i, 1:] = _moved(held[i, 1:], layout.grid, rng)
    return changed


def _with_extra(
    held: np.ndarray, pool: np.ndarray, grid: int, rng: np.random.Generator
) -> np.ndarray:
    """One object more, anywhere but in the place of one of its class."""
    for _ in range(TRIES):
        extra = pool[rng.integers(len(pool))].copy()
        width, height = extra[3] - extra[1], extra[4] - extra[2]
        left, top = rng.integers(grid - width), rng.integers(grid - height)
        extra[1:] = left, top, left + width, top + height
        same = held[held[:, 0] == extra[0], 1:]
        if not len(same) or _overlaps(extra[1:], same).max() < OTHER:
            return np.concatenate([held, extra[None]])
    return held


def _moved(box: np.ndarray, grid: int, rng: np.random.Generator) -> np.ndarray:
    """Its sides elsewhere, so that it is no good box of the object any more."""
    size = np.tile(box[2:] - box[:2], 2)
    for _ in range(TRIES):
        moved = np.rint(box + rng.normal(0.0, MOVED_BY, 4) * size).clip(0, grid - 1).astype(int)
        if (moved[2:] > moved[:2]).all() and (
            LEAST_MOVED < _overlaps(moved, box[None])[0] < MOST_MOVED
        ):
            return moved
    return box


def _overlaps(box: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Intersection over union of one box with others [n, 4]."""
    low, high = np.maximum(box[:2], others[:, :2]), np.minimum(box[2:], others[:, 2:])
    inside = (high - low).clip(0).prod(axis=1)
    areas = (box[2:] - box[:2]).prod() + (others[:, 2:] - others[:, :2]).prod(axis=1)
    return inside / (areas - inside)
