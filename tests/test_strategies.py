"""Strategies on the analytic toy, where the right answer is known, and their register."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from toy_model import ToyModel

from dive_fast import DiffusionClassifier, DiveFastError, register_preset, register_strategy
from dive_fast.core.probes import low_discrepancy_probes, published_probes
from dive_fast.core.requests import Gradients, Losses, LossesAndGradients
from dive_fast.strategies import (
    DefaultProbes,
    Enumerate,
    Invert,
    Ledger,
    Task,
    preset_names,
    resolve_strategy,
    strategy_names,
)
from dive_fast.strategies import base as register
from dive_fast.strategies.invert import Found


@pytest.fixture(scope="module")
def toy_posterior():
    model = ToyModel(n_classes=12, spread=0.6)
    x0, labels = model.toy.sample(60, torch.Generator().manual_seed(3))
    return model, x0, model.toy.log_posterior(x0)


def test_enumeration_recovers_the_exact_posterior_ranking(toy_posterior):
    model, x0, exact = toy_posterior
    answers = DiffusionClassifier(model)(latents=x0, strategy="enumerate", probes=300)
    found = torch.stack([answer.log_posterior for answer in answers])
    # Pairs of classes of one image that the exact posterior tells apart by a factor of e^2: the
    # rest of the order is within the noise of 300 probes.
    apart = exact[:, :, None] - exact[:, None, :] > 2
    wrong = apart & (found[:, :, None] <= found[:, None, :])
    assert apart.sum() > 3000
    assert wrong.sum() / apart.sum() < 0.003
    clear = exact.topk(2, dim=1).values.diff(dim=1).abs()[:, 0] > 2
    best = torch.tensor([answer.index for answer in answers])
    assert clear.sum() > 30
    assert torch.equal(best[clear], exact.argmax(dim=1)[clear])


@pytest.mark.parametrize(
    ("arguments", "agreement"),
    [
        ({"strategy": "invert", "probes": 100}, 1.0),
        ({"strategy": "invert", "probes": 100, "metric": "cosine"}, 0.9),
        ({"preset": "diffusion-classifier", "n_samples": (25, 100)}, 0.95),
        ({"preset": "dive-paper", "probes": 100, "learning_rate": 0.1}, 0.8),
    ],
)
def test_every_strategy_finds_the_most_probable_class(toy_posterior, arguments, agreement):
    model, x0, exact = toy_posterior
    clear = exact.topk(2, dim=1).values.diff(dim=1).abs()[:, 0] > 3
    x0, truth = x0[clear], exact.argmax(dim=1)[clear]
    answers = DiffusionClassifier(model)(latents=x0, **arguments)
    right = sum(a.index == t for a, t in zip(answers, truth.tolist(), strict=True))
    assert len(truth) > 25 and right / len(truth) >= agreement


def drive(search, table, losses_of, gradient_of, misled=0.0):
    """Answers a search's requests from two functions of embeddings and keeps the requests.

    Losses that come with a gradient are wrong by ``misled`` times noise, and said to be inexact.
    """
    noise = torch.Generator().manual_seed(0)
    requests, reply = [], None
    while True:
        try:
            request = search.send(reply)
        except StopIteration as stop:
            return stop.value, requests
        requests.append(request)
        v = request.conditions if request.relaxed else table[request.conditions]
        losses = losses_of(v, request.probe_ids)
        if isinstance(request, Gradients):
            losses = losses + misled * torch.randn(losses.shape, generator=noise)
            reply = LossesAndGradients(losses, gradient_of(v), exact=misled == 0)
        else:
            reply = losses


def bowl(target):
    """L(v) = |v - target|^2 plus a loss per probe that no condition changes."""

    def losses(v, probe_ids):
        return (v - target).square().sum(1)[:, None] + probe_ids[None, :] * 1.0

    return losses, lambda v: 2 * (v - target)


def task_of(model, k=60):
    return Task(model.vocabulary, low_discrepancy_probes(k, 1000, model.latent_shape))


def met_by(requests):
    """The classes of the gradients after the first, which is at the mean."""
    return [r.conditions.item() for r in requests[1:] if isinstance(r, Gradients)]


def test_invert_measures_every_class_once_and_races_it_with_the_best_estimates(toy_posterior):
    model, *_ = toy_posterior
    table = model.vocabulary.table
    losses, gradient = bowl(table[7] + 0.05)
    answer, requests = drive(Invert().search(task_of(model)), table, losses, gradient)
    assert answer.index == 7
    assert torch.equal(requests[0].conditions[0], model.vocabulary.mean())
    met = met_by(requests)
    assert len(met) == len(set(met)), "a class on fixed probes never changes its loss"
    raced = [r for r in requests if isinstance(r, Losses)]
    # The bowl is a quadratic of one curvature, so that the estimates are the losses.
    order = [c for c in losses(table, torch.arange(1))[:, 0].argsort().tolist() if c not in met]
    assert sorted(raced[0].conditions.tolist()) == sorted(order[:4])
    assert raced[0].probe_ids.tolist() == list(range(12))
    assert int((answer.n_probes > 0).sum()) == len(met) + 4
    assert requests.index(raced[0]) == len(met) + 1, "the race follows the search"


def test_estimates_of_a_quadratic_loss_are_its_losses(toy_posterior):
    model, *_ = toy_posterior
    table, task = model.vocabulary.table, task_of(model)
    losses, gradient = bowl(table[3] * 0.5)
    found, probes = Found(task), torch.arange(5)
    v0 = model.vocabulary.mean()[None]
    found.linearise(v0[0], LossesAndGradients(losses(v0, probes), gradient(v0)))
    for c in (2, 9):
        reply = LossesAndGradients(losses(table[[c]], probes), gradient(table[[c]]))
        found.meet(torch.tensor([c]), probes, reply)
    expected = losses(table, probes).mean(dim=1).double()
    torch.testing.assert_close(found.estimates(), expected, rtol=1e-4, atol=1e-4)
    order = [c for c in expected.argsort().tolist() if c not in (2, 9)]
    assert found.unmet().tolist() == order and found.met().tolist() == [2, 9]


def narrow_valleys(dim, generator):
    """L(v) = (v - target)^T A (v - target) with very unequal curvatures."""
    basis = torch.linalg.qr(torch.randn(dim, dim, generator=generator)).Q
    a = basis @ torch.diag(torch.logspace(-2, 1, dim)) @ basis.T
    target = torch.randn(dim, generator=generator)

    def losses(v, probe_ids):
        d = v - target
        return ((d @ a) * d).sum(1)[:, None] + probe_ids[None, :] * 1.0

    return losses, lambda v: 2 * (v - target) @ a


def test_runners_up_find_what_the_trajectory_passed_by(toy_posterior):
    model, *_ = toy_posterior
    table = model.vocabulary.table
    right = {0: 0, 1: 0, 4: 0}
    for seed in range(40):
        losses, gradient = narrow_valleys(table.shape[1], torch.Generator().manual_seed(seed))
        best = int(losses(table, torch.arange(60)).mean(dim=1).argmin())
        for n in right:
            search = Invert(runners_up=n).search(task_of(model))
            answer, requests = drive(search, table, losses, gradient)
            right[n] += answer.index == best
            measured = int((answer.n_probes > 0).sum()) - len(met_by(requests))
            assert measured >= n if n else measured == 0
            # They enter n at a time, as long as one of those that came last leads.
            assert n == 0 or measured % n == 0 or int((answer.n_probes > 0).sum()) == 12
    assert right[0] < right[1] <= right[4] == 40, right


def test_a_search_on_approximate_losses_compares_measured_ones_only(toy_posterior):
    model, *_ = toy_posterior
    table = model.vocabulary.table
    losses, gradient = bowl(table[7] + 0.05)
    search = Invert().search(task_of(model))
    answer, requests = drive(search, table, losses, gradient, misled=3.0)
    kept = answer.trace["losses"]
    measured = kept.isfinite()
    assert torch.equal(kept[measured], losses(table, torch.arange(60))[measured])
    asked = torch.zeros_like(measured)
    for request in requests:
        if isinstance(request, Losses):
            asked[request.conditions[:, None], request.probe_ids] = True
    assert torch.equal(measured, asked) and asked[met_by(requests), :12].all()
    best = losses(table, torch.arange(1))[:, 0]
    assert best[answer.index] == best[measured.any(dim=1)].min()


def test_invert_races_somebody_where_the_prior_excludes_all_that_were_met(toy_posterior):
    model, *_ = toy_posterior
    table, task = model.vocabulary.table, task_of(model)
    losses, gradient = bowl(table[7] + 0.05)
    _, requests = drive(Invert(runners_up=0).search(task), table, losses, gradient)
    log_prior = torch.zeros(12)
    log_prior[met_by(requests)] = -torch.inf
    excluded = Task(task.vocabulary, task.probes, log_prior=log_prior)
    for n in (0, 4):
        answer, requests = drive(Invert(runners_up=n).search(excluded), table, losses, gradient)
        assert log_prior[answer.index] == 0 and answer.n_probes[answer.index] >= 12


def test_invert_of_an_image_does_not_depend_on_those_beside_it(toy_posterior):
    model, x0, _ = toy_posterior
    classifier = DiffusionClassifier(model)
    together = classifier(latents=x0[:9], strategy="invert")
    for i in (0, 4, 8):
        (alone,) = classifier(latents=x0[i : i + 1], strategy="invert")
        assert alone.index == together[i].index
        assert alone.evaluations == together[i].evaluations
        assert torch.equal(alone.n_probes, together[i].n_probes)


def test_invert_ends_at_a_flat_point(toy_posterior):
    model, *_ = toy_posterior
    flat = lambda v: torch.zeros_like(v)  # noqa: E731
    ones = lambda v, ids: torch.ones(len(v), len(ids))  # noqa: E731
    table = model.vocabulary.table
    answer, requests = drive(Invert(runners_up=0).search(task_of(model)), table, ones, flat)
    assert len(requests) == 2 and answer.n_probes.sum() == 12
    # Nothing tells those that race apart, so that nobody leaves.
    answer, requests = drive(Invert().search(task_of(model)), table, ones, flat)
    assert len(met_by(requests)) == 1 and set(answer.n_probes.tolist()) == {0, 60}


def test_invert_with_one_class():
    model = ToyModel(n_classes=1)
    (answer,) = DiffusionClassifier(model)(latents=torch.zeros(1, 2, 3, 3), strategy="invert")
    assert answer.index == 0 and answer.probability == pytest.approx(1.0)


def test_invert_with_fewer_probes_than_it_searches(toy_posterior):
    model, x0, _ = toy_posterior
    (answer,) = DiffusionClassifier(model)(latents=x0[:1], strategy="invert", probes=3)
    assert answer.n_probes.max() == 3


def test_means_over_different_probes_become_comparable():
    ledger = Ledger(3, 4)
    probes = torch.tensor([1.0, 2.0, 30.0, 40.0])  # what every condition loses on each probe
    ledger.add(torch.tensor([0]), torch.arange(4), probes[None] + 0.1)
    ledger.add(torch.tensor([2]), torch.arange(2), probes[None, :2] + 0.4)
    answer = ledger.answer(0, note=1)
    torch.testing.assert_close(answer.losses[2] - answer.losses[0], torch.tensor(0.3))
    assert answer.losses[1].isnan()
    assert answer.n_probes.tolist() == [4, 0, 2] and answer.trace == {"note": 1}


def test_low_discrepancy_prefixes_cover_the_timesteps_and_are_stable():
    probes = low_discrepancy_probes(63, 1000, (1, 2, 2), seed=5)
    assert len(set(probes.timesteps.tolist())) == 63
    for k in (3, 7, 15, 31):
        gaps = probes.timesteps[:k].sort().values.diff()
        assert gaps.max() - gaps.min() <= 1, "2^n - 1 terms of the sequence are evenly spaced"
    shorter = low_discrepancy_probes(10, 1000, (1, 2, 2), seed=5)
    assert torch.equal(shorter.timesteps, probes.timesteps[:10])
    assert torch.equal(shorter.noise, probes.noise[:10])
    other = low_discrepancy_probes(10, 1000, (1, 2, 2), seed=6)
    assert not torch.equal(shorter.noise, other.noise)


def test_published_probes_are_those_of_the_scripts():
    probes = published_probes(250, 1000, (1, 2, 2))
    assert probes.timesteps.tolist() == list(range(2, 1000, 4))
    torch.manual_seed(42)
    assert torch.equal(probes.noise, torch.randn(1024, 1, 2, 2)[:250])
    with pytest.raises(DiveFastError, match="divides 1000 and is at most 1024, got 30"):
        published_probes(30, 1000, (1, 2, 2))
    with pytest.raises(DiveFastError, match="at least 1, got 0"):
        published_probes(0, 1000, (1, 2, 2))


@dataclass(frozen=True)
class FirstProbe(DefaultProbes):
    """Enumeration on one probe, as somebody outside would write it."""

    name: ClassVar[str] = "first-probe"
    loss: str = "l2"
    probe: int = 0

    def search(self, task):
        classes, probes = torch.arange(len(task.vocabulary)), torch.tensor([self.probe])
        losses = yield Losses(classes, probes)
        ledger = Ledger(len(classes), len(task.probes))
        ledger.add(classes, probes, losses)
        return ledger.answer(int(losses.argmin()))


def test_strategies_and_presets_register_from_outside(toy_posterior, monkeypatch):
    monkeypatch.setattr(register, "_STRATEGIES", dict(register._STRATEGIES))
    monkeypatch.setattr(register, "_PRESETS", dict(register._PRESETS))
    register_strategy("first-probe", FirstProbe())
    register_preset("third-probe", "first-probe", FirstProbe(probe=2))
    assert "first-probe" in strategy_names() and "third-probe" in preset_names()
    model, x0, _ = toy_posterior
    classifier = DiffusionClassifier(model)
    losses = classifier.losses(latents=x0[:4], probes=5)
    for arguments, probe in [
        ({"strategy": "first-probe"}, 0),
        ({"preset": "third-probe"}, 2),
        ({"strategy": FirstProbe(probe=4)}, 4),
        ({"strategy": "first-probe", "probe": 1}, 1),
    ]:
        answers = classifier(latents=x0[:4], probes=5, **arguments)
        assert [a.index for a in answers] == losses[:, :, probe].argmin(dim=1).tolist()
        assert all(a.evaluations == 12 for a in answers)


def test_bad_names_and_settings():
    bad = [
        (("nope", None, {}), "expected a strategy of auto, enumerate, invert, race, got 'nope'"),
        ((None, "nope", {}), "expected a preset of dive-paper, diffusion-classifier, got 'nope'"),
        (("enumerate", "dive-paper", {}), "belongs to strategy 'invert'"),
        ((Enumerate(), "dive-paper", {}), "a strategy object or a preset, got both"),
        (("invert", None, {"stop": 1}), "unknown setting 'stop': Invert has search_probes, step"),
        (("invert", None, {"patience": 0}), "patience must be at least 1, got 0"),
        (("invert", None, {"step": 0.0}), "step must be greater than 0, got 0.0"),
        (("invert", None, {"search_probes": 0}), "search_probes must be at least 1, got 0"),
        (("invert", None, {"runners_up": -1}), "runners_up must be at least 0, got -1"),
        (("invert", None, {"runners_up": 1.5}), "runners_up must be a whole number, got 1.5"),
        (("invert", None, {"error": 0.0}), "error must lie between 0 and 1, got 0.0"),
        (("invert", None, {"error": float("nan")}), "error must lie between 0 and 1, got nan"),
        (("invert", None, {"growth": 1.0}), "growth must be greater than 1, got 1.0"),
    ]
    for arguments, message in bad:
        with pytest.raises(DiveFastError, match=message):
            resolve_strategy(*arguments)
