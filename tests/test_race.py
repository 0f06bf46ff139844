"""The race: its guarantee by simulation on the analytic toy, and its rules on made-up losses."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from toy_model import ToyModel

from dive_fast import DiffusionClassifier, DiveFastError
from dive_fast.core.probes import low_discrepancy_probes
from dive_fast.core.requests import Losses
from dive_fast.strategies import Race, Task
from dive_fast.strategies.elimination import PairedTest, student_t_quantile
from dive_fast.strategies.race import looks_every


@lru_cache
def task(n_classes, k):
    model = ToyModel(n_classes=n_classes)
    return Task(model.vocabulary, low_discrepancy_probes(k, 1000, model.latent_shape))


def drive(strategy, losses, log_prior=None, unit=2):
    """Runs one search on a known loss matrix [C, K]."""
    given = task(*losses.shape)
    given = replace(given, log_prior=log_prior, probes=replace(given.probes, unit=unit))
    search = strategy.search(given)
    reply, asked = None, 0
    while True:
        try:
            request = search.send(reply)
        except StopIteration as stop:
            return stop.value, asked
        assert isinstance(request, Losses)
        reply = losses[request.conditions][:, request.probe_ids]
        asked += reply.numel()


def test_the_best_class_is_dropped_no_more_often_than_promised():
    """Random losses around means that lie close together, 1,000 races at error = 0.2.

    The best class is the one that enumeration over the same 80 probes would answer.
    """
    generator = torch.Generator().manual_seed(0)
    error, dropped, spared = 0.2, 0, 0
    for _ in range(1000):
        means = 0.05 * torch.rand(5, 1, generator=generator)
        common = torch.randn(1, 80, generator=generator)
        losses = means + common + 0.1 * torch.randn(5, 80, generator=generator)
        answer, asked = drive(Race(error=error, round_probes=5), losses)
        dropped += answer.index != int(losses.mean(dim=1).argmin())
        spared += 5 * 80 - asked
    # The union bound is loose: what is seen must stay below it, and the race must really race.
    assert dropped / 1000 <= error
    assert spared / 1000 > 20


def paired_losses(n_classes: int, k: int, generator: torch.Generator) -> torch.Tensor:
    """Of each pair the second has what the first has of noise with the other sign, nearly."""
    means = 0.05 * torch.rand(n_classes, 1, generator=generator)
    common = torch.randn(1, k, generator=generator)
    first = 0.3 * torch.randn(n_classes, k // 2, 1, generator=generator)
    own = 0.05 * torch.randn(n_classes, k // 2, 2, generator=generator)
    return means + common + (own + first * torch.tensor([1.0, -1.0])).flatten(1)


def test_pairs_as_units_keep_the_promise_and_single_probes_would_cost_more():
    """500 races at error = 0.2 whose noise nearly cancels within a pair."""
    generator = torch.Generator().manual_seed(8)
    race, dropped, costs = Race(error=0.2, round_probes=6), 0, {1: 0, 2: 0}
    for _ in range(500):
        losses = paired_losses(5, 80, generator)
        best = int(losses.mean(dim=1).argmin())
        answer, asked = drive(race, losses)
        dropped += answer.index != best
        costs[2] += asked
        costs[1] += drive(race, losses, unit=1)[1]
    assert dropped / 500 <= 0.2
    assert costs[2] < 0.7 * costs[1]
    assert costs[2] < 0.7 * 500 * 5 * 80


def test_the_margin_is_that_of_the_pairs_means():
    generator = torch.Generator().manual_seed(9)
    d = torch.randn(3, 7, generator=generator)
    test = PairedTest(tail=0.05, n_probes=20, unit=2)
    # Three whole pairs of seven; t_2(0.95) = 2.91999 of published tables.
    for row, margin in zip(d.double(), test.margin(d), strict=True):
        pairs = [(row[i] + row[i + 1]).item() / 2 for i in (0, 2, 4)]
        mean = sum(pairs) / 3
        variance = sum((x - mean) ** 2 for x in pairs) / 2
        assert margin.item() == pytest.approx(2.91999 * (variance * (1 - 6 / 20) / 3) ** 0.5, 1e-5)
    assert test.margin(d[:, :3]).isinf().all(), "one pair has no variance"
    assert test.margin(d[:, :1]).isinf().all()
    assert (PairedTest(0.05, 7, 2).margin(d) == 0).all(), "all were measured"


@pytest.mark.parametrize(
    ("arguments", "looks"),
    [
        ((20, 10, 50, 2), (20, 30, 40, 50)),
        ((5, 5, 21, 2), (6, 10, 16, 20, 21)),
        ((5, 1, 9, 4), (8, 9)),
        ((3, 3, 12, 1), (3, 6, 9, 12)),
        ((5, 5, 5, 2), (5,)),
        ((20, 10, 7, 2), (7,)),
    ],
)
def test_looks_are_whole_units(arguments, looks):
    assert looks_every(*arguments) == looks


def test_a_race_asks_for_whole_pairs():
    losses = torch.rand(4, 41, generator=torch.Generator().manual_seed(3)) * 1e-3
    losses = losses + torch.tensor([0.0, 0.0, 1e-3, 2e-3])[:, None]
    answer, _ = drive(Race(min_probes=3, round_probes=3, error=0.3), losses)
    measured = set(answer.n_probes.tolist())
    assert all(n % 2 == 0 or n == 41 for n in measured) and len(measured) > 1


def test_on_the_toy_it_agrees_with_enumeration_for_less():
    model = ToyModel(n_classes=12, spread=0.6)
    x0, _ = model.toy.sample(80, torch.Generator().manual_seed(3))
    classifier = DiffusionClassifier(model)
    full = classifier(latents=x0, strategy="enumerate", probes=200)
    race = classifier(latents=x0, strategy="race", probes=200)
    agree = sum(a.index == b.index for a, b in zip(full, race, strict=True))
    assert agree >= 79
    assert sum(a.evaluations for a in race) < 0.5 * sum(a.evaluations for a in full)
    # The best by the closed form leaves as rarely as promised.
    index = torch.arange(12)
    expected = model.toy.expected_loss(x0, index, model.schedule.a, model.schedule.s).mean(dim=2)
    traced = classifier(latents=x0, strategy="race", probes=200, trace=True)
    kept = [int(e.argmin()) in a.trace["left"][-1] for e, a in zip(expected, traced, strict=True)]
    assert sum(kept) >= 79


def test_common_noise_does_not_hide_a_paired_difference():
    generator = torch.Generator().manual_seed(1)
    common = 100 * torch.randn(1, 60, generator=generator)
    losses = common + torch.tensor([[0.0], [0.5], [0.5]])
    losses = losses + 0.1 * torch.randn(3, 60, generator=generator)
    answer, asked = drive(Race(), losses)
    assert answer.index == 0
    assert asked == 3 * 20, "all rivals leave at the first look"
    torch.testing.assert_close(
        answer.losses[1] - answer.losses[0], torch.tensor(0.5), atol=0.1, rtol=0
    )


def test_equal_classes_both_stay_and_the_lowest_index_wins():
    losses = torch.rand(1, 40, generator=torch.Generator().manual_seed(0)).expand(3, 40)
    answer, asked = drive(Race(), losses)
    assert answer.index == 0 and asked == 3 * 40
    assert answer.trace["left"][-1] == [0, 1, 2]


def test_a_class_that_is_worse_everywhere_by_the_same_amount_leaves():
    losses = torch.tensor([[1.0], [0.5]]).expand(2, 40)
    answer, asked = drive(Race(), losses)
    assert answer.index == 1 and asked == 2 * 20


@pytest.mark.parametrize("k", [1, 2, 19, 20, 21])
def test_few_probes(k):
    losses = torch.rand(4, k, generator=torch.Generator().manual_seed(k))
    answer, asked = drive(Race(), losses)
    assert answer.n_probes.max() == k
    assert asked <= 4 * k


def test_student_t_against_published_values():
    # Tables of the t distribution, one-sided.
    for p, degrees, value in [
        (0.95, 1, 6.3138),
        (0.99, 2, 6.9646),
        (0.995, 3, 5.8409),
        (0.9, 4, 1.5332),
        (0.975, 19, 2.0930),
        (0.999, 19, 3.5794),
        (0.9995, 29, 3.6594),
        (0.999, 60, 3.2317),
    ]:
        assert student_t_quantile(p, degrees) == pytest.approx(value, abs=6e-5)


def test_bad_settings():
    for settings, message in [
        ({"error": 0.0}, "error must lie between 0 and 1, got 0.0"),
        ({"error": 1.5}, "error must lie between 0 and 1, got 1.5"),
        ({"min_probes": 1}, "min_probes must be at least 2, got 1"),
        ({"round_probes": 0}, "round_probes must be at least 1, got 0"),
    ]:
        with pytest.raises(DiveFastError, match=message):
            Race(**settings)


def test_stages_keep_the_lowest_means_and_end_with_their_samples():
    generator = torch.Generator().manual_seed(2)
    losses = torch.arange(6.0)[:, None] + torch.randn(6, 40, generator=generator)
    answer, asked = drive(Race(stages=((5, 3), (12, 2), (30, 1))), losses)
    assert asked == 6 * 5 + 3 * 7 + 2 * 18
    first = losses[:, :5].mean(dim=1).argsort()[:3]
    assert answer.trace["left"][0] == sorted(first.tolist())
    second = first[losses[first, :12].mean(dim=1).argsort()[:2]]
    assert answer.trace["left"][1] == sorted(second.tolist())
    assert answer.index == int(second[losses[second, :30].mean(dim=1).argmin()])
    # The finalists were measured alike; the others were given up, and say so.
    assert sorted((~answer.bound.isfinite()).nonzero()[:, 0].tolist()) == sorted(second.tolist())


def test_bounds_hold_as_often_as_promised():
    """Over 600 races the true difference over all probes lies above nearly every bound."""
    generator = torch.Generator().manual_seed(5)
    broken, bounds, close = 0, 0, 0
    for _ in range(600):
        means = 0.2 * torch.rand(4, 1, generator=generator)
        losses = means + 0.1 * torch.randn(4, 60, generator=generator)
        answer, _ = drive(Race(error=0.1, round_probes=5), losses)
        full = losses.mean(dim=1) - losses[answer.index].mean()
        known = answer.bound.isfinite()
        bounds += int(known.sum())
        broken += int((answer.bound[known] > full[known]).sum())
        close += int((answer.bound[known] > full[known] - 0.1).sum())
    assert bounds > 600
    assert broken / bounds <= 0.1
    assert close / bounds > 0.5, "a bound that is far off says nothing"


def test_a_prior_counts_before_classes_leave():
    generator = torch.Generator().manual_seed(6)
    losses = torch.tensor([[0.0], [0.3], [1.0]]) + 0.01 * torch.randn(3, 40, generator=generator)
    assert drive(Race(), losses)[0].index == 0
    favoured = torch.tensor([0.0, 0.5, 0.5], dtype=torch.float64)
    answer, asked = drive(Race(), losses, favoured)
    assert answer.index == 1 and asked == 3 * 20
    impossible = torch.tensor([-torch.inf, 0.0, 0.0], dtype=torch.float64)
    answer, asked = drive(Race(), losses, impossible)
    assert answer.index == 1 and asked == 2 * 20, "a class of probability zero does not race"


@pytest.mark.parametrize(
    "stages",
    [
        (),
        ((10, 2),),
        ((10, 3), (5, 1)),
        ((10, 1), (20, 1)),
        ((0, 1),),
        (10, 1),
        "10",
        ((10, 1, 1),),
    ],
)
def test_bad_stages(stages):
    with pytest.raises(DiveFastError, match="stages must be pairs"):
        Race(stages=stages)


def test_stages_beyond_the_probes():
    with pytest.raises(DiveFastError, match="the stages take 50 probes, got a list of 40"):
        drive(Race(stages=((50, 1),)), torch.rand(3, 40))
