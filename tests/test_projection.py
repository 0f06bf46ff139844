"""DiscreteProjection equals brute force over all valid sequences of rows."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from dive_fast.core.projection import DiscreteProjection
from dive_fast.errors import DiveFastError

CLASSES, COORDINATES, NONE = (0, 3), (3, 12), 12  # one table of 13 rows, a 3 x 3 grid


def normal(*size: int, seed: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def triples(min_size: tuple[int, int] | None) -> list[tuple[int, int, int]]:
    """Every valid triple, the absent object last: an equal cost keeps the object."""
    corners = itertools.product(range(*COORDINATES), repeat=2)
    if min_size is not None:
        cells = [(tl, br, divmod(tl - 3, 3), divmod(br - 3, 3)) for tl, br in corners]
        corners = [
            (tl, br)
            for tl, br, (y1, x1), (y2, x2) in cells
            if y2 - y1 >= min_size[0] and x2 - x1 >= min_size[1]
        ]
    present = [(c, *pair) for pair in corners for c in range(*CLASSES)]
    return [*present, (NONE, NONE, NONE)]


def pair_costs(v: Tensor, table: Tensor, metric: str) -> Tensor:
    if metric == "l2":
        return (v[..., None, :] - table).square().sum(dim=-1)
    return 1 - torch.nn.functional.cosine_similarity(v[..., None, :], table, dim=-1)


@pytest.mark.parametrize("min_size", (None, (1, 1), (0, 2)))
@pytest.mark.parametrize("metric", ("l2", "cosine"))
def test_layouts_equal_brute_force(metric, min_size):
    candidates = torch.tensor(triples(min_size))  # [T, 3]
    absent = 0
    for seed in range(60):
        table = normal(13, 4, seed=seed)
        project = DiscreteProjection.layout(
            table, 2, CLASSES, COORDINATES, NONE,
            extra_coordinates=1, metric=metric, min_size=min_size,
        )  # fmt: skip
        v = normal(5, 7, 4, seed=1000 + seed)
        v[0, :3] = table[NONE] + 0.6 * v[0, :3]  # near absence, or truly undecided
        costs = pair_costs(v, table, metric)  # [B, S, V]
        expected = []
        for slots in (slice(0, 3), slice(3, 6)):
            totals = sum(costs[:, slots][:, i, candidates[:, i]] for i in range(3))  # [B, T]
            expected.append(candidates[totals.argmin(dim=1)])
        expected.append(costs[:, 6:, slice(*COORDINATES)].argmin(dim=2) + COORDINATES[0])
        index = project.index(v)
        assert torch.equal(index, torch.cat(expected, dim=1)), seed
        absent += int((index == NONE).sum())
    assert absent > 0


def test_single_is_the_nearest_row_and_the_gradient_goes_straight_through():
    table, v = normal(9, 4, seed=0), normal(3, 1, 4, seed=1).requires_grad_()
    rows, index = DiscreteProjection.single(table)(v)
    assert torch.equal(index, torch.cdist(v.detach(), table).argmin(dim=2))
    assert torch.equal(rows, table[index])
    weight = torch.arange(12.0, dtype=torch.float64).view(3, 1, 4)
    assert torch.equal(torch.autograd.grad(rows, v, weight)[0], weight)


def test_rows_are_fixed_points_and_batches_do_not_matter():
    table = normal(13, 6, seed=2).float()
    project = DiscreteProjection.layout(table, 3, CLASSES, COORDINATES, NONE, min_size=1)
    valid = torch.tensor([[0, 3, 11, NONE, NONE, NONE, 2, 4, 8]])
    assert torch.equal(project.index(table[valid]), valid)
    v = normal(4, 9, 6, seed=3).float()
    alone = torch.cat([project.index(v[i : i + 1]) for i in range(4)])
    assert torch.equal(project.index(v), alone)
    assert project.index(v[:0]).shape == (0, 9)


RANGES = torch.tensor([[0, 3], [3, 12], [3, 12]])
OBJECTS = torch.tensor([[0, 1, 2]])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"table": torch.zeros(3)}, r"table must have shape \[V, D\] with V at least 1, .*\[3\]"),
        ({"ranges": RANGES.int()}, r"ranges must be int64 of shape \[S, 2\]"),
        ({"ranges": RANGES + 10}, r"ranges must be non-empty and within \[0, 13\)"),
        ({"metric": "l1"}, "metric must be one of l2, cosine, but got 'l1'"),
        ({"none": None}, "none and objects must be given together"),
        ({"none": 13}, r"none must be in \[0, 13\), but got 13"),
        ({"none": 5}, "none must be outside the ranges of the objects' slots, but got 5"),
        ({"objects": OBJECTS + 1}, r"objects must hold different slots in \[0, 3\)"),
        ({"objects": OBJECTS[:, [0, 0, 1]]}, "objects must hold different slots"),
        ({"objects": OBJECTS[:, :1], "min_size": 1}, "min_size needs objects of at least two"),
        ({"objects": OBJECTS[:, :2], "min_size": 1}, "ranges must be one square grid of rows"),
    ],
)
def test_parts_that_do_not_fit_are_refused(changes, message):
    parts = {"table": torch.zeros(13, 4), "ranges": RANGES, "none": NONE, "objects": OBJECTS}
    with pytest.raises(DiveFastError, match=f"DiscreteProjection: .*{message}"):
        DiscreteProjection(**{**parts, **changes})


def test_another_shape_is_refused():
    project = DiscreteProjection.single(torch.zeros(5, 4))
    with pytest.raises(DiveFastError, match=r"v must have shape \[B, 1, 4\], but got \[2, 4\]"):
        project(torch.zeros(2, 4))
    with pytest.raises(DiveFastError, match="n_objects must be at least 1"):
        DiscreteProjection.layout(torch.zeros(5, 4), 0, (0, 1), (1, 2), 2)


def test_boxes_of_rows_that_lie_close_together():
    """Rows that differ in their last digits only, far from the origin, as float32 holds them."""
    table = (100 + 1e-4 * normal(13, 4, seed=3)).float()
    project = DiscreteProjection.layout(table, 1, CLASSES, COORDINATES, NONE, min_size=1)
    for tokens in ((0, 3, 7), (2, 4, 11), (1, 6, 10), (NONE, NONE, NONE)):
        index = project.index(table[list(tokens)][None])
        assert index.tolist() == [list(tokens)]
