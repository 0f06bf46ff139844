"""Text, image and group scores, and their intervals, against numbers computed by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dive_fast.evaluation.task_scores import Score, pair_scores, summarise_task

NAN = math.nan


@pytest.mark.parametrize(
    ("losses", "null", "expected"),
    [
        # One image: the first text is its own.
        ([[1.0, 2.0]], None, {"text": True}),
        ([[2.0, 1.0]], None, {"text": False}),
        ([[1.0, 1.0]], None, {"text": False}),  # no win, whatever stands first
        ([[1.0, 3.0, 2.0, 1.5]], None, {"text": True}),
        ([[1.4, 3.0, NAN, 1.3]], None, {"text": False}),
        ([[1.4, 3.0, NAN, 1.5]], None, {"text": True}),  # what was given up is no rival
        # One text: the first image is its own.
        ([[3.0], [4.0], [2.0]], None, {"image": False}),
        ([[3.0], [4.0], [2.0]], [4.0, 4.5, 2.1], {"image": True}),  # -1, -0.5, -0.1
        ([[3.0], [4.0]], [3.5, 4.5], {"image": False}),  # -0.5 both
        # Two and two, Winoground's.
        ([[1.0, 2.0], [4.0, 3.0]], None, {"text": True, "image": False, "group": False}),
        ([[1.0, 2.0], [4.0, 3.0]], [1.5, 3.5], {"text": True, "image": True, "group": True}),
        ([[1.0, 2.0], [3.0, 4.0]], [1.9, 3.1], {"text": False, "image": False, "group": False}),
        # x0 explains both texts better than x1 alone; less the nulls: [[-2, 1], [-1, 0]].
        ([[3.0, 6.0], [1.0, 2.0]], [5.0, 2.0], {"text": False, "image": True, "group": False}),
        # Three images, of which the third belongs to nothing, and two texts.
        (
            [[1.0, 2.0], [3.0, 2.0], [0.5, 5.0]],
            [1.0, 3.0, 0.6],  # S = [[0, 1], [0, -1], [-0.1, 4.4]]
            {"text": True, "image": False, "group": False},
        ),
    ],
)
def test_scores_by_hand(losses: list, null: list | None, expected: dict) -> None:
    null = null if null is None else np.array(null)
    assert pair_scores(np.array(losses), null) == expected


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [
        # Wilson's own form, with z = 1.96: Agresti and Coull 1998, table of 95%.
        (0, 10, 0.0, 0.2775),
        (8, 10, 0.4902, 0.9433),
        (5, 5, 0.5655, 1.0),
        (263, 500, 0.4822, 0.5694),
    ],
)
def test_intervals_by_hand(right: int, n: int, low: float, high: float) -> None:
    score = Score.of(right, n)
    assert (score.right, score.n, score.share) == (right, n, right / n)
    assert [score.low, score.high] == pytest.approx([low, high], abs=2e-4)
    # Both ends are where the test of a share p against right / n is at its 95%.
    for p in (score.low, score.high):
        if 0 < p < 1:
            assert abs(right / n - p) == pytest.approx(1.959964 * math.sqrt(p * (1 - p) / n))


def test_a_summary_by_hand() -> None:
    cost = {"evaluations": 30, "seconds": 0.5}
    records = [
        {"id": "0", "category": "b", "right": {"text": True}, **cost},
        {"id": "1", "category": "a", "right": {"text": False}, **cost, "evaluations": 60},
        {"id": "2", "category": "b", "error": "no such file"},
        {"id": "3", "category": "b", "right": {"text": True}, **cost, "evaluations": 60},
    ]
    found = summarise_task("mine", records)
    assert (found.task, found.n, found.failed) == ("mine", 3, 1)
    assert (found.evaluations_per_item, found.seconds_per_item) == (50, 0.5)
    assert found.scores == {"text": Score.of(2, 3)}
    assert found.categories == {"b": {"text": Score.of(2, 2)}, "a": {"text": Score.of(0, 1)}}
    assert list(found.categories) == ["b", "a"]
    nothing = summarise_task("mine", records[2:3])
    assert nothing.scores == {} and nothing.evaluations_per_item is None
