"""Presets against the published loops as bench/baselines writes them: the same, draw for draw.

The tolerance of 1e-4 is the one promised; what is seen is about 1e-7.
"""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler, DiTTransformer2DModel
from tiny_transformer import CHANNELS, N_CLASSES, SIZE, make_transformer

from bench.baselines import diffusion_classifier as published_dc
from bench.baselines import dive as published_dive
from dive_fast import DiffusionClassifier, DiveFastError, ProbeList, zoo
from dive_fast.core.schedule import Schedule
from dive_fast.models.dit.model import DiT
from dive_fast.strategies import AdaptiveEnumerate, DivePaper

SCHEDULER = DDPMScheduler(beta_schedule="linear")
ALPHA_BAR = SCHEDULER.alphas_cumprod
SHAPE = (CHANNELS, SIZE, SIZE)


@pytest.fixture(scope="module", params=["learned sigma", "eps only"])
def pair(request):
    """One transformer as diffusers has it, and the same as our classifier."""
    make = lambda: make_transformer(1, learned_sigma=request.param == "learned sigma")  # noqa: E731
    model = DiT(make(), None, Schedule.from_config(SCHEDULER.config), tuple("abcde"))
    return make(), DiffusionClassifier(model, batch_size=33)


@pytest.fixture(scope="module")
def latents():
    return torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(1))


def assert_same_run(answer, published):
    trace = answer.trace
    assert trace["monitor_losses"] == pytest.approx(published.monitor_losses, rel=1e-4)
    assert trace["step_losses"] == pytest.approx(published.train_losses, rel=1e-4)
    assert trace["monitor_classes"] == published.nearest
    assert answer.index == published.pred
    assert answer.evaluations == published.n_forward + published.n_backward


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_dive_paper_is_the_published_loop_at_k_100(pair, latents, metric):
    transformer, classifier = pair
    answers = classifier(
        latents=latents, preset="dive-paper", probes=100, metric=metric, trace=True
    )
    noises = published_dive.noise_table(SHAPE)
    moved = 0
    for x0, answer in zip(latents, answers, strict=True):
        published = published_dive.invert(
            transformer, x0[None], ALPHA_BAR, noises, t_interval=10, metric=metric
        )
        assert_same_run(answer, published)
        assert answer.evaluations == 6000
        moved += len(set(published.nearest)) > 1
    assert moved, "a search that never moves would prove nothing"


def test_dive_paper_is_the_published_loop_on_the_embedded_model():
    directory = zoo.path("digits")
    transformer = DiTTransformer2DModel.from_pretrained(
        directory / "transformer", low_cpu_mem_usage=False
    ).eval()
    classifier = DiffusionClassifier.from_pretrained("digits")
    image = (torch.arange(64).view(1, 1, 8, 8) % 9) / 4 - 1
    published = published_dive.invert(
        transformer,
        image,
        ALPHA_BAR,
        published_dive.noise_table((1, 8, 8)),
        t_interval=40,
        n_loops=5,
        lr=0.1,
    )
    (answer,) = classifier(
        latents=image, preset="dive-paper", probes=25, loops=5, learning_rate=0.1, trace=True
    )
    assert_same_run(answer, published)


def test_dive_paper_has_the_published_defaults(pair, latents):
    transformer, classifier = pair
    strategy = DivePaper(loops=2)
    (answer,) = classifier(latents=latents[:1], strategy=strategy, trace=True)
    published = published_dive.invert(
        transformer, latents[:1], ALPHA_BAR, published_dive.noise_table(SHAPE), n_loops=2
    )
    assert answer.evaluations == 2 * 3 * 250
    assert_same_run(answer, published)


def test_another_seed_is_the_published_seed(pair, latents):
    transformer, classifier = pair
    (answer,) = classifier(
        latents=latents[:1], preset="dive-paper", loops=3, probes=100, seed=7, trace=True
    )
    noises = published_dive.noise_table(SHAPE)
    published = published_dive.invert(
        transformer, latents[:1], ALPHA_BAR, noises, t_interval=10, n_loops=3, seed=7
    )
    assert_same_run(answer, published)


def test_noise_timesteps_embedding_and_permutations_can_be_passed_in(pair, latents):
    transformer, classifier = pair
    noises = published_dive.noise_table(SHAPE, seed=11, n=50)
    published = published_dive.invert(
        transformer, latents[:1], ALPHA_BAR, noises, t_interval=20, n_loops=3, seed=4
    )
    generator = torch.Generator().manual_seed(4)
    torch.randn(1, classifier.model.vocabulary.dim, generator=generator)
    permutations = [torch.randperm(50, generator=generator) for _ in range(3)]
    strategy = DivePaper(
        loops=3, initial_embedding=published.initial_embedding, permutations=permutations
    )
    probes = ProbeList(torch.arange(10, 1000, 20), noises)
    # The seed no longer matters.
    (answer,) = classifier(
        latents=latents[:1], strategy=strategy, probes=probes, seed=99, trace=True
    )
    assert_same_run(answer, published)


@pytest.mark.parametrize("loss", ["l2", "l1", "huber"])
@pytest.mark.parametrize(
    ("n_samples", "to_keep", "n_trials"),
    [((10, 50), (3, 1), 1), ((4, 20, 40), (4, 2, 1), 2), ((25,), (1,), 1)],
)
def test_diffusion_classifier_is_the_published_adaptive_loop(
    pair, latents, n_samples, to_keep, n_trials, loss
):
    transformer, classifier = pair
    strategy = AdaptiveEnumerate(n_samples, to_keep, n_trials, loss)
    answers = classifier(latents=latents, strategy=strategy, seed=3, trace=True)
    for x0, answer in zip(latents, answers, strict=True):
        pred, data = published_dc.eval_prob_adaptive(
            transformer,
            x0[None],
            N_CLASSES,
            ALPHA_BAR,
            n_samples=n_samples,
            to_keep=to_keep,
            n_trials=n_trials,
            loss=loss,
            seed=3,
        )
        assert answer.index == pred
        timesteps = strategy.probes(None, 1000, SHAPE, 3).timesteps
        measured = 0
        for c, entry in data.items():
            losses = answer.trace["losses"][c]
            seen = losses.isfinite()
            assert timesteps[seen].tolist() == entry["t"].tolist()
            torch.testing.assert_close(losses[seen], entry["pred_errors"], rtol=1e-4, atol=1e-6)
            measured += int(seen.sum())
        assert answer.evaluations == measured


def test_the_default_stages_are_those_published_for_ten_classes(pair, latents):
    _, classifier = pair
    (answer,) = classifier(latents=latents[:1], preset="diffusion-classifier")
    assert answer.n_probes.max() == 500
    assert answer.evaluations == N_CLASSES * 50 + 5 * 450


def test_enumeration_is_the_published_loop_for_dit(pair, latents):
    transformer, classifier = pair
    noises = published_dive.noise_table(SHAPE)
    published = published_dc.eval_prob_all(
        transformer, latents[:1], N_CLASSES, ALPHA_BAR, noises, 40
    )
    probes = ProbeList(torch.arange(20, 1000, 40), noises)
    losses = classifier.losses(latents=latents[:1], probes=probes)
    torch.testing.assert_close(losses[0], published.float(), rtol=1e-4, atol=1e-6)
    (answer,) = classifier(latents=latents[:1], strategy="enumerate", probes=probes)
    assert answer.index == int(published.mean(dim=1).argmin())


def test_bad_settings(pair, latents):
    _, classifier = pair
    x0 = latents[:1]
    bad = [
        ({"probes": 60}, "divides 1000"),
        ({"probes": 40}, "must be a multiple of the batch of 25, got 40"),
        ({"loops": 0}, "loops and batch_size must be at least 1, got 0 and 25"),
        ({"permutations": [torch.arange(250)]}, r"one permutation per loop \(20\), got 1"),
        ({"initial_embedding": torch.zeros(3)}, r"must have shape \[16\], got \[3\]"),
        ({"permutations": [torch.zeros(250)] * 20}, "must hold each of 0 to 249 once"),
        ({"metric": "l7"}, "metric must be one of l2, cosine, .*'l7'"),
        ({"speed": 3}, "unknown setting 'speed'"),
        ({"strategy": "enumerate"}, "belongs to strategy 'invert', got 'enumerate'"),
    ]
    for arguments, message in bad:
        with pytest.raises(DiveFastError, match=message):
            classifier(latents=x0, preset="dive-paper", **arguments)
    stages = [
        ({"n_samples": (5, 10), "to_keep": (1,)}, "as many entries as there are stages"),
        ({"n_samples": (5,), "to_keep": (2,)}, "must end with 1"),
        ({"n_samples": (5, 2000), "to_keep": (3, 1)}, "at most 1000 timesteps, got 2000"),
        ({"n_trials": 0}, "of at least 1"),
        ({"probes": 100}, "take 500 probes, got 100"),
        ({"probes": ProbeList(torch.arange(9), torch.zeros(9, *SHAPE))}, "500 probes, got 9"),
    ]
    for arguments, message in stages:
        with pytest.raises(DiveFastError, match=message):
            classifier(latents=x0, preset="diffusion-classifier", **arguments)
