"""What generators come to: figures, intervals and tests by hand."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from dive_fast.evaluation.comparison import mcnemar
from dive_fast.evaluation.generator_figures import (
    Estimate,
    Measurements,
    cross_fitted_beta,
    estimates,
    image_figures,
)

_DRAW = np.random.default_rng(0)
TRUTH = _DRAW.integers(0, 3, 21)
LOSSES = _DRAW.normal(0.5, 0.1, (21, 3)).astype(np.float32)
LOSSES[np.arange(21), TRUTH] -= np.float32(0.12)
LOSSES[4, (TRUTH[4] + 1) % 3] = np.nan  # not measured
LOSSES[6] = [0.1, 0.1, 0.5]  # of the right class and another, below
TRUTH[6] = 1


def measurements(losses: np.ndarray = LOSSES, truth: np.ndarray = TRUTH, **changed) -> Measurements:
    n = len(truth)
    found = {
        "ids": [f"i{k}" for k in range(n)],
        "truth": truth,
        "index": np.nanargmin(losses, axis=1),
        "losses": losses,
        "log_likelihood": np.linspace(-3, 5, n),
        "evaluations": np.full(n, 30.0),
        "seconds": np.full(n, 0.5),
    }
    return Measurements(**{**found, **changed})


def beta_of(losses: np.ndarray, truth: np.ndarray) -> float:
    """Of the highest likelihood, with Platt's targets, by plain sums."""
    n = len(truth)

    def cross_entropy(log_beta: float) -> float:
        total = 0.0
        for row, y in zip(losses.astype(float), truth, strict=True):
            known = [c for c in range(len(row)) if not math.isnan(row[c])]
            log_z = math.log(sum(math.exp(-math.exp(log_beta) * row[c]) for c in known))
            for c in known:
                target = (n + 1) / (n + 2) if c == y else 1 / (n + 2) / (len(known) - 1)
                total -= target * (-math.exp(log_beta) * row[c] - log_z)
        return total

    found = minimize_scalar(cross_entropy, bounds=(math.log(1e-3), math.log(1e4)))
    return math.exp(found.x)


def test_rank_margin_and_nll_by_hand() -> None:
    found = image_figures(measurements())
    rank, gap = [], []
    for row, y in zip(LOSSES.astype(float).tolist(), TRUTH.tolist(), strict=True):
        others = [x for c, x in enumerate(row) if c != y and not math.isnan(x)]
        rank.append(1 + sum(x < row[y] for x in others))
        gap.append(min(others) - row[y])
    assert found["rank"].tolist() == rank
    assert (rank[6], gap[6]) == (1, 0) and found["accuracy"][6] == 0  # row 0 is as low
    assert 0.5 < found["accuracy"].mean() < 1
    even, odd = slice(0, None, 2), slice(1, None, 2)
    beta = np.empty(21)
    beta[even], beta[odd] = beta_of(LOSSES[odd], TRUTH[odd]), beta_of(LOSSES[even], TRUTH[even])
    assert cross_fitted_beta(LOSSES, TRUTH) == pytest.approx(beta, rel=1e-3)
    assert found["margin"] == pytest.approx(beta * gap, rel=2e-3, abs=1e-6)
    energy = np.exp(-beta[:, None] * LOSSES.astype(float))
    p = energy[np.arange(21), TRUTH] / np.nansum(energy, axis=1)
    assert found["nll"] == pytest.approx(-np.log(p), rel=2e-3)


def test_the_scale_of_the_losses_does_not_matter() -> None:
    """Generators of another beta compare: margins are in nats."""
    one, other = image_figures(measurements()), image_figures(measurements(LOSSES * 37))
    for name in ("rank", "margin", "nll"):
        assert other[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6)


def test_unlikely_classes_do_not_overflow() -> None:
    losses = np.tile(np.array([[0.0, 1e4, 2e4]], np.float32), (4, 1))
    truth = np.array([0, 0, 0, 1])  # the last is wrong by far
    found = image_figures(measurements(losses, truth))
    assert np.isfinite(found["nll"]).all() and np.isfinite(found["margin"]).all()


def test_a_likelihood_that_is_not_known_is_left_out() -> None:
    assert "log_likelihood" not in image_figures(
        measurements(log_likelihood=np.array([1.0] * 20 + [np.nan]))
    )


def test_one_image_has_no_beta_and_no_interval() -> None:
    found = image_figures(measurements(LOSSES[:1], TRUTH[:1]))
    assert found.keys() == {"accuracy", "rank", "log_likelihood"}
    right = float(np.nanargmin(LOSSES[0]) == TRUTH[0])
    assert estimates(found, 200, 0)["accuracy"] == Estimate(right, None, None)


class TestBootstrap:
    def test_all_resamples_of_five_images(self) -> None:
        """Each of the 3125 ways to draw is as likely: the percentiles of their means."""
        values = np.array([0.0, 1.0, 5.0, 2.3, -1.3])
        means = [np.mean(drawn) for drawn in product(values, repeat=5)]
        found = estimates({"x": values}, 50_000, 0)["x"]
        assert found.value == pytest.approx(1.4)
        low, high = np.quantile(means, [0.025, 0.975])
        assert (found.low, found.high) == pytest.approx((low, high), abs=0.05)

    def test_many_images_as_the_normal_distribution_says(self) -> None:
        values = np.random.default_rng(3).normal(1.0, 2.0, 900)
        found = estimates({"x": values}, 4000, 0)["x"]
        half = 1.96 * values.std() / 30
        assert found.low == pytest.approx(values.mean() - half, abs=0.02)
        assert found.high == pytest.approx(values.mean() + half, abs=0.02)

    def test_figures_share_the_draws(self) -> None:
        """The interval of a sum of two is that of the sum of their means."""
        rng = np.random.default_rng(1)
        a, b = rng.normal(size=(2, 11))
        alone, together = estimates({"a": a}, 300, 5), estimates({"b": b, "a": a}, 300, 5)
        for end in ("value", "low", "high"):
            expected = pytest.approx(getattr(alone["a"], end))
            assert getattr(together["a"], end) == expected
        constant = estimates({"a": a, "less": a - a}, 300, 5)
        assert constant["less"] == Estimate(0.0, 0.0, 0.0)

    def test_nothing(self) -> None:
        assert estimates({}, 100, 0) == {}


def test_mcnemar_by_hand() -> None:
    a = np.array([1, 1, 1, 1, 0, 1, 1], bool)
    b = np.array([0, 0, 0, 0, 1, 1, 1], bool)
    # 4 to 1: at least as far from the middle are 0, 1, 4 and 5 of 5.
    assert mcnemar(a, b) == (4, 1, pytest.approx((1 + 5 + 5 + 1) / 32))
    assert mcnemar(a, a) == (0, 0, 1.0)


def test_rows_in_another_order() -> None:
    found = measurements().take(["i4", "i0"])
    assert found.ids == ["i4", "i0"]
    assert found.truth.tolist() == TRUTH[[4, 0]].tolist()
    assert np.array_equal(found.losses, LOSSES[[4, 0]], equal_nan=True)
