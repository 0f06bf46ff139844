"""The prior's part of the objective: fair to layouts in any slots, and differentiable."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from tiny_prior import FORMAT, TABLE, make_prior, pairs

from dive_fast.core.layouts import LayoutFormat
from dive_fast.errors import ModelError
from dive_fast.priors import LayoutPenalty, LayoutPrior, fits, penalty
from dive_fast.strategies.layout import Board, Box, Item
from dive_fast.strategies.layout.board import ANY, without

CROPPED = LayoutFormat.compact(("a", "b"), max_objects=3, grid=4, crop=True)
ITEMS = (
    Item(0, Box(0, 0, 2, 1)),
    Item(1, Box(1, 1, 3, 3)),
    Item(1, Box(0, 2, 1, 3)),
)


def make_penalty(form: LayoutFormat = CROPPED, probes: int = 5, seed: int = 0) -> LayoutPenalty:
    table = torch.randn(form.vocabulary_size, 8, generator=torch.Generator().manual_seed(0))
    return LayoutPenalty(make_prior(form, table), 0.5, probes, form, seed)


def make_board(form: LayoutFormat = CROPPED) -> Board:
    table = torch.randn(form.vocabulary_size, 8, generator=torch.Generator().manual_seed(0))
    return Board(table, form, None, penalty=make_penalty(form))


def priced(board: Board, layouts: list) -> list[tuple[float, float]]:
    """What the prior adds, by the pseudo-likelihood and by the bound."""
    bound = board.penalty(board.conditions(layouts)).tolist()
    return list(zip(board.price(layouts).tolist(), bound, strict=True))


def test_objects_have_no_order() -> None:
    """In whichever slots they stand, also behind absent ones, layouts have one penalty."""
    board = make_board()
    orders = [items for n in range(4) for items in permutations(ITEMS, n)]
    prices: dict[frozenset, list[tuple[float, float]]] = {}
    for items, both in zip(orders, priced(board, orders), strict=True):
        prices.setdefault(frozenset(items), []).append(both)
    assert sorted(map(len, prices.values())) == [1, 1, 1, 1, 2, 2, 2, 6]
    for same in prices.values():
        for values in zip(*same, strict=True):
            assert max(values) - min(values) < 1e-5 * abs(values[0])
    for values in zip(*(same[0] for same in prices.values()), strict=True):
        distinct = sorted(values)
        assert min(b - a for a, b in zip(distinct, distinct[1:], strict=False)) > 1e-5
    two = board.conditions([ITEMS[:2]])
    order = [3, 4, 5, 6, 7, 8, 0, 1, 2, 9, 10]  # the absent object between them, the crop stays
    torch.testing.assert_close(board.penalty(two[:, order]), board.penalty(two))


def test_removed_and_put_back() -> None:
    board = make_board()
    (before,) = priced(board, [ITEMS])
    for i in range(3):
        again = (*without(ITEMS, i), ITEMS[i])
        (after,) = priced(board, [again])
        assert after == pytest.approx(before, rel=1e-5)


def test_the_bound_by_hand() -> None:
    """Every timestep once is the whole sum; each term from the schedule, layout by layout."""
    found = make_penalty(FORMAT, probes=3)
    v, schedule = TABLE[pairs(1, 4)], found.prior.schedule
    snr = (schedule.a / schedule.s).double().square()
    losses = found.prior.losses(v, found.timesteps, found.noises)
    expected = torch.zeros(4)
    for k, t in enumerate(found.timesteps.tolist()):
        squares = losses[:, k] * found.noises[0].numel()
        expected += 1000 / 3 * 0.5 * float(snr[t - 1] / snr[t] - 1) * squares
    torch.testing.assert_close(found(v), 0.5 * expected, rtol=1e-4, atol=0)


def test_the_weight_times_the_surprise() -> None:
    found, tokens = make_penalty(FORMAT), pairs(1, 4)
    expected = 0.5 * found.prior.surprise(tokens).double()
    torch.testing.assert_close(found.of_tokens(tokens), expected)


def test_an_object_of_any_class() -> None:
    """Its class neither counts nor tells anything about the others; its box does."""
    board = make_board()
    any_class = (*ITEMS[:2], ITEMS[2]._replace(class_id=ANY))
    (price,), (known,) = board.price([any_class]), board.price([ITEMS])
    tokens = board.layout_format.projection(board.table)(board.conditions([ITEMS]))[1]
    tokens[0, 6] = -1
    assert float(price) == pytest.approx(float(board.penalty.of_tokens(tokens)))
    assert float(price) != pytest.approx(float(known))


def test_probes() -> None:
    """A shorter list has the beginning of a longer one's timesteps, spread over all."""
    short, long = (make_penalty(probes=k) for k in (5, 16))
    assert torch.equal(long.timesteps[:5], short.timesteps)
    assert long.timesteps.sort().values.diff().max() < 1000 / 16 * 2
    assert torch.equal(make_penalty(seed=0).noises, make_penalty(seed=0).noises)
    assert not torch.equal(make_penalty(seed=0).noises, make_penalty(seed=1).noises)
    assert long.noises.shape == (16, CROPPED.n_slots, 8)
    # Neither equal from probe to probe, nor in the three roles of an object.
    assert len(long.noises[:, :3, 0].unique()) == 48


def test_in_parts(monkeypatch) -> None:
    board = make_board()
    v = board.conditions([ITEMS[:n] for n in range(4)] * 3)
    whole = board.penalty(v)
    monkeypatch.setattr(penalty, "ROWS", 12)  # two layouts of five probes
    torch.testing.assert_close(board.penalty(v), whole)
    assert board.penalty(v[:0]).shape == (0,)
    layouts = [ITEMS[:n] for n in range(4)] * 3
    monkeypatch.setattr(penalty, "ROWS", 2048)
    whole = board.price(layouts)
    monkeypatch.setattr(penalty, "ROWS", 25)  # two layouts of eleven slots
    torch.testing.assert_close(board.price(layouts), whole)


def test_gradient_is_that_of_finite_differences() -> None:
    form = LayoutFormat.compact(("a",), max_objects=2, grid=3, crop=True)
    table = torch.randn(form.vocabulary_size, 4, generator=torch.Generator().manual_seed(2))
    found = LayoutPenalty(make_prior(form, table).double(), 3.0, 3, form)
    v = torch.randn(2, form.n_slots, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(found, v)


def test_identity() -> None:
    found = make_penalty().identity()
    assert found == make_penalty().identity()
    assert (found["weight"], found["probes"]) == (0.5, 5)
    other = make_penalty()
    other.prior.object_in.weight.mul_(1.01)
    assert other.identity()["weights"] != found["weights"]


def test_fits() -> None:
    prior = make_prior()
    assert fits(prior, FORMAT, TABLE)
    assert not fits(prior, CROPPED, TABLE) and not fits(prior, FORMAT, TABLE + 0.1)
    assert not fits(LayoutPrior(FORMAT.to_dict(), width=32, layers=1, heads=2), FORMAT, TABLE)


@pytest.mark.parametrize(("weight", "probes"), [(0.0, 4), (-1.0, 4), (float("nan"), 4), (1.0, 0)])
def test_bad_settings(weight: float, probes: int) -> None:
    with pytest.raises(ModelError, match="a weight above 0 and 1 probe at least"):
        LayoutPenalty(make_prior(), weight, probes, FORMAT)
