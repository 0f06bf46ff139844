"""The sampler: against diffusers' DDIM, on the analytic toy, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler
from tiny_transformer import make_dit
from toy_model import ToyModel

from dive_fast.core.schedule import Schedule
from dive_fast.core.vocabulary import Vocabulary
from dive_fast.errors import DiveFastError, ModelError
from dive_fast.models.dit.model import DiT
from dive_fast.predict.sampling import sample

STEPS = 10


def by_diffusers(model: DiT, classes: list[int], guidance: float) -> torch.Tensor:
    """diffusers' own loop on the timesteps that ``sample`` takes, from the same noise."""
    scheduler = DDIMScheduler(
        beta_schedule="linear", prediction_type=model.schedule.target, clip_sample=False
    )
    alpha_bar = scheduler.alphas_cumprod
    generator = torch.Generator().manual_seed(3)
    x = torch.stack([torch.randn(model.latent_shape, generator=generator) for _ in classes])
    timesteps = torch.linspace(999, 0, STEPS).round().long().tolist()
    for t, following in zip(timesteps, [*timesteps[1:], -1], strict=True):
        # The scheduler's previous step is t - T // n: an uneven stride needs an n of its own.
        scheduler.set_timesteps(STEPS)
        rows = torch.full((len(classes),), t)
        c, u = model.vocabulary.table[classes], model.vocabulary.unconditional
        prediction = model.predict(x, rows, c)[:, : x.shape[1]]
        if guidance != 1:
            without = model.predict(x, rows, u.expand_as(c))[:, : x.shape[1]]
            prediction = without + guidance * (prediction - without)
        scheduler.alphas_cumprod = alpha_bar.clone()
        previous = t - 1000 // STEPS
        if previous >= 0:
            scheduler.alphas_cumprod[previous] = alpha_bar[following]
        x = scheduler.step(prediction, t, x).prev_sample
    return x


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("learned_sigma", [False, True])
@pytest.mark.parametrize("target", ["epsilon", "v_prediction", "sample"])
def test_agrees_with_diffusers(target: str, learned_sigma: bool, guidance: float) -> None:
    model = make_dit(target=target, learned_sigma=learned_sigma)
    classes = [4, 0, 0]
    found = sample(model, classes, steps=STEPS, guidance=guidance, seed=3)
    expected = by_diffusers(model, classes, guidance)
    assert found.shape == (3, *model.latent_shape) and found.dtype == torch.float32
    # diffusers computes alpha_bar in float32, and 1 / a_T = 157 magnifies it.
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)


def test_flow() -> None:
    """A straight path: eps - x0 is constant along it, so any number of steps ends at x0."""
    sigma = torch.linspace(0.001, 1, 1000)

    class Straight(ToyModel):
        def predict(self, x_t, t, condition):
            x0 = condition.view(-1, *self.latent_shape)
            s = self.schedule.s[t].view(-1, 1, 1, 1)
            return (x_t - (1 - s) * x0) / s - x0

    model = Straight()
    model.schedule = Schedule(1 - sigma, sigma, "flow")
    for steps in (1, 2, 7):
        found = sample(model, [2, 5], steps=steps).flatten(1)
        torch.testing.assert_close(found, model.vocabulary.table[[2, 5]], rtol=1e-4, atol=1e-4)


def test_samples_of_the_toy_are_drawn_from_their_class() -> None:
    model = ToyModel()
    classes = torch.arange(6).repeat_interleave(100)
    x0 = sample(model, classes, steps=100).flatten(1)
    deviation = (x0 - model.vocabulary.table[classes]).view(6, 100, -1)
    # Of the mean of 100 draws with sigma 0.5; 5 standard errors, and what 100 steps leave out.
    assert deviation.mean(dim=1).abs().max() < 5 * 0.5 / 10
    assert deviation.std().item() == pytest.approx(0.5, rel=0.1)
    assert (model.toy.log_posterior(x0.view(-1, 2, 3, 3)).argmax(dim=1) == classes).all()


def test_the_same_at_every_batch_size_and_length() -> None:
    model = make_dit(learned_sigma=False)
    classes = [0, 1, 2, 3, 4, 0, 1]
    whole = sample(model, classes, steps=5, seed=1)
    assert torch.equal(whole, sample(model, classes, steps=5, seed=1))
    assert not torch.equal(whole, sample(model, classes, steps=5, seed=2))
    for batch_size in (1, 3):
        parts = sample(model, classes, steps=5, seed=1, batch_size=batch_size)
        torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-3)
    shorter = sample(model, classes[:3], steps=5, seed=1)
    torch.testing.assert_close(shorter, whole[:3], rtol=1e-3, atol=1e-3)
    # Guidance takes two rows for each latent.
    toy = ToyModel()
    sample(toy, [0, 1, 2], steps=1, guidance=2.0, batch_size=4)
    assert toy.rows == [4, 2]


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_several_conditions_of_a_class_take_turns(guidance: float) -> None:
    """Two conditions an answer; the rows of the plain toy's table are 0a, 0b, 1a, 1b, 2a, 2b."""
    plain, model = ToyModel(), ToyModel()
    toy = model.toy
    model.vocabulary = Vocabulary(
        toy.table.view(3, -1), "xyz", toy.unconditional.repeat(2), parts=2
    )
    settings = {"steps": 5, "guidance": guidance, "seed": 2}
    found = sample(model, [0, 2, 0, 2, 0, 1], **settings)
    assert torch.equal(found, sample(plain, [0, 4, 1, 5, 0, 2], **settings))
    # Batches that part a class's latents do not begin its turns anew.
    small = sample(model, [0, 2, 0, 2, 0, 1], batch_size=2, **settings)
    torch.testing.assert_close(small, found, rtol=1e-4, atol=1e-4)


def test_bad_input() -> None:
    model = ToyModel()
    for arguments, message in [
        (([],), r"classes must be whole numbers \[N\] with N >= 1"),
        (([0.5],), "whole numbers"),
        (([6],), r"classes must lie in \[0, 6\)"),
        (([-1],), r"classes must lie in \[0, 6\)"),
    ]:
        with pytest.raises(DiveFastError, match=message):
            sample(model, *arguments)
    for settings, message in [
        ({"steps": 0}, r"steps must lie in \[1, 1000\], got 0"),
        ({"steps": 1001}, "got 1001"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ]:
        with pytest.raises(DiveFastError, match=message):
            sample(model, [0], **settings)
    model.vocabulary.unconditional = None
    with pytest.raises(ModelError, match="toy has no unconditional embedding for guidance 2.0"):
        sample(model, [0], guidance=2.0)
    model.schedule = Schedule(model.schedule.a, model.schedule.s, "score")
    with pytest.raises(ModelError, match="to have a target of epsilon, .*, got 'score'"):
        sample(model, [0])
    model.schedule = Schedule(0 * model.schedule.a, model.schedule.s)
    with pytest.raises(ModelError, match="generates NaN or infinity"):
        sample(model, [0], steps=3)
