"""Diffusion Classifier's functions against the published loop as bench/baselines writes it.

In float32 errors must agree to 1e-5 (2e-7 is seen) and answers exactly; in half precision to what
rounding the loop's intermediate tensors costs.
"""

from __future__ import annotations

import types

import pytest
import torch
import torch.nn.functional as F
from compat_inputs import (
    LATENT,
    N_PROMPTS,
    SIZE,
    TEXT,
    draw_noise,
    make_args,
    make_scheduler,
    make_text,
)
from diffusers import DDPMScheduler, EulerDiscreteScheduler
from gaussian_mixture import GaussianMixture
from tiny_unet import make_unet

from bench.baselines import text_to_image as published
from bench.baselines.diffusion_classifier import n_evaluations
from dive_fast.compat import eval_error, eval_prob_adaptive

published_loop = published.eval_prob_adaptive


def assert_same(got, expected, **tolerance) -> None:
    """The same answer, from the same timesteps, with the same errors, in the same types."""
    (pred, data), (expected_pred, expected_data) = got, expected
    assert pred == expected_pred and type(pred) is type(expected_pred) is int
    assert list(data) == list(expected_data)
    for i, measured in expected_data.items():
        assert list(data[i]) == list(measured) == ["t", "pred_errors"]
        assert torch.equal(data[i]["t"], measured["t"])
        # Compares dtypes and devices too.
        torch.testing.assert_close(data[i]["pred_errors"], measured["pred_errors"], **tolerance)


# -- paper mode ----------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["l2", "l1", "huber"])
@pytest.mark.parametrize(
    ("n_samples", "to_keep", "n_trials", "batch_size"),
    [
        ([10, 50], [3, 1], 1, 7),
        ([4, 20, 40], [4, 2, 1], 2, 33),
        # 1000 // 60 leaves a rest, 60 // 7 too.
        ([7, 60], [2, 1], 1, 500),
        ([3], [1], 3, 1),
    ],
)
def test_paper_mode_is_the_published_loop(
    sd2_unet, n_samples, to_keep, n_trials, batch_size, loss
) -> None:
    args = make_args(n_samples, to_keep, n_trials=n_trials, batch_size=batch_size, loss=loss)
    runs = []
    for function, more in ((eval_prob_adaptive, {"mode": "paper"}), (published_loop, {})):
        torch.manual_seed(5)
        runs.append(function(sd2_unet, LATENT, TEXT, make_scheduler(), args, SIZE, **more))
    assert_same(*runs, rtol=0, atol=1e-5)
    errors = torch.stack([d["pred_errors"][: 3 * n_trials].mean() for d in runs[1][1].values()])
    assert (errors.sort().values.diff() > 2e-5).all(), "prompts that are alike would prove nothing"


def test_paper_mode_with_noise_of_the_callers(sd2_unet) -> None:
    # More noises than needed, and a side that latent_size does not say.
    arguments = (
        sd2_unet,
        LATENT,
        TEXT,
        make_scheduler(),
        make_args(n_trials=2),
        64,
        draw_noise(120),
    )
    assert_same(
        eval_prob_adaptive(*arguments, mode="paper"), published_loop(*arguments), rtol=0, atol=1e-5
    )


def test_the_answer_in_a_later_stage_may_differ_from_the_first(sd2_unet) -> None:
    """Over several images the stages do reorder prompts, and both loops follow."""
    args, changed = make_args((3, 30), (3, 1)), 0
    for seed in range(8):
        latent = draw_noise(1, seed=seed)
        arguments = (
            sd2_unet,
            latent,
            TEXT,
            make_scheduler(),
            args,
            SIZE,
            draw_noise(30, seed=seed),
        )
        expected = published_loop(*arguments)
        assert_same(eval_prob_adaptive(*arguments, mode="paper"), expected, rtol=0, atol=1e-5)
        first = min(expected[1], key=lambda i: expected[1][i]["pred_errors"][:3].mean())
        changed += first != expected[0]
    assert changed > 0


def test_prompts_in_inference_mode(sd2_unet) -> None:
    """The published script encodes its prompts under inference_mode."""
    with torch.inference_mode():
        arguments = (sd2_unet, LATENT * 1, TEXT * 1, make_scheduler(), make_args(), SIZE)
        got = eval_prob_adaptive(*arguments, draw_noise(50), mode="paper")
    arguments = (sd2_unet, LATENT, TEXT, make_scheduler(), make_args(), SIZE)
    assert_same(got, published_loop(*arguments, draw_noise(50)), rtol=0, atol=1e-5)
    assert not got[1][0]["pred_errors"].is_inference()


def test_paper_mode_in_half_precision() -> None:
    unet = torch.nn.Module.to(make_unet("sd2"), torch.float16)
    args = make_args((50,), (1,), dtype="float16", batch_size=25)
    given = (LATENT.half(), make_text(2).half())
    # alpha_bar stays near 1 for long, where its rounding, which belongs to the loop, matters most.
    first, second = (
        EulerDiscreteScheduler(beta_start=1e-6, beta_end=0.012, beta_schedule="scaled_linear")
        for _ in range(2)
    )
    got = eval_prob_adaptive(unet, *given, first, args, SIZE, draw_noise(50), mode="paper")
    assert first.alphas_cumprod.dtype == torch.float32, "the caller's scheduler is left alone"
    expected = published_loop(unet, *given, second, args, SIZE, draw_noise(50))
    # The loop rounds x_t and the mean to 11 bits: 6e-4 is seen, 3e-3 with alpha_bar unrounded.
    assert_same(got, expected, rtol=1.5e-3, atol=0)


def test_bfloat16_is_close_to_float32(sd2_unet) -> None:
    half = torch.nn.Module.to(make_unet("sd2"), torch.bfloat16)
    noise, args = draw_noise(50), make_args(dtype="bfloat16")
    arguments = (half, LATENT.bfloat16(), TEXT.bfloat16(), make_scheduler(), args, SIZE, noise)
    _, data = eval_prob_adaptive(*arguments, mode="paper")
    _, exact = eval_prob_adaptive(
        sd2_unet, LATENT, TEXT, make_scheduler(), make_args(), SIZE, noise, mode="paper"
    )
    for i in range(N_PROMPTS):
        torch.testing.assert_close(
            data[i]["pred_errors"][:10], exact[i]["pred_errors"][:10], rtol=0.05, atol=0
        )


def test_paper_mode_compares_to_the_noise_whatever_the_scheduler_says(sd2_unet) -> None:
    scheduler = make_scheduler(prediction_type="v_prediction")
    arguments = (sd2_unet, LATENT, TEXT, scheduler, make_args(), SIZE, draw_noise(50))
    with pytest.warns(UserWarning, match="compares every prediction to the noise") as caught:
        got = eval_prob_adaptive(*arguments, mode="paper")
    assert caught[0].filename == __file__
    assert_same(got, published_loop(*arguments), rtol=0, atol=1e-5)


def test_timesteps_are_the_schedulers_where_args_has_no_version(sd2_unet) -> None:
    args = make_args((5,), (1,))
    del args.version
    scheduler = DDPMScheduler(num_train_timesteps=100)
    _, data = eval_prob_adaptive(
        sd2_unet, LATENT, TEXT, scheduler, args, SIZE, draw_noise(5), mode="paper"
    )
    assert data[0]["t"].tolist() == [10, 30, 50, 70, 90]


# -- the race ------------------------------------------------------------------------------------


class ToyUNet:
    """The analytic Gaussian mixture, called as a UNet is: here answers mean something."""

    def __init__(self, n_prompts: int) -> None:
        self.toy = GaussianMixture.random(n_prompts, (2, 3, 3), spread=0.6, seed=0)
        self.alphas_cumprod = make_scheduler().alphas_cumprod
        self.text = self.toy.table[:, None]

    def __call__(self, x_t, t, encoder_hidden_states):
        a, s = self.alphas_cumprod[t].sqrt(), (1 - self.alphas_cumprod[t]).sqrt()
        sample = self.toy.predict(x_t, a, s, encoder_hidden_states[:, 0])
        return types.SimpleNamespace(sample=sample)


def test_the_race_agrees_with_enumeration_for_less() -> None:
    unet = ToyUNet(12)
    x0, _ = unet.toy.sample(40, torch.Generator().manual_seed(3))
    stages, full = make_args((50, 200), (6, 1)), make_args((200,), (1,))
    noise, agree, spent, enumerated = draw_noise(200, (2, 3, 3)), 0, 0, 0
    for latent in x0.split(1):
        arguments = (unet, latent, unet.text, make_scheduler())
        pred, data = eval_prob_adaptive(*arguments, stages, all_noise=noise)
        expected, everything = published_loop(*arguments, full, all_noise=noise)
        agree += pred == expected
        spent += n_evaluations(data)
        enumerated += n_evaluations(everything)
    assert agree >= 39
    assert enumerated == 40 * 12 * 200
    assert spent < 0.5 * enumerated


@pytest.mark.parametrize(
    ("n_samples", "to_keep", "n_trials"),
    [([10, 50], [3, 1], 1), ([4, 20, 40], [4, 2, 1], 2), ([3, 7, 10], [4, 2, 1], 3)]
    + [([20, 5, 20], [3, 2, 1], 1), ([1], [1], 1)],
)
def test_the_race_never_takes_more_than_the_stages(sd2_unet, n_samples, to_keep, n_trials) -> None:
    """Prompts of random weights lie too close for the test to tell: the ceiling does the work."""
    args = make_args(n_samples, to_keep, n_trials=n_trials)
    arguments = (sd2_unet, LATENT, TEXT, make_scheduler(), args, SIZE, draw_noise(120))
    _, data = eval_prob_adaptive(*arguments)
    _, expected = published_loop(*arguments)
    assert n_evaluations(data) <= n_evaluations(expected)
    # All prompts have the first stage; no more than it keeps go beyond it.
    counts = sorted(len(measured["t"]) for measured in data.values())
    assert len(counts) == N_PROMPTS and counts[0] >= min(n_samples[0], 20)
    assert sum(n > n_samples[0] * n_trials for n in counts) <= to_keep[0]


@pytest.mark.parametrize("n_trials", [1, 2])
def test_the_race_returns_what_it_measured(sd2_unet, n_trials) -> None:
    args = make_args((10, 40), (3, 1), n_trials=n_trials, batch_size=13)
    noise = draw_noise(40 * n_trials)
    pred, data = eval_prob_adaptive(sd2_unet, LATENT, TEXT, make_scheduler(), args, SIZE, noise)
    assert type(pred) is int and list(data) == list(range(N_PROMPTS))
    longest = max((data[i]["t"] for i in data), key=len)
    for measured in data.values():
        t, errors = measured["t"], measured["pred_errors"]
        assert t.dtype == torch.int64 and errors.dtype == torch.float32
        assert t.shape == errors.shape and t.device.type == errors.device.type == "cpu"
        assert torch.equal(t, longest[: len(t)]), "all prompts meet the same probes"
    for i, measured in data.items():
        n = len(measured["t"])
        expected = published.eval_error(
            sd2_unet,
            make_scheduler(),
            LATENT,
            noise,
            measured["t"].tolist(),
            list(range(n)),
            TEXT,
            [i] * n,
        )
        torch.testing.assert_close(measured["pred_errors"], expected, rtol=0, atol=1e-5)


def test_the_race_spreads_its_timesteps(sd2_unet) -> None:
    """The published timesteps, each once per trial; every beginning covers them evenly."""
    args = make_args((25,), (1,), n_trials=2)
    # Two equal prompts race to the end.
    same = TEXT[:1].expand(2, -1, -1)
    _, data = eval_prob_adaptive(sd2_unet, LATENT, same, make_scheduler(), args, SIZE)
    t = data[0]["t"]
    assert torch.equal(t.sort().values, torch.arange(20, 1000, 40).repeat_interleave(2))
    for n in (8, 16, 32):
        quarters = torch.histc(t[:n].float(), bins=4, min=0, max=1000)
        assert quarters.max() - quarters.min() <= 2


def test_the_race_compares_to_what_the_scheduler_says(sd2_unet) -> None:
    scheduler, noise = make_scheduler(prediction_type="v_prediction"), draw_noise(6)
    args = make_args((6,), (1,))
    _, data = eval_prob_adaptive(sd2_unet, LATENT, TEXT, scheduler, args, SIZE, noise)
    t = data[2]["t"]
    alpha_bar = scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
    a, s = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    x_t, v = a * LATENT + s * noise, a * noise - s * LATENT
    prediction = sd2_unet(x_t, t, encoder_hidden_states=TEXT[2:3].expand(6, -1, -1)).sample
    expected = F.mse_loss(prediction, v, reduction="none").mean(dim=(1, 2, 3))
    torch.testing.assert_close(data[2]["pred_errors"], expected, rtol=1e-5, atol=1e-5)


def test_a_seed_fixes_the_race(sd2_unet) -> None:
    def run(seed: int):
        torch.manual_seed(seed)
        return eval_prob_adaptive(sd2_unet, LATENT, TEXT, make_scheduler(), make_args(), SIZE)

    assert_same(run(1), run(1), rtol=0, atol=0)
    assert not torch.equal(run(1)[1][0]["pred_errors"], run(2)[1][0]["pred_errors"])


# -- eval_error ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("loss", "batch_size"), [("l2", 7), ("l1", 32), ("huber", 1)])
def test_errors_of_any_rows(sd2_unet, loss, batch_size) -> None:
    """Not a grid, with rows asked for twice, in no order."""
    generator = torch.Generator().manual_seed(0)
    ts, noise_idxs, prompts = (
        torch.randint(high, (40,), generator=generator).tolist() for high in (1000, 4, N_PROMPTS)
    )
    ts[5:10], noise_idxs[5:10], prompts[5:10] = ts[:5], noise_idxs[:5], prompts[:5]
    arguments = (sd2_unet, make_scheduler(), LATENT, draw_noise(4), ts, noise_idxs, TEXT, prompts)
    got = eval_error(*arguments, batch_size, "float32", loss)
    expected = published.eval_error(*arguments, batch_size, "float32", loss)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert torch.equal(got[5:10], got[:5])


def test_errors_of_the_published_rows_fill_batches() -> None:
    """The loop's own order: prompt by prompt, the same probes for each."""
    unet, sizes = make_unet("sd2"), []
    unet.register_forward_hook(lambda module, args, output: sizes.append(len(args[0])))
    ts, noise_idxs = [100, 400, 700] * 4, [0, 1, 2] * 4
    prompts = [i for i in range(4) for _ in range(3)]
    eval_error(unet, make_scheduler(), LATENT, draw_noise(3), ts, noise_idxs, TEXT, prompts, 5)
    assert sizes == [5, 5, 2]


def test_no_rows_no_errors(sd2_unet) -> None:
    got = eval_error(sd2_unet, make_scheduler(), LATENT, draw_noise(1), [], [], TEXT, [])
    assert torch.equal(got, torch.zeros(0))


# -- the published loop itself -------------------------------------------------------------------


def test_the_published_loop_reports_its_cost(sd2_unet) -> None:
    arguments = (sd2_unet, LATENT, TEXT, make_scheduler(), make_args(), SIZE, draw_noise(50))
    run = published.run(*arguments)
    assert run.answer == published_loop(*arguments)[0]
    assert run.evaluations == N_PROMPTS * 10 + 3 * 40
    assert run.seconds > 0
