"""How labelled pictures are divided: to learn from, to fit to, to measure on.

Pictures that belong together (a burst, pieces of one photograph, one animal) form a group and
stay in one part.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import PurePosixPath
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dive_fast.errors import DataError, DiveFastError, shown, some


class Parts(NamedTuple):
    """Rows of the pictures, int64 each: to learn from, to fit to, to measure on."""

    train: Tensor
    fit: Tensor
    test: Tensor


def divided(labels: Tensor, held_out: float, seed: int) -> Parts:
    """A share of every class is held out, at least 2 pictures; half of it is fitted to.

    Args:
        labels: int64 [N], 3 of each class or more.
        held_out: above 0 and below 1; at least one picture of a class is learned from.
    """
    rng = np.random.default_rng(seed)
    parts: tuple[list[int], ...] = ([], [], [])
    for label in labels.unique().tolist():
        rows = rng.permutation((labels == label).nonzero()[:, 0].numpy())
        away, n_fit = _wanted(label, len(rows), held_out)
        for part, some_rows in zip(
            parts, (rows[away:], rows[:n_fit], rows[n_fit:away]), strict=True
        ):
            part += some_rows.tolist()
    return Parts(*(torch.tensor(sorted(part)) for part in parts))


def divided_by_group(
    labels: Tensor, groups: Sequence[str], names: Sequence[str], held_out: float, seed: int
) -> Parts:
    """``divided``, but no group is in two parts; shares of classes are met as well as groups allow.

    Args:
        labels: int64 [N].
        groups: of each picture.
        names: of the classes.

    Raises:
        DataError: a class would be missing in a part: it has too few groups.
    """
    rng = np.random.default_rng(seed)
    number = np.unique(np.asarray(groups), return_inverse=True)[1]
    # held[g, c]: pictures of class c in group g.
    held = np.zeros((number.max() + 1, len(names)), dtype=np.int64)
    np.add.at(held, (number, labels.numpy()), 1)
    part_of = np.zeros(len(held), dtype=np.int64)  # 0 learns, 1 fits, 2 measures
    order = rng.permutation(len(held))
    # Classes of few groups choose first.
    for label in np.argsort((held > 0).sum(axis=0), kind="stable"):
        away, n_fit = _wanted(int(label), int(held[:, label].sum()), held_out)
        wanted = {1: n_fit, 2: away - n_fit}
        for group in order[held[order, label] > 0]:
            left = {p: n - held[part_of == p, label].sum() for p, n in wanted.items()}
            part = max(left, key=lambda p: left[p])
            empty = left[part] == wanted[part]
            # To the nearest number, but one group at least.
            fits = empty or held[group, label] <= 2 * left[part]
            learned = held[(part_of == 0) & (np.arange(len(held)) != group)].sum(axis=0)
            if part_of[group] == 0 and left[part] > 0 and fits and learned[held[group] > 0].all():
                part_of[group] = part
    parts = Parts(*(torch.from_numpy((part_of[number] == p).nonzero()[0]) for p in range(3)))
    missing = [
        name for c, name in enumerate(names) if any(not (labels[part] == c).any() for part in parts)
    ]
    if missing:
        raise DataError(
            "expected pictures of 3 groups or more of every class, so that each part has some; got "
            f"fewer of {some(missing)}."
        )
    return parts


def groups_of(ids: Sequence[str], pattern: str, tell: Callable[[str], object]) -> list[str]:
    """What the pattern finds in each file's name, or the picture itself where it finds nothing.

    Args:
        ids: of the pictures; a path's last part counts.
        pattern: a regular expression, searched for; its first group if it has any.
        tell: takes one sentence on pictures that stand for themselves.

    Raises:
        DiveFastError: no regular expression.
        DataError: it finds nothing in any name.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise DiveFastError(
            f"expected a regular expression that groups pictures, got {shown(pattern)} ({error})."
        ) from error
    found = [compiled.search(PurePosixPath(each).name) for each in ids]
    alone = [each for each, match in zip(ids, found, strict=True) if match is None]
    if len(alone) == len(ids):
        raise DataError(
            f"expected names of pictures in which {shown(pattern)} finds something, got "
            f"{some(ids)}."
        )
    if alone:
        tell(f"{len(alone):,} pictures are in no group, such as {alone[0]}.")
    last = 1 if compiled.groups else 0
    return [
        f"alone {each}" if match is None else f"group {match[last]}"
        for each, match in zip(ids, found, strict=True)
    ]


def _wanted(label: int, n: int, held_out: float) -> tuple[int, int]:
    """How many pictures of a class are held out, and how many of them are fitted to."""
    away = min(max(2, round(held_out * n)), n - 1)
    # Of an odd number the one more goes to either side in turn, by class.
    return away, (away + label % 2) // 2
