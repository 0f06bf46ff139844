"""Which weights losses get at each timestep: the small problem alone, on losses made by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dive_fast import DiveFastError
from dive_fast.core.loss_weights import LossWeights
from dive_fast.core.probes import low_discrepancy_probes
from dive_fast.core.timesteps import BINS
from dive_fast.core.weight_learning import candidates, differences, fit, held_out, learn, objective
from dive_fast.predict.calibration import fit_beta

N, RIVALS, K, T = 150, 3, 60, 1000
TIMESTEPS = low_discrepancy_probes(K, T, (1, 1, 1)).timesteps


def problem(informative: torch.Tensor, seed: int = 0, n: int = N) -> torch.Tensor:
    """Losses [n, 1 + R, K]: rivals are worse by 0.5 where timesteps are informative.

    Elsewhere the label is no better, and the class's error there is common to the image's probes,
    so that more of them help nothing.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    own = 0.3 * normal(n, 1 + RIVALS, K) + 5
    own[:, 1:] += 0.5 * informative
    # Each bin errs in its own way, as an image does that looks like another class there.
    bins = TIMESTEPS * BINS // T
    return own + (1 + 2 * (~informative)) * 0.4 * normal(n, 1 + RIVALS, BINS)[:, :, bins]


LOW = TIMESTEPS < 300
EVEN = torch.ones(K, dtype=torch.bool)


def folds(n: int = N) -> np.ndarray:
    return np.arange(n) % 5


def apart(losses: torch.Tensor) -> np.ndarray:
    return differences(losses, TIMESTEPS, T)


def test_where_some_timesteps_tell_and_others_mislead() -> None:
    found = learn(apart(problem(LOW)), folds(), T)
    assert found.weights is not None
    w = np.array(found.weights.weights)
    assert w.mean() == pytest.approx(1, abs=1e-5)
    # The first 6 of 20 bins tell; of any weights on them these are the best, 20 / 6 each.
    assert w[:6].mean() > 2 and w[7:].mean() < 0.6
    other = problem(LOW, seed=9, n=400)
    right = [
        (other * torch.from_numpy(x)[TIMESTEPS * BINS // T]).mean(dim=2).argmin(dim=1) == 0
        for x in (np.ones(BINS), w)
    ]
    assert right[1].double().mean() > right[0].double().mean() + 0.15
    assert found.weights.gain > 2 * found.weights.error > 0
    assert found.weights.images == N


@pytest.mark.parametrize("seed", range(4))
def test_where_all_timesteps_tell_alike_weights_stay_uniform(seed: int) -> None:
    found = learn(apart(problem(EVEN, seed)), folds(), T)
    assert found.weights is None
    assert len(found.trials) == len(candidates()) == 15


@pytest.mark.parametrize("seed", range(4))
def test_labels_without_meaning_are_refused(seed: int) -> None:
    losses = problem(LOW, seed)
    generator = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(1 + RIVALS, generator=generator) for _ in range(N)])
    shuffled = losses.gather(1, order[:, :, None].expand_as(losses))
    assert learn(apart(shuffled), folds(), T).weights is None


def test_what_gains_less_than_the_margin_is_refused() -> None:
    found = learn(apart(problem(LOW)), folds(), T, margin=1e9)
    assert found.weights is None and max(trial.gain for trial in found.trials) > 0.1


def test_what_answers_fewer_right_is_refused() -> None:
    """Low timesteps tell most images without noise, and turn a few near ties around."""
    d = np.ones((300, 1, BINS))
    d[:, 0, 10:] = 1.4 * np.random.default_rng(0).standard_normal((300, 10))
    d[:15, 0, :10], d[:15, 0, 10:] = -0.05, 0.06
    found = learn(d, folds(300), T)
    best = max(found.trials, key=lambda trial: trial.gain)
    assert best.gain > 2 * best.error and best.right < found.right
    assert found.weights is None


@pytest.mark.parametrize("form", candidates()[::4], ids=lambda form: form.text)
def test_the_gradient_is_that_of_finite_differences(form) -> None:
    d = apart(problem(LOW, n=20))
    generator = np.random.default_rng(1)
    at = np.concatenate([[1.5], 0.3 * generator.standard_normal(len(form.cost))])
    _, gradient = objective(at, d, form)
    for i in range(len(at)):
        step = np.zeros_like(at)
        step[i] = 1e-5
        up, down = (objective(at + sign * step, d, form)[0] for sign in (1, -1))
        assert gradient[i] == pytest.approx((up - down) / 2e-5, rel=1e-5, abs=1e-8)


def test_the_objective_by_hand() -> None:
    """One image, two rivals; log w is linear."""
    form = candidates()[0]
    d = np.zeros((1, 2, BINS))
    d[0, 0, 0], d[0, 1, 19] = 0.7, -0.2
    value, _ = objective(np.array([0.5, 0.25]), d, form)
    s = 0.25 * form.basis[:, 0]
    energies = [0.0, 0.7 * math.exp(0.5 + s[0]), -0.2 * math.exp(0.5 + s[19])]
    log_p = [-e - math.log(sum(math.exp(-x) for x in energies)) for e in energies]
    expected = -(2 / 3 * log_p[0] + (log_p[1] + log_p[2]) / 6) + form.penalty * 0.25**2
    assert value == pytest.approx(expected, rel=1e-12)


def test_energies_beyond_any_exponential() -> None:
    d = 1e6 * np.ones((2, 3, BINS))
    d[1] *= -1
    value, gradient = objective(
        np.array([2.0]), d, candidates()[0]._replace(basis=np.empty((BINS, 0)), cost=np.empty(0))
    )
    assert np.isfinite(value) and np.isfinite(gradient).all()


def test_forms_are_normalised() -> None:
    for form in candidates():
        np.testing.assert_allclose(form.basis.mean(axis=0), 0, atol=1e-12)
        p = len(form.cost)
        np.testing.assert_allclose(form.basis.T @ form.basis / BINS, np.eye(p), atol=1e-12)
    bins = candidates()[-1]
    s = np.random.default_rng(0).standard_normal(BINS)
    s -= s.mean()
    theta = bins.basis.T @ s / BINS
    # The cost of cosines is that of squared differences between neighbours, up to a factor.
    scale = 2 * (1 - math.cos(math.pi / BINS))
    assert bins.cost @ theta**2 * scale == pytest.approx((np.diff(s) ** 2).sum() / BINS)


def test_uniform_weights_have_the_beta_of_calibration() -> None:
    losses = problem(EVEN)
    found = fit(apart(losses), None)
    expected = fit_beta(losses.mean(dim=2), torch.zeros(N, dtype=torch.int64))
    assert found == pytest.approx(np.full(BINS, expected), rel=1e-3)


def test_a_heavy_penalty_is_uniform() -> None:
    d = apart(problem(LOW))
    stiff = candidates()[-1]._replace(penalty=1e9)
    np.testing.assert_allclose(fit(d, stiff), fit(d, None), rtol=1e-4)


def test_held_out_images_take_no_part() -> None:
    d = apart(problem(LOW))
    form = candidates()[4]
    nll, right = held_out(d, folds(), form)
    changed = d.copy()
    changed[folds() == 2] *= -1
    other, _ = held_out(changed, folds(), form)
    energy = d[folds() == 2] @ fit(d[folds() != 2], form)
    expected = np.log1p(np.exp(-energy).sum(axis=1))
    np.testing.assert_allclose(nll[folds() == 2], expected)
    np.testing.assert_allclose(other[folds() == 2], np.log1p(np.exp(energy).sum(axis=1)))
    assert right.sum() > 0.7 * N


def test_means_by_bin() -> None:
    """Weighted bins are the weighted mean over the probes."""
    losses = problem(LOW, n=4)
    w = torch.rand(BINS, dtype=torch.float64)
    found = apart(losses) @ w.numpy()
    weighted = (losses * w[TIMESTEPS * BINS // T]).mean(dim=2)
    np.testing.assert_allclose(found, (weighted[:, 1:] - weighted[:, :1]).numpy())


@pytest.mark.parametrize(
    ("losses", "timesteps", "message"),
    [
        (torch.zeros(3, K), TIMESTEPS, r"expected losses \[N, 1 \+ R, K\].* got \[3, 60\]"),
        (torch.zeros(0, 2, K), TIMESTEPS, "at least one image"),
        (torch.zeros(3, 1, K), TIMESTEPS, "one rival"),
        (torch.full((1, 2, K), torch.inf), TIMESTEPS, "finite losses"),
        (torch.zeros(1, 2, 40), TIMESTEPS, "at least 2 probes in each of 20 bins"),
        (torch.zeros(1, 2, 30), TIMESTEPS[:30], "20 bins of the timesteps .*, got 30"),
    ],
)
def test_bad_losses(losses: torch.Tensor, timesteps: torch.Tensor, message: str) -> None:
    with pytest.raises(DiveFastError, match=message):
        differences(losses, timesteps, T)


def test_numbers_are_stored_to_six_digits() -> None:
    found = learn(apart(problem(LOW)), folds(), T).weights
    assert isinstance(found, LossWeights)
    assert all(float(f"{x:.6g}") == x for x in (*found.weights, found.beta, found.gain))
