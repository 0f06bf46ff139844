"""``auto``: enumeration's answer for less, and the race where the gradient says nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from toy_model import ToyModel

from dive_fast import DiffusionClassifier, DiveFastError
from dive_fast.core.probes import low_discrepancy_probes
from dive_fast.core.requests import Gradients, Losses, LossesAndGradients
from dive_fast.strategies import Auto, Task
from dive_fast.strategies.auto import growing_looks


def task(n_classes: int, k: int) -> Task:
    model = ToyModel(n_classes=n_classes)
    return Task(model.vocabulary, low_discrepancy_probes(k, 1000, model.latent_shape))


def drive(strategy, losses, gradient_at, given=None):
    """Runs one search on a loss matrix [C, K] and made-up gradients.

    ``gradient_at(c)`` gives dL/dv [D] at class c, or at the mean for c = None.
    """
    given = task(*losses.shape) if given is None else given
    search, reply, requests = strategy.search(given), None, []
    while True:
        try:
            request = search.send(reply)
        except StopIteration as stop:
            return stop.value, requests
        requests.append(request)
        if isinstance(request, Losses):
            reply = losses[request.conditions][:, request.probe_ids]
            continue
        c = None if request.relaxed else int(request.conditions)
        seen = losses.mean(dim=0) if c is None else losses[c]
        reply = LossesAndGradients(seen[request.probe_ids][None], gradient_at(c)[None])


def linear(table: torch.Tensor, estimates: torch.Tensor) -> torch.Tensor:
    """A gradient that predicts the given loss for every class (where D >= C allows it)."""
    return torch.linalg.lstsq(table - table.mean(dim=0), estimates[:, None]).solution[:, 0]


def noisy(means: torch.Tensor, k: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return means[:, None] + 0.02 * torch.randn(len(means), k, generator=generator)


def test_on_the_toy_it_agrees_with_enumeration_for_a_fraction():
    model = ToyModel(n_classes=60, spread=0.6)
    x0, _ = model.toy.sample(60, torch.Generator().manual_seed(3))
    classifier = DiffusionClassifier(model)
    full = classifier(latents=x0, strategy="enumerate", probes=100)
    auto = classifier(latents=x0, strategy="auto", probes=100)
    assert sum(a.index == b.index for a, b in zip(full, auto, strict=True)) >= 59
    assert sum(a.evaluations for a in auto) < 0.2 * sum(a.evaluations for a in full)


def test_a_good_gradient_keeps_most_classes_out():
    losses = noisy(torch.linspace(1, 2, 12), 100)
    given = task(12, 100)
    slope = linear(given.vocabulary.table, losses.mean(dim=1))
    answer, requests = drive(Auto(), losses, lambda c: slope, given)
    assert answer.index == 0
    assert int((answer.n_probes > 0).sum()) < 12
    assert isinstance(requests[0], Gradients) and requests[0].relaxed


@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf])
def test_without_a_gradient_every_class_races(value):
    losses = noisy(torch.linspace(2, 1, 12), 100)
    answer, requests = drive(Auto(), losses, lambda c: torch.full((18,), value))
    assert answer.index == 11
    assert bool((answer.n_probes > 0).all())


def test_a_gradient_that_points_the_wrong_way_does_not_decide():
    """The estimates rank the classes backwards: the shortlist widens until the leader is inside."""
    losses = noisy(torch.linspace(1, 2, 16), 100)
    given = task(16, 100)
    backwards = linear(given.vocabulary.table, -losses.mean(dim=1))
    answer, _ = drive(Auto(relinearise=0), losses, lambda c: backwards, given)
    assert answer.index == 0


def test_relinearising_brings_in_a_class_that_the_first_gradient_missed():
    losses = noisy(torch.linspace(1, 2, 16), 100)
    given = task(16, 100)
    table = given.vocabulary.table
    estimates = losses.mean(dim=1).clone()
    estimates[0] = 5.0  # the best class looks hopeless from the mean
    first, second = linear(table, estimates), linear(table, losses.mean(dim=1))
    answer, _ = drive(Auto(relinearise=0), losses, lambda c: first, given)
    assert answer.index == 1
    answer, requests = drive(Auto(), losses, lambda c: first if c is None else second, given)
    assert answer.index == 0
    assert answer.trace["linearised"][0] == 1


def test_a_gradient_at_a_class_is_not_measured_twice():
    losses = noisy(torch.linspace(1, 2, 8), 100)
    given = task(8, 100)
    slope = linear(given.vocabulary.table, losses.mean(dim=1))
    _, requests = drive(Auto(), losses, lambda c: slope, given)
    seen = set()
    for request in requests:
        if request.relaxed:
            continue
        pairs = {(c, k) for c in request.conditions.tolist() for k in request.probe_ids.tolist()}
        if isinstance(request, Losses):
            assert not pairs & seen
        seen |= pairs


def test_more_certainty_costs_more():
    model = ToyModel(n_classes=30, spread=0.5)
    x0, _ = model.toy.sample(40, torch.Generator().manual_seed(4))
    classifier = DiffusionClassifier(model)
    costs = [
        sum(a.evaluations for a in classifier(latents=x0, strategy=Auto(min_agreement=p)))
        for p in (0.8, 0.99, 0.9999)
    ]
    assert costs[0] < costs[1] < costs[2]


def test_a_prior_counts():
    losses = noisy(torch.tensor([1.0, 1.3, 2.0, 2.0, 2.0, 2.0]), 60)
    given = replace(task(6, 60), log_prior=torch.tensor([0, 0.6, 0, 0, 0, 0], dtype=torch.float64))
    slope = linear(given.vocabulary.table, losses.mean(dim=1))
    answer, _ = drive(Auto(), losses, lambda c: slope, given)
    assert answer.index == 1


@pytest.mark.parametrize(("n_classes", "k"), [(1, 10), (2, 1), (2, 2), (3, 7), (5, 24), (7, 25)])
def test_few_classes_and_few_probes(n_classes, k):
    losses = noisy(torch.linspace(2, 1, n_classes), k)
    answer, _ = drive(Auto(), losses, lambda c: torch.ones(18))
    assert answer.index == n_classes - 1
    assert answer.n_probes.max() <= k


def test_looks_grow_to_the_end():
    assert growing_looks(8, 1.5, 100) == (8, 12, 18, 27, 40, 60, 90, 100)
    assert growing_looks(8, 1.5, 8) == (8,)
    assert growing_looks(8, 1.5, 3) == (3,)
    assert growing_looks(2, 1.01, 6) == (2, 3, 4, 5, 6)


def test_bad_settings():
    for settings, message in [
        ({"min_agreement": 1.0}, "min_agreement must lie between 0 and 1, got 1.0"),
        ({"gradient_probes": 0}, "gradient_probes must be at least 1, got 0"),
        ({"first_look": 1}, "first_look must be at least 2, got 1"),
        ({"growth": 1.0}, "growth must be greater than 1, got 1.0"),
        ({"shortlist": 0}, "shortlist must be at least 1, got 0"),
        ({"relinearise": -1}, "relinearise must be at least 0, got -1"),
    ]:
        with pytest.raises(DiveFastError, match=message):
            Auto(**settings)
