"""The toy's closed forms, against Monte Carlo and against torch.distributions."""

from __future__ import annotations

import pytest
import torch
from gaussian_mixture import GaussianMixture

SHAPE = (1, 3, 5)
# alpha_bar from nearly clean to nearly noise.
ALPHA_BAR = torch.tensor([0.99, 0.7, 0.3, 0.02])
A, S = ALPHA_BAR.sqrt(), (1 - ALPHA_BAR).sqrt()


@pytest.fixture
def mixture() -> GaussianMixture:
    return GaussianMixture.random(4, SHAPE, sigma=0.6, seed=3)


def five_standard_errors(samples: torch.Tensor) -> torch.Tensor:
    return 5 * samples.std(dim=0) / len(samples) ** 0.5


def test_expected_loss_is_the_mean_of_the_sampled_losses(mixture: GaussianMixture) -> None:
    generator = torch.Generator().manual_seed(0)
    x0, _ = mixture.sample(1, generator)
    n = 4000
    eps = torch.randn(n, *SHAPE, generator=generator)
    expected = mixture.expected_loss(x0, torch.arange(4), A, S)
    assert expected.shape == (1, 4, len(A))
    for c in range(4):
        for k in range(len(A)):
            x_t = A[k] * x0 + S[k] * eps
            prediction = mixture.predict(
                x_t, A[k].expand(n), S[k].expand(n), mixture.table[c].expand(n, -1)
            )
            losses = (eps - prediction).square().mean(dim=(1, 2, 3))
            assert abs(losses.mean() - expected[0, c, k]) < five_standard_errors(losses)


def test_predict_is_the_conditional_mean_of_eps(mixture: GaussianMixture) -> None:
    # The error of a conditional mean is uncorrelated with x_t, and with 1.
    generator = torch.Generator().manual_seed(1)
    x0, labels = mixture.sample(20_000, generator)
    eps = torch.randn(x0.shape, generator=generator)
    for a, s in zip(A, S, strict=True):
        x_t = a * x0 + s * eps
        m = len(x0)
        error = eps - mixture.predict(x_t, a.expand(m), s.expand(m), mixture.table[labels])
        for moment in (error, error * x_t):
            assert (moment.mean(dim=0).abs() < five_standard_errors(moment)).all()


def test_log_posterior_is_bayes_rule(mixture: GaussianMixture) -> None:
    x0, _ = mixture.sample(7, torch.Generator().manual_seed(2))
    gaussians = torch.distributions.Normal(mixture.table.double(), mixture.sigma)
    likelihood = gaussians.log_prob(x0.flatten(1).double()[:, None]).sum(dim=2)
    expected = likelihood - likelihood.logsumexp(dim=1, keepdim=True)
    torch.testing.assert_close(mixture.log_posterior(x0), expected)


def test_losses_rank_the_classes_as_the_posterior(mixture: GaussianMixture) -> None:
    x0, _ = mixture.sample(63, torch.Generator().manual_seed(3))
    losses = mixture.expected_loss(x0, torch.arange(4), A, S)
    by_posterior = mixture.log_posterior(x0).argsort(dim=1, descending=True)
    assert torch.equal(losses.mean(dim=2).argsort(dim=1), by_posterior)
    assert torch.equal(losses[..., 0].argsort(dim=1), by_posterior)


def test_expected_loss_takes_the_classes_asked_for(mixture: GaussianMixture) -> None:
    x0, _ = mixture.sample(3, torch.Generator().manual_seed(4))
    every = mixture.expected_loss(x0, torch.arange(4), A, S)
    chosen = mixture.expected_loss(x0, torch.tensor([2, 0, 2]), A, S)
    torch.testing.assert_close(chosen, every[:, [2, 0, 2]], rtol=0, atol=0)


def test_samples_have_the_mean_and_spread_of_their_class(mixture: GaussianMixture) -> None:
    x0, labels = mixture.sample(8000, torch.Generator().manual_seed(5))
    assert x0.shape == (8000, *SHAPE) and x0.dtype == torch.float32
    assert labels.dtype == torch.int64 and set(labels.tolist()) == set(range(4))
    for c in range(4):
        difference = x0[labels == c].flatten(1) - mixture.table[c]
        assert (difference.mean(dim=0).abs() < five_standard_errors(difference)).all()
        # The standard error of a standard deviation is sigma / sqrt(2 n).
        tolerance = 5 * mixture.sigma / (2 * difference.numel()) ** 0.5
        assert abs(difference.std() - mixture.sigma) < tolerance


def test_sample_is_repeatable(mixture: GaussianMixture) -> None:
    first, first_labels = mixture.sample(5, torch.Generator().manual_seed(6))
    second, second_labels = mixture.sample(5, torch.Generator().manual_seed(6))
    assert torch.equal(first, second) and torch.equal(first_labels, second_labels)


def test_gradient_of_the_mean_prediction_points_at_the_class(mixture: GaussianMixture) -> None:
    # dL/dv of the expected loss is proportional to v - x0: descent from anywhere goes to x0.
    generator = torch.Generator().manual_seed(7)
    x0, _ = mixture.sample(1, generator)
    n = 4000
    eps = torch.randn(n, *SHAPE, generator=generator)
    v = mixture.unconditional.clone().requires_grad_()
    a, s = A[1].expand(n), S[1].expand(n)
    prediction = mixture.predict(A[1] * x0 + S[1] * eps, a, s, v.expand(n, -1))
    (eps - prediction).square().mean().backward()
    cosine = torch.cosine_similarity(v.grad, v.detach() - x0.flatten(), dim=0)
    assert cosine > 0.99


@pytest.mark.parametrize("shape", [(4, 15), (0, 1, 3, 5)])
def test_means_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"means must be \[C, ch, h, w\]"):
        GaussianMixture(torch.zeros(shape), 1.0)


@pytest.mark.parametrize("sigma", [0.0, -1.0, float("nan")])
def test_sigma_must_be_positive(sigma: float) -> None:
    with pytest.raises(ValueError, match="sigma must be positive"):
        GaussianMixture(torch.zeros(2, 1, 3, 5), sigma)
