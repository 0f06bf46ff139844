"""Text, image and group score of items whose image i belongs to text i (docs/tasks.md).

    text score    L(x_i, t_i) < L(x_i, t)  for every other text t, for every pair i
    image score   S(x_i, t_i) < S(x, t_i)  for every other image x, for every pair i
    group score   both

with L the mean loss over the probes. Losses of different images are not comparable: an image full
of detail has a higher one under every text. So S(x, t) = L(x, t) - L(x, no text), the rule of
arXiv 2305.16397; S = L is called "raw". An equal loss is no win: all inequalities are strict.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

IMAGE_RULES = ("null", "raw")
SCORES = ("text", "image", "group")
LEVEL = 0.95
_Z = 1.959963984540054  # of the normal distribution, for 95%, two-sided


@dataclass(frozen=True)
class Score:
    """A share of items, with its Wilson interval at 95%.

    Attributes:
        right, n: items that were right, and all.
        share: right / n.
        low, high: the interval.
    """

    right: int
    n: int
    share: float
    low: float
    high: float

    @classmethod
    def of(cls, right: int, n: int) -> Score:
        """The score of ``right`` of ``n`` items, n at least 1.

        (p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4 n^2)) / (1 + z^2 / n)
        """
        p, z2 = right / n, _Z * _Z
        centre = p + z2 / (2 * n)
        half = _Z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
        low, high = ((centre + sign * half) / (1 + z2 / n) for sign in (-1, 1))
        return cls(right, n, p, max(low, 0.0), min(high, 1.0))


@dataclass(frozen=True)
class TaskSummary:
    """What the run of a task found.

    Attributes:
        task: its name.
        scores: by "text", "image" and "group", those that its items have.
        categories: the same of the items of each category, in the order of the items.
        n: items answered.
        failed: items with an image that could not be read.
        evaluations_per_item: forwards plus backwards of the network.
        seconds_per_item: of wall time.
    """

    task: str
    scores: dict[str, Score]
    categories: dict[str, dict[str, Score]]
    n: int
    failed: int
    evaluations_per_item: float | None
    seconds_per_item: float | None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)


def pair_scores(losses: np.ndarray, null: np.ndarray | None = None) -> dict[str, bool]:
    """Which scores an item gets.

    Args:
        losses: float [I, T], of every image under every text; NaN where a search did not measure a
            text.
        null: float [I], of every image without a text: S = L - null. None for S = L.

    Returns:
        By "text" where there are several texts, "image" where there are several images, "group"
        where there are both.
    """
    pairs = range(min(losses.shape))
    found: dict[str, bool] = {}
    if losses.shape[1] > 1:
        found["text"] = all(_lowest(losses[i], i) for i in pairs)
    if losses.shape[0] > 1:
        scores = losses if null is None else losses - null[:, None]
        found["image"] = all(_lowest(scores[:, t], t) for t in pairs)
    if len(found) == 2:
        found["group"] = found["text"] and found["image"]
    return found


def _lowest(values: np.ndarray, index: int) -> bool:
    """Whether one value is below all others; one that is not known is above."""
    others = np.delete(values, index)
    return bool((others[np.isfinite(others)] > values[index]).all())


def summarise_task(task: str, records: Iterable[Mapping[str, Any]]) -> TaskSummary:
    """The scores over the records of a run, in the order in which they come.

    Args:
        task: the name of the task.
        records: one of each item.
    """
    answered, failed = [], 0
    for record in records:
        if "error" in record:
            failed += 1
        else:
            answered.append(record)
    by_category: dict[str, list[Mapping[str, Any]]] = {}
    for record in answered:
        if record.get("category") is not None:
            by_category.setdefault(record["category"], []).append(record)
    n = len(answered)
    return TaskSummary(
        task,
        _scores(answered),
        {category: _scores(of) for category, of in by_category.items()},
        n,
        failed,
        sum(record["evaluations"] for record in answered) / n if n else None,
        sum(record["seconds"] for record in answered) / n if n else None,
    )


def _scores(records: list[Mapping[str, Any]]) -> dict[str, Score]:
    found = {}
    for name in SCORES:
        right = [record["right"][name] for record in records if name in record["right"]]
        if right:
            found[name] = Score.of(sum(right), len(right))
    return found
