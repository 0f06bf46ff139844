"""Gaps and standard errors of every class: closed forms, and coverage by simulation."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from search_problems import Problem, random_problem

from dive_fast.core.shortlist import Shortlist
from dive_fast.strategies.evidence import PRIOR_UNITS, Evidence


def seen(problem: Problem, measured: dict[int, int], looked: int = 0, shortlist=None) -> Evidence:
    """Evidence with so many units of each class, and of the gradient."""
    evidence = Evidence(problem.task(shortlist=shortlist))
    if looked:
        g = problem.gradients[:looked].double()
        slopes = (g - g.mean(dim=1, keepdim=True)).T
        evidence.add_gradients(problem.base[evidence.probes(0, looked)], slopes)
    for c, units in measured.items():
        losses = problem.losses[[c]][:, evidence.probes(0, units)]
        evidence.add_losses(np.array([c]), units, losses)
    return evidence


@pytest.fixture
def problem() -> Problem:
    return random_problem(5, 24, torch.Generator().manual_seed(0))


def test_direct_means_and_moderated_variances(problem):
    """No gradient: s^2 = (4 pool + (n - 1) own) / (4 + n - 1), the error s sqrt(1/n - 1/U)."""
    n, units = 5, 12
    gap, error = seen(problem, dict.fromkeys(range(5), n)).against(2)
    d = (problem.losses - problem.losses[2]).double().numpy()[:, : 2 * n]
    pairs = (d[:, ::2] + d[:, 1::2]) / 2
    mean, own = pairs.mean(axis=1), pairs.var(axis=1, ddof=1)
    pool = own[[0, 1, 3, 4]].mean()
    moderated = (PRIOR_UNITS * pool + (n - 1) * own) / (PRIOR_UNITS + n - 1)
    expected = np.sqrt(moderated * (1 / n - 1 / units))
    expected[2] = 0
    assert gap == pytest.approx(mean, abs=1e-6) and error == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("k", [24, 25, 1])
@pytest.mark.parametrize("unit", [1, 2])
def test_all_units_leave_no_doubt(k, unit):
    problem = random_problem(5, k, torch.Generator().manual_seed(1), unit=unit)
    units = -(-k // unit)
    standing = seen(problem, dict.fromkeys(range(5), units), min(4, units)).standing()
    full = problem.losses.double().mean(dim=1).numpy()
    assert standing.leader == problem.best
    assert standing.gap == pytest.approx(full - full.min(), abs=1e-6)
    assert standing.error == pytest.approx(np.zeros(5), abs=1e-9)


@pytest.mark.parametrize("error", [0.0, 1e6])
def test_what_was_fitted_is_all_or_nothing_by_its_error(problem, error):
    curvature = (0.1, 0.4, -0.2, 0.0, 0.3)
    fitted = Shortlist(1.25, curvature, error, 0.8, "x")
    gap, _ = seen(problem, dict.fromkeys(range(5), 3), 8, fitted).against(1)
    g = problem.gradients[:8].double().numpy().T
    e = g - g[1]
    d = (problem.losses - problem.losses[1]).double().numpy()[:, :6]
    pairs = (d[:, ::2] + d[:, 1::2]) / 2
    learned = 1.25 * e.mean(axis=1) + np.array(curvature) - curvature[1]
    control = (pairs - 0.8 * e[:, :3]).mean(axis=1) + 0.8 * e.mean(axis=1)
    assert gap == pytest.approx(control if error else learned, abs=1e-5)


@pytest.mark.parametrize("unit", [1, 2])
def test_the_control_variate_is_unbiased_and_its_errors_cover(unit):
    """z = (gap - truth) / error over 300 images, whatever the gradient says."""
    for kind in ("informative", "useless", "backwards"):
        generator, z = torch.Generator().manual_seed(2), []
        for _ in range(300):
            problem = random_problem(5, 48, generator, kind, unit)
            # A wide error: what was fitted says nothing.
            fitted = Shortlist(1.0, (0.0,) * 5, 1e6, 0.7, "x")
            gap, error = seen(problem, dict.fromkeys(range(5), 6), 12, fitted).against(0)
            full = problem.losses.double().mean(dim=1).numpy()
            z.extend((gap - (full - full[0]))[1:] / error[1:])
        z = np.array(z)
        assert abs(z.mean()) < 0.2
        assert (np.abs(z) < 2).mean() >= 0.87  # 6 units tell their variance roughly


def test_a_bad_gradient_is_found_out_by_what_was_measured():
    """Regressed on six classes of twelve, the slope is near 1, and near -1 of a backward one."""
    for kind, low, high in (("informative", 0.5, 1.3), ("backwards", -1.3, -0.5)):
        generator, slopes = torch.Generator().manual_seed(3), []
        for _ in range(50):
            problem = random_problem(12, 48, generator, kind)
            evidence = seen(problem, dict.fromkeys(range(6), 6), 12)
            slope, _, error = evidence.correction()
            slopes.append(slope)
            assert (error > 0).all() and error.shape == (12,)
        assert low < np.mean(slopes) < high


def test_without_enough_measured_nothing_is_said_of_the_others(problem):
    evidence = seen(problem, {0: 4, 1: 4}, 8)
    gap, _ = evidence.against(0)
    assert np.isinf(gap[2:]).all() and np.isfinite(gap[:2]).all()
    assert dataclasses.is_dataclass(evidence.standing())
