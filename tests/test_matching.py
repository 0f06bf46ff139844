"""Which found objects are which annotated ones."""

from __future__ import annotations

import pytest
import torch

from dive_fast.predict.matching import intersection_over_union, match

TRUTH = torch.tensor([[0.0, 0, 10, 10], [20, 0, 30, 10]])


def test_intersection_over_union() -> None:
    a = torch.tensor([[0.0, 0, 10, 10], [5, 5, 15, 15], [20, 20, 30, 30]])
    found = intersection_over_union(a, a[:2])
    torch.testing.assert_close(found, torch.tensor([[1, 1 / 7], [1 / 7, 1], [0, 0]]))


def test_the_most_confident_chooses_first() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 0, 10, 10], [0, 0, 10, 9], [20, 0, 30, 12]])
    assert match(boxes, torch.tensor([0.1, 0.9, 0.5, 0.2]), TRUTH).tolist() == [-1, 0, -1, 1]


def test_the_largest_overlap_is_taken() -> None:
    truth = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 12]])
    boxes = torch.tensor([[0.0, 0, 10, 12], [0, 0, 10, 12]])
    assert match(boxes, torch.tensor([0.5, 0.4]), truth).tolist() == [1, 0]


def test_only_what_is_allowed() -> None:
    allowed = torch.tensor([[False, True], [True, True]])
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 8]])
    assert match(boxes, torch.tensor([0.9, 0.1]), TRUTH, allowed).tolist() == [-1, 0]


@pytest.mark.parametrize(("bottom", "found"), [(5.0, [0]), (4.9, [-1])])
def test_the_least_overlap(bottom: float, found: list[int]) -> None:
    boxes = torch.tensor([[0.0, 0, 10, bottom]])
    assert match(boxes, torch.ones(1), TRUTH).tolist() == found


def test_none() -> None:
    assert match(torch.empty(0, 4), torch.empty(0), TRUTH).shape == (0,)
    assert match(TRUTH, torch.ones(2), torch.empty(0, 4)).tolist() == [-1, -1]
