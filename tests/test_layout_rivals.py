"""Layouts that nearly explain an image: one thing wrong with each, and the loss that tells them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dive_fast.core.layouts import LayoutFormat
from dive_fast.core.rivals import rival_layouts
from dive_fast.training.layout_rivals import KAPPA, Contrast

FORM = LayoutFormat.compact(("cat", "dog", "owl"), max_objects=3, grid=33)


def tokens_of(*objects: tuple[int, list[int]]) -> torch.Tensor:
    classes = torch.tensor([c for c, _ in objects]).long()
    return FORM.write(classes, torch.tensor([box for _, box in objects]).long().view(-1, 4))


def objects_of(tokens: torch.Tensor) -> list[tuple[int, tuple[int, ...]]]:
    class_ids, sides = FORM.read(tokens)
    return [
        (c, tuple(box)) for c, box in zip(class_ids.tolist(), sides.tolist(), strict=True) if c >= 0
    ]


def overlap(a: tuple[int, ...], b: tuple[int, ...]) -> float:
    cells = [
        {(x, y) for x in range(box[0], box[2]) for y in range(box[1], box[3])} for box in (a, b)
    ]
    return len(cells[0] & cells[1]) / len(cells[0] | cells[1])


def test_one_thing_is_wrong_with_each() -> None:
    truth = [(0, (0, 0, 10, 12)), (1, (14, 8, 26, 20))]
    tokens = tokens_of(*((c, list(box)) for c, box in truth))[None]
    rivals, same = rival_layouts(tokens, FORM, 200, np.random.default_rng(0))
    assert rivals.shape == (1, 200, FORM.n_slots) and same.shape == (1, 200)
    seen = set()
    for row, is_truth in zip(rivals[0], same[0].tolist(), strict=True):
        found = objects_of(row)
        assert is_truth == (found == truth)
        if is_truth:
            continue
        if len(found) == 1:
            seen.add("missing")
            assert found[0] in truth
        elif len(found) == 3:
            seen.add("extra")
            assert found[:2] == truth
            c, box = found[2]
            shape = box[2] - box[0], box[3] - box[1]
            assert (c, *shape) in {(0, 10, 12), (1, 12, 12)}  # of an object of the batch
            assert all(c != other or overlap(box, where) < 0.5 for other, where in truth)
        else:
            ((old, new),) = [(a, b) for a, b in zip(truth, found, strict=True) if a != b]
            if old[0] != new[0]:
                seen.add("renamed")
                assert old[1] == new[1]
            else:
                seen.add("moved")
                assert 0.1 < overlap(old[1], new[1]) < 0.75
    assert seen == {"missing", "extra", "renamed", "moved"}
    assert same.double().mean() < 0.05


def test_without_objects_and_when_full() -> None:
    full = tokens_of(*((2, [4 * i, 0, 4 * i + 4, 8]) for i in range(3)))
    rivals, same = rival_layouts(
        torch.stack([tokens_of(), full]), FORM, 30, np.random.default_rng(1)
    )
    assert {len(objects_of(row)) for row in rivals[0]} == {1} and not same[0].any()
    assert {len(objects_of(row)) for row in rivals[1]} == {2, 3}


def test_nothing_can_be_wrong_where_there_are_no_objects_at_all() -> None:
    rivals, same = rival_layouts(tokens_of()[None], FORM, 2, np.random.default_rng(0))
    assert same.all() and torch.equal(rivals[0, 0], tokens_of())


def test_cross_entropy() -> None:
    """By hand: p = e_0^-kappa / sum e^-kappa; one that is the annotated layout does not count."""
    errors = torch.tensor([[1.0, 1.1, 1.05], [0.5, 0.4, 0.9]], dtype=torch.float64)
    same = torch.tensor([[False, False], [False, True]])
    powers = errors**-KAPPA
    p = [powers[0, 0] / powers[0].sum(), powers[1, 0] / powers[1, :2].sum()]
    expected = -(p[0].log() + p[1].log()) / 2
    contrast = Contrast()
    errors.requires_grad_()
    loss = contrast(errors, same)
    assert loss.item() == pytest.approx(float(expected), rel=1e-6)
    loss.backward()
    assert errors.grad[1, 2] == 0 and (errors.grad[:, 0] > 0).all()
    assert contrast.log_kappa.grad.isfinite()


def test_rows_that_are_all_the_same_cost_nothing() -> None:
    same = torch.ones(1, 2, dtype=torch.bool)
    assert Contrast()(torch.tensor([[1.0, 2.0, 3.0]]), same).item() == 0.0
