"""Boxes read off error maps."""

from __future__ import annotations

import pytest
import torch
from toy_layout import ToyLayoutModel

from dive_fast.core.probes import low_discrepancy_probes
from dive_fast.core.requests import ErrorMaps, Losses
from dive_fast.engine import Engine, Job
from dive_fast.engine.objective import Objective
from dive_fast.strategies.layout import Board, Box, Item, LayoutAnswer
from dive_fast.strategies.layout.boxes import tightened
from dive_fast.strategies.layout.residual import cells, height, regions, residual


def marks(*boxes: Box, side: int = 6) -> torch.Tensor:
    found = torch.zeros(side, side)
    for box in boxes:
        found[box.top : box.bottom, box.left : box.right] = 1.0
    return found


def test_regions_are_boxes_around_what_is_connected() -> None:
    small, large, corner = Box(0, 0, 1, 2), Box(2, 1, 4, 4), Box(4, 4, 6, 6)
    assert regions(marks(small), 0.5) == [small]
    assert regions(marks(small, large), 0.5) == [large, small]
    assert regions(marks(small, large, corner), 0.5) == [Box(2, 1, 6, 6), small]
    assert regions(torch.zeros(6, 6), 0.0) == []


def test_a_region_without_weight_is_none() -> None:
    noisy = marks(Box(0, 0, 5, 5), side=20)
    noisy[10, 10] = 0.3
    assert regions(noisy, 0.2) == [Box(0, 0, 5, 5)]


def test_levels_separate() -> None:
    valley = marks(Box(0, 0, 2, 3), Box(3, 0, 5, 3))
    valley[0:3, 2] = 0.3
    assert regions(valley, 0.1) == [Box(0, 0, 5, 3)]
    assert set(regions(valley, 0.5)) == {Box(0, 0, 2, 3), Box(3, 0, 5, 3)}


def test_height_is_not_that_of_one_cell() -> None:
    spike = marks(Box(0, 0, 10, 10), side=20)
    spike[15, 15] = 100.0
    assert height(spike) == pytest.approx(1.0)


def test_tightened() -> None:
    mask = marks(Box(1, 2, 3, 5)).bool()
    assert tightened(Box(0, 0, 6, 6), mask) == Box(1, 2, 3, 5)
    assert tightened(Box(2, 0, 6, 4), mask) == Box(2, 2, 3, 4)
    assert tightened(Box(4, 0, 6, 6), mask) is None


@pytest.mark.parametrize(("grid", "shape"), [(3, (4, 4)), (4, (7, 8)), (9, (4, 4)), (5, (4, 4))])
def test_cells_keep_the_mean(grid: int, shape: tuple[int, int]) -> None:
    flat = cells(torch.full(shape, 0.5), grid)
    assert flat.shape == (grid - 1, grid - 1)
    torch.testing.assert_close(flat, torch.full_like(flat, 0.5))
    half = torch.zeros(shape)
    half[:, shape[1] // 2 :] = 1.0
    assert cells(half, grid)[0, 0] < 0.5 < cells(half, grid)[0, -1]


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_error_maps_average_to_the_losses(batch_size: int) -> None:
    """Whatever the batches, beside requests of other kinds; and they show what is missing."""
    model = ToyLayoutModel()
    probes = low_discrepancy_probes(6, 1000, model.latent_shape)
    board = Board(model.vocabulary.table, model.layout_format, probes)
    box = Box(1, 2, 4, 6)
    layouts = [(), (Item(1, box),), (Item(0, Box(0, 0, 6, 6)),)]
    (x0,) = model.picture(board.conditions([(Item(1, box),)]).flatten(1))
    conditions = board.conditions(layouts).flatten(1)
    ids = torch.arange(5)

    def search():
        losses = yield Losses(conditions, ids)
        maps = yield ErrorMaps(conditions, ids)
        unexplained = yield from residual(board, (), ids)
        trace = {"losses": losses, "maps": maps, "unexplained": unexplained}
        return LayoutAnswer((), torch.empty(0, 4), 0.0, trace)

    jobs = [Job(i, x0, search()) for i in range(3)]
    for found in Engine(model, batch_size).run(jobs, probes, Objective()):
        trace = found.answer.trace
        assert trace["maps"].shape == (3, 6, 6)
        torch.testing.assert_close(trace["maps"].mean(dim=(1, 2)), trace["losses"].mean(dim=1))
        assert regions(trace["unexplained"], 0.5 * height(trace["unexplained"])) == [box]
        assert found.evaluations == 15 + 15 + 5
