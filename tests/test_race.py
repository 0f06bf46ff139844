"""The race: its guarantee by simulation on the analytic toy, and its rules on made-up losses."""

from __future__ import annotations

import pytest
import torch
from toy_model import ToyModel

from dive_fast import DiffusionClassifier, DiveFastError
from dive_fast.probes import low_discrepancy_probes
from dive_fast.requests import Losses
from dive_fast.strategies import Race, Task
from dive_fast.strategies.race import student_t_quantile


def drive(strategy, losses):
    """Runs one search on a known loss matrix [C, K]; every class is its own row of the table."""
    model = ToyModel(n_classes=len(losses))
    probes = low_discrepancy_probes(losses.shape[1], 1000, model.latent_shape)
    search, reply, asked = strategy.search(Task(model.vocabulary, probes)), None, 0
    while True:
        try:
            request = search.send(reply)
        except StopIteration as stop:
            return stop.value, asked
        assert isinstance(request, Losses)
        rows = model.vocabulary.nearest(request.conditions)
        reply = losses[rows][:, request.probe_ids]
        asked += reply.numel()


def test_the_best_class_is_dropped_no_more_often_than_promised():
    """Random losses around means that lie close together, 1,500 races at error = 0.2."""
    generator = torch.Generator().manual_seed(0)
    error, dropped, spared = 0.2, 0, 0
    for _ in range(1500):
        means = 0.05 * torch.rand(5, 1, generator=generator)
        common = torch.randn(1, 80, generator=generator)
        losses = means + common + 0.1 * torch.randn(5, 80, generator=generator)
        answer, asked = drive(Race(error=error, round_probes=5), losses)
        dropped += int(means.argmin()) not in answer.trace["left"][-1]
        spared += 5 * 80 - asked
    # The union bound is loose: what is seen must stay below it, and the race must really race.
    assert dropped / 1500 <= error
    assert spared / 1500 > 20


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
        (0.975, 19, 2.0930),
        (0.999, 19, 3.5794),
        (0.9995, 29, 3.6594),
        (0.999, 60, 3.2317),
    ]:
        assert student_t_quantile(p, degrees) == pytest.approx(value, abs=2e-4)


def test_bad_settings():
    for settings, message in [
        ({"error": 0.0}, "error must lie between 0 and 1, got 0.0"),
        ({"error": 1.5}, "error must lie between 0 and 1, got 1.5"),
        ({"min_probes": 1}, "min_probes must be at least 2, got 1"),
        ({"round_probes": 0}, "round_probes must be at least 1, got 0"),
    ]:
        with pytest.raises(DiveFastError, match=message):
            Race(**settings)
