"""``auto``: enumeration's answer for less, whatever the gradient says, within a budget."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest
import torch
from search_problems import GRADIENTS, Problem, drive, random_problem
from toy_model import ToyModel

from dive_fast import DiffusionClassifier, DiveFastError
from dive_fast.core.probes import low_discrepancy_probes
from dive_fast.core.requests import Features, Gradients, Losses
from dive_fast.core.vocabulary import Vocabulary
from dive_fast.data.digits import load_digits
from dive_fast.strategies import Auto, Task
from dive_fast.strategies.elimination import growing_looks


def noisy(means: torch.Tensor, k: int, says: torch.Tensor | None = None) -> Problem:
    """Class means with little noise, and a gradient that says ``says`` of the classes."""
    generator = torch.Generator().manual_seed(0)
    losses = means[:, None] + 0.02 * torch.randn(len(means), k, generator=generator)
    says = means if says is None else says
    return Problem(losses, says.expand(-(-k // 2), -1), torch.zeros(k))


def test_on_the_toy_it_agrees_with_enumeration_for_a_fraction():
    model = ToyModel(n_classes=60, spread=0.6)
    x0, _ = model.toy.sample(60, torch.Generator().manual_seed(3))
    classifier = DiffusionClassifier(model)
    full = classifier(latents=x0, strategy="enumerate", probes=100)
    auto = classifier(latents=x0, strategy="auto", probes=100)
    assert sum(a.index == b.index for a, b in zip(full, auto, strict=True)) >= 59
    assert sum(a.evaluations for a in auto) < 0.2 * sum(a.evaluations for a in full)


@pytest.mark.parametrize("p", [0.8, 0.95])
@pytest.mark.parametrize("c", [10, 60])
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_answers_are_enumerations_as_often_as_promised(p, c, gradient):
    """100 made-up images. Noise for a gradient keeps the best of many classes out too often."""
    short = 0.2 if (gradient, c, p) == ("useless", 60, 0.8) else 0.0
    generator, agree, cost, n = torch.Generator().manual_seed(1), 0, 0, 100
    for _ in range(n):
        problem = random_problem(c, 100, generator, gradient)
        answer, evaluations, _ = drive(Auto(min_agreement=p), problem)
        agree += answer.index == problem.best
        cost += evaluations
    assert agree / n >= p - short - 2.5 * (p * (1 - p) / n) ** 0.5
    assert cost < 0.3 * n * c * 100


def test_of_two_candidates_three_units_tell_little_of_their_variance():
    """The first three differences 1.0, 1.2, 0.8 lie 8.9 standard errors from 0, the mean below 0.

    Of a normal variable that would be far beyond z(3) = 2.83; of Student's t with two degrees of
    freedom it is not: the same tail lies behind 14.6.
    """
    by_unit = torch.tensor([1.0, 1.2, 0.8, *[-0.2] * 47])
    losses = torch.stack([torch.zeros(100), by_unit.repeat_interleave(2)])
    problem = Problem(losses, torch.zeros(50, 2), torch.zeros(100))
    answer, cost, _ = drive(Auto(min_agreement=0.99), problem)
    assert problem.best == answer.index == 1
    assert cost > 12
    # What is clear still stops early.
    clear = Problem(losses[:, :6].repeat(1, 10) + 0.1 * torch.eye(2)[:, :1], *problem_rest(30))
    answer, cost, _ = drive(Auto(min_agreement=0.99), clear)
    assert clear.best == answer.index == 0 and cost < 40


def problem_rest(units: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A gradient of two classes that says nothing."""
    return torch.zeros(units, 2), torch.zeros(2 * units)


def test_a_budget_is_kept_and_more_of_it_agrees_more_often():
    generator = torch.Generator().manual_seed(3)
    problems = [random_problem(20, 60, generator) for _ in range(60)]
    agree = []
    for budget in (8, 40, 160, None):
        found = [drive(Auto(budget=budget), problem) for problem in problems]
        assert all(cost <= (budget or 20 * 60) for _, cost, _ in found)
        pairs = zip(found, problems, strict=True)
        agree.append(sum(answer.index == problem.best for (answer, _, _), problem in pairs))
    assert agree[0] < agree[1] < agree[2] <= agree[3] + 2
    assert agree[3] >= 54


def test_a_budget_counts_prompts():
    model = ToyModel(n_classes=12)
    rows = model.toy.table.reshape(4, -1)  # four answers of three prompts
    vocabulary = Vocabulary(rows, list("abcd"), parts=3)
    probes = low_discrepancy_probes(40, 1000, model.latent_shape)
    with pytest.raises(DiveFastError, match="at least 8 for each of 3 prompts of a class, got 23."):
        next(Auto(budget=23).search(Task(vocabulary, probes)))
    model.vocabulary = vocabulary
    x0, _ = model.toy.sample(4, torch.Generator().manual_seed(0))
    for budget in (24, 90):
        for answer in DiffusionClassifier(model)(latents=x0, strategy=Auto(budget=budget)):
            assert 0 < answer.evaluations <= budget
            assert answer.n_probes[answer.index] > 0


@pytest.mark.parametrize("kind", ["perfect", "backwards", "nan"])
def test_a_head_spares_work_and_a_bad_one_harms_little(kind):
    """The features are the scores themselves; the head says that its first two held 99%."""
    generator = torch.Generator().manual_seed(7)
    agree = cost = plain = 0
    for _ in range(40):
        problem = random_problem(12, 60, generator)
        scores = -problem.losses.mean(dim=1)
        scores = {"perfect": scores, "backwards": -scores, "nan": scores * torch.nan}[kind]
        head = ReadsScores()
        answer, evaluations, requests = drive(Auto(), problem, scores, head=head)
        assert sum(isinstance(r, Features) for r in requests) == 1
        agree += answer.index == problem.best
        cost += evaluations
        plain += drive(Auto(), problem)[1]
        if kind == "perfect":
            assert not any(isinstance(r, Gradients) for r in requests)
    if kind == "perfect":
        assert agree >= 34 and cost < 0.7 * plain
    if kind == "nan":
        assert agree >= 34 and cost == plain + 40


@dataclass(frozen=True)
class ReadsScores:
    """What ``auto`` reads of a head."""

    layer: str = "scores"
    pool: str = "mean"
    timestep: int = 500
    recall: tuple[float, ...] = (0.9, 0.99)

    def read(self, features: torch.Tensor) -> torch.Tensor:
        return features


def test_losses_are_lowest_at_the_answer_and_order_the_measured():
    generator = torch.Generator().manual_seed(4)
    for k in (5, 40, 41):
        for c in (2, 5, 30):
            problem = random_problem(c, k, generator)
            for budget in (None, 30):
                answer, _, requests = drive(Auto(budget=budget), problem)
                measured = answer.n_probes > 0
                assert measured[answer.index]
                assert int(answer.losses.nan_to_num(torch.inf).argmin()) == answer.index
                assert torch.equal(answer.losses.isfinite(), measured)
                asked = torch.zeros(c, k)
                for request in requests:
                    if isinstance(request, Losses):
                        asked[request.conditions[:, None], request.probe_ids] += 1
                assert asked.max() <= 1, "nothing is measured twice"
                assert torch.equal(asked.sum(dim=1).long(), answer.n_probes)


def test_a_good_gradient_keeps_most_classes_out():
    answer, _, requests = drive(Auto(), noisy(torch.linspace(1, 2, 12), 100))
    assert answer.index == 0
    assert int((answer.n_probes > 0).sum()) < 12
    assert isinstance(requests[0], Gradients) and requests[0].relaxed


@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf])
def test_without_a_gradient_every_class_is_measured(value):
    problem = noisy(torch.linspace(2, 1, 12), 100, torch.full((12,), value))
    answer, _, _ = drive(Auto(), problem)
    assert answer.index == 11
    assert bool((answer.n_probes > 0).all())


def test_a_gradient_that_points_the_wrong_way_does_not_decide():
    means = torch.linspace(1, 2, 16)
    answer, _, _ = drive(Auto(), noisy(means, 100, -means))
    assert answer.index == 0


def test_single_probes_may_be_units():
    generator, agree = torch.Generator().manual_seed(6), 0
    for _ in range(40):
        problem = random_problem(12, 60, generator, unit=1)
        agree += drive(Auto(), problem)[0].index == problem.best
    assert agree >= 34


def test_neither_batch_nor_order_nor_other_images_matter():
    model = ToyModel(n_classes=20, spread=0.6)
    x0, _ = model.toy.sample(9, torch.Generator().manual_seed(5))
    classifier = DiffusionClassifier(model)
    expected = classifier(latents=x0, strategy="auto")
    for batch_size, order in ((1, range(9)), (7, range(8, -1, -1)), (64, (4,))):
        classifier.batch_size = batch_size
        found = classifier(latents=x0[list(order)], strategy="auto")
        for i, answer in zip(order, found, strict=True):
            assert answer.index == expected[i].index
            assert answer.evaluations == expected[i].evaluations
            assert torch.equal(answer.n_probes, expected[i].n_probes)


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
    problem = noisy(torch.tensor([1.0, 1.3, 2.0, 2.0, 2.0, 2.0]), 60)
    prior = torch.tensor([0, 0.6, 0, 0, 0, 0], dtype=torch.float64)
    assert drive(Auto(), problem, log_prior=prior)[0].index == 1
    prior = torch.tensor([-torch.inf, 0, 0, 0, 0, 0], dtype=torch.float64)
    answer = drive(Auto(), problem, log_prior=prior)[0]
    assert answer.index == 1 and answer.n_probes[0] == 0


@pytest.mark.parametrize(("n_classes", "k"), [(1, 10), (2, 1), (2, 2), (3, 7), (5, 24), (7, 25)])
def test_few_classes_and_few_probes(n_classes, k):
    problem = noisy(torch.linspace(2, 1, n_classes), k, torch.zeros(n_classes))
    answer, _, _ = drive(Auto(), problem)
    assert answer.index == n_classes - 1
    assert answer.n_probes.max() <= k


def test_looks_grow_to_the_end():
    assert growing_looks(8, 1.5, 100) == (8, 12, 18, 27, 40, 60, 90, 100)
    assert growing_looks(8, 1.5, 8) == (8,)
    assert growing_looks(8, 1.5, 3) == (3,)
    assert growing_looks(2, 1.01, 6) == (2, 3, 4, 5, 6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_agreement": 1.0}, "min_agreement must lie between 0 and 1, got 1.0."),
        ({"min_agreement": 0.0}, "min_agreement must lie between 0 and 1, got 0.0."),
        ({"budget": 7}, "budget must be at least 8, got 7."),
        ({"shortlist": 0}, "shortlist must be at least 1, got 0."),
        ({"gradient_probes": -1}, "gradient_probes must be at least 0, got -1."),
        ({"first_gradient": 0}, "first_gradient must be at least 1, got 0."),
        ({"final_probes": 0}, "final_probes must be at least 1, got 0."),
        ({"growth": 1.0}, "growth must be greater than 1, got 1.0."),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(DiveFastError, match=f"^{re.escape(message)}$"):
        Auto(**settings)


@pytest.mark.parametrize("budget", [8, 9, 12, 16, 20, 25, 40])
def test_a_small_budget_of_a_fitted_model_answers_with_losses(budget):
    classifier = DiffusionClassifier.from_pretrained("digits")
    answers = classifier(load_digits("test").images[:24], probes=50, budget=budget)
    for answer in answers:
        assert answer.evaluations <= budget
        assert bool(answer.losses[answer.index].isfinite())
        assert answer.index == int(answer.losses.nan_to_num(torch.inf).argmin())
