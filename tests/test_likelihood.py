"""The bound on the likelihood, against Gaussians whose density and whose bound are known."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from gaussian_mixture import GaussianMixture
from scipy import stats
from toy_model import ToyModel

from dive_fast import DiffusionClassifier, DiveFastError, ModelError
from dive_fast.core.bound import bound_probes, pixel_reconstruction, step_terms
from dive_fast.core.schedule import Schedule
from dive_fast.core.vocabulary import Vocabulary

SCHEDULES = {
    "linear, epsilon": Schedule.linear(),
    "cosine, v": Schedule.cosine(target="v_prediction"),
    "linear, sample": Schedule.linear(target="sample"),
    "few steps, epsilon": Schedule.linear(50, 2e-3, 0.3),
    "flow": Schedule.flow(),
    "EDM": Schedule.edm(),
}


class Exact(ToyModel):
    """The toy of any schedule and target: the best prediction that there is."""

    def __init__(self, schedule: Schedule, toy: GaussianMixture) -> None:
        super().__init__()
        self.toy, self.schedule = toy, schedule
        self.latent_shape = self.image_shape = toy.shape
        names = [f"class {c}" for c in range(len(toy.table))]
        self.vocabulary = Vocabulary(toy.table, names, toy.unconditional)

    def predict(self, x_t: torch.Tensor, t: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        a, s = self.schedule.a[t], self.schedule.s[t]
        eps = self.toy.predict(x_t, a, s, condition)
        a, s = a.view(-1, 1, 1, 1), s.view(-1, 1, 1, 1)
        mean, variance = condition.view(x_t.shape), self.toy.sigma**2
        x0 = mean + a * variance / (a**2 * variance + s**2) * (x_t - a * mean)
        return {
            "epsilon": eps,
            "v_prediction": a * eps - s * x0,
            "sample": x0,
            "flow": eps - x0,
        }[self.schedule.target]


@pytest.mark.parametrize(
    ("schedule", "nats"),
    [
        (Schedule.linear(), 0.46),
        (Schedule.cosine(), 0.40),
        (Schedule.flow(), 1.41),
        (Schedule.edm(), 0.32),
    ],
    ids=["linear", "cosine", "flow", "EDM"],
)
def test_what_the_variance_of_vdm_would_cost(schedule: Schedule, nats: float) -> None:
    """Of x0 ~ N(0, 1/4), whose mean squared error is 1 / (4 + SNR); docs/likelihood.md."""
    a, s = schedule.a.double(), schedule.s.double()
    snr = (a / s).square()
    error = 1 / (4 + snr[1:])
    per_target = {"epsilon": s / a, "v_prediction": s / (a**2 + s**2), "flow": s / (a + s)}
    constant, weight = step_terms(schedule)
    ours = (constant + weight * error / per_target[schedule.target][1:].square()).sum()
    vdm = ((snr[:-1] - snr[1:]) / 2 * error).sum()
    assert (vdm - ours).item() == pytest.approx(nats, abs=0.006)


def toy(n_classes: int = 3, sigma: float = 0.5) -> GaussianMixture:
    return GaussianMixture.random(n_classes, (2, 3, 3), sigma=sigma, spread=0.7, seed=1)


def classifier(kind: str = "linear, epsilon") -> DiffusionClassifier:
    return DiffusionClassifier(Exact(SCHEDULES[kind], toy()))


def log_density(mixture: GaussianMixture, x0: torch.Tensor) -> torch.Tensor:
    """log N(x0; mu_c, sigma^2 I), float64 [B, C]."""
    found = [
        stats.norm(mean.double().numpy(), mixture.sigma).logpdf(x0.flatten(1).double().numpy())
        for mean in mixture.table
    ]
    return torch.tensor(np.stack([f.sum(axis=1) for f in found], axis=1))


def exact_bound(schedule: Schedule, mixture: GaussianMixture, x0: torch.Tensor) -> torch.Tensor:
    """The bound on -log p, [B, C], from DDPM's Gaussians and the expected error of every step."""
    a, s, dim = schedule.a.double(), schedule.s.double(), x0[0].numel()
    distance = (x0.flatten(1)[:, None].double() - mixture.table.double()).square().sum(dim=2)
    total_variance = a[-1] ** 2 + s[-1] ** 2
    square = x0.double().flatten(1).square().sum(dim=1)
    prior = torch.tensor(0.0).double() + 0.5 * (
        dim * (s[-1] ** 2 / total_variance - 1 - torch.log(s[-1] ** 2 / total_variance))
        + a[-1] ** 2 * square / total_variance
    )
    found = prior[:, None] + dim / 2 * (1 + math.log(2 * math.pi * s[0] ** 2 / a[0] ** 2))
    for t in range(1, len(a)):
        forward = s[t] ** 2 - (a[t] / a[t - 1]) ** 2 * s[t - 1] ** 2  # q(x_t | x_{t-1})
        posterior = forward * s[t - 1] ** 2 / s[t] ** 2
        # DDPM's beta_t where a^2 + s^2 = 1; a flow is brought to that first.
        norm = (a[t - 1] ** 2 + s[t - 1] ** 2) / (a[t] ** 2 + s[t] ** 2)
        variance = posterior * norm * s[t] ** 2 / s[t - 1] ** 2
        marginal = a[t] ** 2 * mixture.sigma**2 + s[t] ** 2
        error = (s[t] ** 2 / marginal) ** 2 * distance
        error = error + dim * (a[t] * s[t] * mixture.sigma**2 / marginal) ** 2
        mean = (a[t - 1] * forward / s[t] ** 2) ** 2 * error
        log_ratio = torch.log(variance / posterior)
        found = found + dim / 2 * (log_ratio + posterior / variance - 1) + mean / (2 * variance)
    return found


@pytest.mark.parametrize("kind", SCHEDULES)
def test_bound_of_gaussians(kind: str) -> None:
    """Unbiased for the bound, which is within 2% of log p where the steps are many."""
    clf = classifier(kind)
    x0, labels = clf.model.toy.sample(40, torch.Generator().manual_seed(3))
    found = clf.log_likelihood(latents=x0, classes="all", probes=400)
    expected = -exact_bound(clf.model.schedule, clf.model.toy, x0)
    z = (found.values - expected) / found.standard_errors
    assert z.abs().max() < 5
    assert 0.3 < z.square().mean().sqrt() < 2
    right = torch.arange(len(x0)), labels
    assert found.values.dtype == torch.float64 and found.values.shape == (40, 3)
    many, labels = clf.model.toy.sample(2000, torch.Generator().manual_seed(4))
    right = torch.arange(len(many)), labels
    density = log_density(clf.model.toy, many)[right]
    gap = density + exact_bound(clf.model.schedule, clf.model.toy, many)[right]
    # Of the model's density, so below log p in the mean over images, not for each of them.
    assert gap.mean() > -3 * gap.std() / len(many) ** 0.5
    assert gap.mean() < (0.005 if len(clf.model.schedule) == 1000 else 0.05) * abs(density.mean())


@pytest.mark.parametrize("kind", ["linear, epsilon", "cosine, v", "linear, sample", "flow", "EDM"])
def test_measured_bound_is_near_the_density(kind: str) -> None:
    """Within 2% in the mean over images; of 768 numbers, as one number's noise is large."""
    mixture = GaussianMixture.random(2, (3, 16, 16), sigma=0.4, spread=0.7, seed=1)
    clf = DiffusionClassifier(Exact(SCHEDULES[kind], mixture))
    x0 = mixture.table[1].view(1, 3, 16, 16) + 0.4 * torch.randn(
        4, 3, 16, 16, generator=torch.Generator().manual_seed(2)
    )
    found = clf.log_likelihood(latents=x0, classes=1, probes=4000)
    density = log_density(mixture, x0)[:, 1]
    assert abs(found.values.mean() / density.mean() - 1) < 0.02


def test_parts_add_up_and_seeds_matter() -> None:
    clf = classifier()
    x0, _ = clf.model.toy.sample(3, torch.Generator().manual_seed(0))
    found = clf.log_likelihood(latents=x0, classes=["class 2", 0], probes=16)
    assert found.classes == (2, 0) and found.bound_of == "the density of x0"
    whole = (found.prior + found.reconstruction)[:, None] + found.diffusion
    assert torch.equal(found.values, whole)
    assert torch.allclose(found.draws.mean(dim=2), found.diffusion)
    assert found.draws.shape == (3, 2, 8)
    swapped = clf.log_likelihood(latents=x0, classes=[0, 2], probes=16)
    assert torch.allclose(swapped.values.flip(1), found.values)
    twice = clf.log_likelihood(latents=x0, classes=np.array([2, 2, 0]), probes=16)
    assert torch.allclose(twice.values[:, 1:], found.values)
    assert torch.allclose(twice.values[:, 0], found.values[:, 0])
    other = clf.log_likelihood(latents=x0, classes=[2, 0], probes=16, seed=1)
    assert not torch.allclose(other.values, found.values, rtol=1e-3)


def test_standard_errors_are_the_spread_between_seeds() -> None:
    clf = classifier("cosine, v")
    x0, _ = clf.model.toy.sample(6, torch.Generator().manual_seed(0))
    found = [clf.log_likelihood(latents=x0, probes=32, seed=i) for i in range(60)]
    spread = torch.stack([f.values for f in found]).var(dim=0)
    stated = torch.stack([f.standard_errors.square() for f in found]).mean(dim=0)
    assert abs(float((stated / spread).mean()) - 1) < 0.3


def test_score_against_no_class() -> None:
    clf = classifier()
    x0, labels = clf.model.toy.sample(20, torch.Generator().manual_seed(5))
    conditional = clf.log_likelihood(latents=x0, classes="all", probes=80)
    plain = clf.log_likelihood(latents=x0, probes=80)
    both = clf.log_likelihood(latents=x0, classes=[None, 1], probes=80)
    assert plain.classes == (None,) and both.classes == (None, 1)
    assert torch.allclose(both.values[:, 0], plain.values[:, 0])
    assert torch.allclose(both.values[:, 1], conditional.values[:, 1])
    score, error = conditional.score(plain)
    centre = GaussianMixture(clf.model.toy.unconditional.view(1, 2, 3, 3), clf.model.toy.sigma)
    expected = log_density(clf.model.toy, x0) - log_density(centre, x0)
    assert (score - expected).abs().max() < 0.05 * expected.abs().max() + 5 * error.max()
    assert error.mean() < conditional.standard_errors.mean()
    assert torch.equal(score.argmax(dim=1), conditional.values.argmax(dim=1))
    assert (score.argmax(dim=1) == labels).all()
    with pytest.raises(DiveFastError, match="same probes and seed"):
        conditional.score(clf.log_likelihood(latents=x0, probes=80, seed=1))
    with pytest.raises(DiveFastError, match="in the same unit"):
        conditional.score(clf.log_likelihood(latents=x0[:3], probes=80))
    with pytest.raises(DiveFastError, match="expected a Likelihood"):
        conditional.score(3)


def one_pixel(schedule: Schedule) -> DiffusionClassifier:
    """A model of images of one pixel, N(0.2, 0.3^2)."""
    mixture = GaussianMixture(torch.full((1, 1, 1, 1), 0.2), 0.3)
    return DiffusionClassifier(Exact(schedule, mixture))


@pytest.mark.parametrize("kind", ["linear, epsilon", "flow"])
def test_bits_of_all_images_are_a_distribution(kind: str) -> None:
    """Bounds on the probabilities of all images sum to at most 1."""
    clf = one_pixel(SCHEDULES[kind])
    images = np.arange(256, dtype=np.uint8).reshape(256, 1, 1, 1)
    found = clf.log_likelihood(images, [0], unit="bits/dim", probes=64)
    assert found.bound_of == "the probability of the 8-bit pixels"
    schedule, mixture = SCHEDULES[kind], clf.model.toy
    x0 = torch.tensor(images).double().view(256, 1, 1, 1) / 127.5 - 1
    exact = exact_bound(schedule, mixture, x0)[:, 0] / math.log(2)
    density = clf.log_likelihood(latents=x0, classes=[0], probes=8)
    rest = (density.prior + density.reconstruction) / math.log(2)
    diffusion = exact + rest  # both are of log p
    assert ((found.diffusion[:, 0] - diffusion) / found.standard_errors[:, 0]).abs().max() < 5
    p = torch.exp2(-(found.prior + diffusion + found.reconstruction))
    # A flow begins at noise far below a pixel's width, of which this model knows nothing: what
    # the Gaussian of entropy log(sigma_0 sqrt(2 pi e)) fills of the interval is left.
    sigma, width = float(schedule.s[0] / schedule.a[0]), 2 / 255
    filled = min(1.0, sigma * math.sqrt(2 * math.pi * math.e) / width)
    assert 0.95 * filled < float(p.sum()) <= 1
    edges = (np.arange(1, 256) - 128) * 2 / 255 + 1 / 255
    expected = np.diff(stats.norm(0.2, 0.3).cdf(edges), prepend=0, append=1)
    within = (np.arange(256) > 0) & (np.arange(256) < 255) & (expected > 1e-3)
    assert np.abs(p.numpy()[within] / expected[within] / filled - 1).max() < 0.1
    gain, error = found.score(found)
    assert not gain.any() and not error.any()


@pytest.mark.parametrize("width", [0.002, 0.02, 0.2])
def test_reconstruction_of_pixels(width: float) -> None:
    schedule = SCHEDULES["linear, epsilon"]
    sigma = float(schedule.s[0] / schedule.a[0])
    eps = np.random.default_rng(0).standard_normal(400_000) * sigma
    model = stats.norm(eps, sigma)
    upper, lower = model.cdf(width / 2), model.cdf(-width / 2)
    within, end = pixel_reconstruction(schedule, width)
    assert within == pytest.approx(-np.log(upper - lower).mean(), rel=0.02, abs=1e-3)
    assert end == pytest.approx(-np.log(upper).mean(), rel=0.02, abs=1e-3)


def test_probes_are_an_unbiased_rule() -> None:
    """sum_t weight_t l_t of a loss that is known, over many seeds."""
    schedule = SCHEDULES["flow"]
    _, weight = step_terms(schedule)
    losses = 1 / (1 + torch.arange(1000, dtype=torch.float64) / 100)
    exact = float((weight * losses[1:]).sum())
    found = []
    for seed in range(200):
        probes, factor = bound_probes(schedule, 16, (1, 1, 1), seed)
        assert torch.equal(probes.noise[0::2], -probes.noise[1::2])
        assert torch.equal(probes.timesteps[0::2], probes.timesteps[1::2])
        assert probes.timesteps.min() >= 1
        found.append(float((factor * losses[probes.timesteps[::2]]).mean()))
    error = np.std(found) / len(found) ** 0.5
    assert abs(np.mean(found) - exact) < 4 * error
    assert error < 0.02 * exact


def test_bad_input() -> None:
    clf = classifier()
    x0 = torch.zeros(1, 2, 3, 3)
    bad = [
        ({}, "either images or latents"),
        ({"images": x0, "latents": x0}, "either images or latents"),
        ({"images": x0, "latents": x0, "unit": "bits/dim"}, "either images or latents"),
        ({"unit": "bits/dim"}, "either images or latents"),
        ({"latents": x0, "unit": "bits/dim"}, "expected images, got latents"),
        ({"latents": x0, "unit": "bits"}, "a unit of nats, bits/dim, got 'bits'"),
        ({"latents": x0, "unit": 3}, "a unit of nats, bits/dim, got 3"),
        ({"latents": x0, "classes": [3]}, r"must lie in \[0, 3\)"),
        ({"latents": x0, "classes": [-1, None]}, r"must lie in \[0, 3\)"),
        ({"latents": x0, "classes": "cat"}, "a class of toy, 'all' or None, got 'cat'"),
        ({"latents": x0, "classes": []}, "at least one class"),
        ({"latents": x0, "classes": [0.5]}, "whole numbers"),
        ({"latents": x0, "classes": 0.5}, "whole numbers"),
        ({"latents": x0, "probes": 4}, "that 4 divides, at least 8, got 4"),
        ({"latents": x0, "probes": 10}, "that 4 divides, at least 8, got 10"),
        ({"latents": x0, "probes": None}, "number of probes must be a whole number"),
        ({"latents": x0, "probes": True}, "number of probes must be a whole number"),
        ({"latents": x0, "seed": -1}, "seed must be at least 0"),
        ({"latents": x0[:0]}, "at least one image, got none"),
    ]
    for arguments, message in bad:
        with pytest.raises(DiveFastError, match=message):
            clf.log_likelihood(**arguments)


def test_no_condition_for_no_class() -> None:
    clf = classifier()
    clf.model.vocabulary.unconditional = None
    x0 = torch.zeros(1, 2, 3, 3)
    for classes in (None, [0, None]):
        with pytest.raises(ModelError, match="toy has not learned a condition that means no"):
            clf.log_likelihood(latents=x0, classes=classes)
    assert clf.log_likelihood(latents=x0, classes=0, probes=8).values.shape == (1, 1)


def test_schedules_without_a_bound() -> None:
    plain = SCHEDULES["linear, epsilon"]
    a, s = plain.a.clone(), plain.s.clone()
    a[-1], s[-1] = 0, 1
    for schedule, message in [
        (Schedule(a, s), "zero terminal SNR"),
        (Schedule(a[:1], s[:1]), "2 timesteps or more"),
        (Schedule(a.flip(0), s.flip(0)), "falls from each to the next"),
        (Schedule(1 - s.flip(0), s * 0), "falls from each to the next"),
    ]:
        with pytest.raises(ModelError, match=message):
            step_terms(schedule)
    constant, weight = step_terms(dataclasses.replace(Schedule(a, s), target="v_prediction"))
    assert constant.isfinite().all() and weight.isfinite().all() and (weight > 0).all()


def test_bits_of_what_are_no_pixels() -> None:
    clf = one_pixel(SCHEDULES["flow"])
    clf.model.encode = lambda images: images.square()
    with pytest.raises(DiveFastError, match="expected a model of pixels, got toy"):
        clf.log_likelihood(np.full((1, 1, 1), 77, np.uint8), [0], unit="bits/dim")


def test_pixels_of_another_scale() -> None:
    """The width of a pixel is that of x0, whatever the model makes of images."""
    clf = one_pixel(SCHEDULES["linear, epsilon"])
    clf.model.encode = lambda images: 0.3 - 3 * images
    images = np.array([0, 77, 255], dtype=np.uint8).reshape(3, 1, 1, 1)
    found = clf.log_likelihood(images, [0], unit="bits/dim", probes=8)
    within, end = pixel_reconstruction(clf.model.schedule, 6 / 255)
    expected = torch.tensor([end, within, end], dtype=torch.float64) / math.log(2)
    assert torch.allclose(found.reconstruction, expected)
    latents = (0.3 - 3 * (torch.tensor(images).float() / 127.5 - 1)).view(3, 1, 1, 1)
    density = clf.log_likelihood(latents=latents, classes=[0], probes=8)
    assert torch.allclose(found.diffusion * math.log(2), -density.diffusion, rtol=1e-5)
