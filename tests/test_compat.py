"""Diffusion Classifier's functions against the published loop as bench/baselines writes it.

In float32 errors must agree to 1e-5 (2e-7 is seen) and answers exactly; in half precision to what
rounding the loop's intermediate tensors costs.
"""

from __future__ import annotations

import types
from argparse import Namespace

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from gaussian_mixture import GaussianMixture
from tiny_unet import LAYOUTS, make_unet

from bench.baselines import text_to_image as published
from bench.baselines.diffusion_classifier import n_evaluations
from dive_fast import DiveFastError
from dive_fast.compat import eval_error, eval_prob_adaptive
from dive_fast.models.given import wrap_unet
from dive_fast.models.protocol import Model, StagedModel
from dive_fast.schedule import Schedule

CHANNELS, SIZE, WIDTH = 4, 8, LAYOUTS["sd2"]["cross_attention_dim"]
N_PROMPTS = 5
published_loop = published.eval_prob_adaptive


def make_args(n_samples=(10, 50), to_keep=(3, 1), **changed) -> Namespace:
    defaults = {"n_trials": 1, "batch_size": 32, "dtype": "float32", "loss": "l2"}
    return Namespace(
        **{"n_samples": n_samples, "to_keep": to_keep, "version": "2-0", **defaults, **changed}
    )


def make_scheduler(**changed) -> EulerDiscreteScheduler:
    """Stable Diffusion's schedule, new for every run: the published loop changes it."""
    return EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **changed
    )


@pytest.fixture(scope="module")
def unet():
    return make_unet("sd2")


@pytest.fixture(scope="module")
def text():
    return make_text(N_PROMPTS)


@pytest.fixture(scope="module")
def latent():
    return torch.randn(1, CHANNELS, SIZE, SIZE, generator=torch.Generator().manual_seed(3))


def make_text(n_prompts: int) -> torch.Tensor:
    """[P, L, D]."""
    return torch.randn(n_prompts, 3, WIDTH, generator=torch.Generator().manual_seed(1))


def draw_noise(n: int, shape=(CHANNELS, SIZE, SIZE), seed: int = 9) -> torch.Tensor:
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed))


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
    unet, text, latent, n_samples, to_keep, n_trials, batch_size, loss
) -> None:
    args = make_args(n_samples, to_keep, n_trials=n_trials, batch_size=batch_size, loss=loss)
    runs = []
    for function, more in ((eval_prob_adaptive, {"mode": "paper"}), (published_loop, {})):
        torch.manual_seed(5)
        runs.append(function(unet, latent, text, make_scheduler(), args, SIZE, **more))
    assert_same(*runs, rtol=0, atol=1e-5)
    errors = torch.stack([d["pred_errors"][: 3 * n_trials].mean() for d in runs[1][1].values()])
    assert (errors.sort().values.diff() > 2e-5).all(), "prompts that are alike would prove nothing"


def test_paper_mode_with_noise_of_the_callers(unet, text, latent) -> None:
    # More noises than needed, and a side that latent_size does not say.
    arguments = (unet, latent, text, make_scheduler(), make_args(n_trials=2), 64, draw_noise(120))
    assert_same(
        eval_prob_adaptive(*arguments, mode="paper"), published_loop(*arguments), rtol=0, atol=1e-5
    )


def test_the_answer_in_a_later_stage_may_differ_from_the_first(unet, text) -> None:
    """Over several images the stages do reorder prompts, and both loops follow."""
    args, changed = make_args((3, 30), (3, 1)), 0
    for seed in range(8):
        latent = draw_noise(1, seed=seed)
        arguments = (unet, latent, text, make_scheduler(), args, SIZE, draw_noise(30, seed=seed))
        expected = published_loop(*arguments)
        assert_same(eval_prob_adaptive(*arguments, mode="paper"), expected, rtol=0, atol=1e-5)
        first = min(expected[1], key=lambda i: expected[1][i]["pred_errors"][:3].mean())
        changed += first != expected[0]
    assert changed > 0


def test_prompts_in_inference_mode(unet, text, latent) -> None:
    """The published script encodes its prompts under inference_mode."""
    with torch.inference_mode():
        arguments = (unet, latent * 1, text * 1, make_scheduler(), make_args(), SIZE)
        got = eval_prob_adaptive(*arguments, draw_noise(50), mode="paper")
    arguments = (unet, latent, text, make_scheduler(), make_args(), SIZE)
    assert_same(got, published_loop(*arguments, draw_noise(50)), rtol=0, atol=1e-5)
    assert not got[1][0]["pred_errors"].is_inference()


def test_paper_mode_in_half_precision(latent) -> None:
    unet = torch.nn.Module.to(make_unet("sd2"), torch.float16)
    args = make_args((50,), (1,), dtype="float16", batch_size=25)
    given = (latent.half(), make_text(2).half())
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


def test_bfloat16_is_close_to_float32(unet, text, latent) -> None:
    half = torch.nn.Module.to(make_unet("sd2"), torch.bfloat16)
    noise, args = draw_noise(50), make_args(dtype="bfloat16")
    arguments = (half, latent.bfloat16(), text.bfloat16(), make_scheduler(), args, SIZE, noise)
    _, data = eval_prob_adaptive(*arguments, mode="paper")
    _, exact = eval_prob_adaptive(
        unet, latent, text, make_scheduler(), make_args(), SIZE, noise, mode="paper"
    )
    for i in range(N_PROMPTS):
        torch.testing.assert_close(
            data[i]["pred_errors"][:10], exact[i]["pred_errors"][:10], rtol=0.05, atol=0
        )


def test_paper_mode_compares_to_the_noise_whatever_the_scheduler_says(unet, text, latent) -> None:
    scheduler = make_scheduler(prediction_type="v_prediction")
    arguments = (unet, latent, text, scheduler, make_args(), SIZE, draw_noise(50))
    with pytest.warns(UserWarning, match="compares every prediction to the noise") as caught:
        got = eval_prob_adaptive(*arguments, mode="paper")
    assert caught[0].filename == __file__
    assert_same(got, published_loop(*arguments), rtol=0, atol=1e-5)


def test_timesteps_are_the_schedulers_where_args_has_no_version(unet, text, latent) -> None:
    args = make_args((5,), (1,))
    del args.version
    scheduler = DDPMScheduler(num_train_timesteps=100)
    _, data = eval_prob_adaptive(
        unet, latent, text, scheduler, args, SIZE, draw_noise(5), mode="paper"
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
def test_the_race_never_takes_more_than_the_stages(
    unet, text, latent, n_samples, to_keep, n_trials
) -> None:
    """Prompts of random weights lie too close for the test to tell: the ceiling does the work."""
    args = make_args(n_samples, to_keep, n_trials=n_trials)
    arguments = (unet, latent, text, make_scheduler(), args, SIZE, draw_noise(120))
    _, data = eval_prob_adaptive(*arguments)
    _, expected = published_loop(*arguments)
    assert n_evaluations(data) <= n_evaluations(expected)
    # All prompts have the first stage; no more than it keeps go beyond it.
    counts = sorted(len(measured["t"]) for measured in data.values())
    assert len(counts) == N_PROMPTS and counts[0] >= min(n_samples[0], 20)
    assert sum(n > n_samples[0] * n_trials for n in counts) <= to_keep[0]


@pytest.mark.parametrize("n_trials", [1, 2])
def test_the_race_returns_what_it_measured(unet, text, latent, n_trials) -> None:
    args = make_args((10, 40), (3, 1), n_trials=n_trials, batch_size=13)
    noise = draw_noise(40 * n_trials)
    pred, data = eval_prob_adaptive(unet, latent, text, make_scheduler(), args, SIZE, noise)
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
            unet,
            make_scheduler(),
            latent,
            noise,
            measured["t"].tolist(),
            list(range(n)),
            text,
            [i] * n,
        )
        torch.testing.assert_close(measured["pred_errors"], expected, rtol=0, atol=1e-5)


def test_the_race_spreads_its_timesteps(unet, text, latent) -> None:
    """The published timesteps, each once per trial; every beginning covers them evenly."""
    args = make_args((25,), (1,), n_trials=2)
    # Two equal prompts race to the end.
    same = text[:1].expand(2, -1, -1)
    _, data = eval_prob_adaptive(unet, latent, same, make_scheduler(), args, SIZE)
    t = data[0]["t"]
    assert torch.equal(t.sort().values, torch.arange(20, 1000, 40).repeat_interleave(2))
    for n in (8, 16, 32):
        quarters = torch.histc(t[:n].float(), bins=4, min=0, max=1000)
        assert quarters.max() - quarters.min() <= 2


def test_the_race_compares_to_what_the_scheduler_says(unet, text, latent) -> None:
    scheduler, noise = make_scheduler(prediction_type="v_prediction"), draw_noise(6)
    args = make_args((6,), (1,))
    _, data = eval_prob_adaptive(unet, latent, text, scheduler, args, SIZE, noise)
    t = data[2]["t"]
    alpha_bar = scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
    a, s = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    x_t, v = a * latent + s * noise, a * noise - s * latent
    prediction = unet(x_t, t, encoder_hidden_states=text[2:3].expand(6, -1, -1)).sample
    expected = F.mse_loss(prediction, v, reduction="none").mean(dim=(1, 2, 3))
    torch.testing.assert_close(data[2]["pred_errors"], expected, rtol=1e-5, atol=1e-5)


def test_a_seed_fixes_the_race(unet, text, latent) -> None:
    def run(seed: int):
        torch.manual_seed(seed)
        return eval_prob_adaptive(unet, latent, text, make_scheduler(), make_args(), SIZE)

    assert_same(run(1), run(1), rtol=0, atol=0)
    assert not torch.equal(run(1)[1][0]["pred_errors"], run(2)[1][0]["pred_errors"])


# -- eval_error ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("loss", "batch_size"), [("l2", 7), ("l1", 32), ("huber", 1)])
def test_errors_of_any_rows(unet, text, latent, loss, batch_size) -> None:
    """Not a grid, with rows asked for twice, in no order."""
    generator = torch.Generator().manual_seed(0)
    ts, noise_idxs, prompts = (
        torch.randint(high, (40,), generator=generator).tolist() for high in (1000, 4, N_PROMPTS)
    )
    ts[5:10], noise_idxs[5:10], prompts[5:10] = ts[:5], noise_idxs[:5], prompts[:5]
    arguments = (unet, make_scheduler(), latent, draw_noise(4), ts, noise_idxs, text, prompts)
    got = eval_error(*arguments, batch_size, "float32", loss)
    expected = published.eval_error(*arguments, batch_size, "float32", loss)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert torch.equal(got[5:10], got[:5])


def test_errors_of_the_published_rows_fill_batches(text, latent) -> None:
    """The loop's own order: prompt by prompt, the same probes for each."""
    unet, sizes = make_unet("sd2"), []
    unet.register_forward_hook(lambda module, args, output: sizes.append(len(args[0])))
    ts, noise_idxs = [100, 400, 700] * 4, [0, 1, 2] * 4
    prompts = [i for i in range(4) for _ in range(3)]
    eval_error(unet, make_scheduler(), latent, draw_noise(3), ts, noise_idxs, text, prompts, 5)
    assert sizes == [5, 5, 2]


def test_no_rows_no_errors(unet, text, latent) -> None:
    got = eval_error(unet, make_scheduler(), latent, draw_noise(1), [], [], text, [])
    assert torch.equal(got, torch.zeros(0))


# -- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"n_samples": 10}, r"args.n_samples must list whole numbers of at least 1, got 10"),
        ({"n_samples": [10, 5.5]}, r"args.n_samples must list whole numbers .* got \[10, 5.5\]"),
        ({"n_samples": []}, r"args.n_samples must list whole numbers of at least 1, got \[\]"),
        ({"n_samples": [5, 2000]}, "at most 1000 timesteps, got 2000"),
        ({"n_samples": [10]}, "as many entries as there are stages"),
        ({"to_keep": [0, 1]}, r"args.to_keep must list whole numbers of at least 1, got \[0, 1\]"),
        ({"to_keep": [9, 1]}, r"keep at most what is left \(5 prompts\), got 9"),
        ({"to_keep": [2, 3]}, r"keep at most what is left \(2 prompts\), got 3"),
        ({"to_keep": [3, 2]}, "must end with 1"),
        ({"n_trials": 0}, "args.n_trials must be a whole number of at least 1, got 0"),
        ({"batch_size": None}, "args.batch_size must be a whole number of at least 1, got None"),
        ({"dtype": "int8"}, "args.dtype must be one of float32, bfloat16, float16, got 'int8'"),
        ({"loss": "l3"}, "args.loss must be one of l2, l1, huber, got 'l3'"),
        ({"version": "9-9"}, "args.version must be one of 1-1, .*, got '9-9'"),
    ],
)
@pytest.mark.parametrize("mode", ["race", "paper"])
def test_bad_args(unet, text, latent, mode, changed, message) -> None:
    with pytest.raises(DiveFastError, match=message):
        args = make_args(**changed)
        eval_prob_adaptive(unet, latent, text, make_scheduler(), args, SIZE, mode=mode)


NAN = torch.full((1, CHANNELS, SIZE, SIZE), torch.nan)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"unet": "unet.bin"}, "expected a unet that can be called, got str"),
        ({"latent": [0.0]}, r"latent must be a float tensor \[1, C, h, w\], got list"),
        ({"latent": torch.zeros(1, 4, 8, 8, dtype=torch.int64)}, "float tensor .* got torch.int64"),
        ({"latent": torch.zeros(2, 4, 8, 8)}, r"shape \[1, C, h, w\], got \[2, 4, 8, 8\]"),
        ({"latent": torch.zeros(4, 8, 8)}, r"shape \[1, C, h, w\], got \[4, 8, 8\]"),
        ({"latent": torch.zeros(1, 3, 8, 8)}, r"shape \[1, 4, h, w\] for this unet"),
        ({"latent": NAN}, "latent must be finite"),
        ({"latent_size": 64}, r"\[1, C, 64, 64\] for latent_size=64, got \[1, 4, 8, 8\]"),
        ({"text_embeds": torch.zeros(5, WIDTH)}, r"shape \[P, L, D\], got \[5, 20\]"),
        ({"text_embeds": torch.zeros(0, 3, WIDTH)}, r"shape \[P, L, D\], got \[0, 3, 20\]"),
        ({"text_embeds": torch.zeros(5, 3, 9)}, r"shape \[C, L, 20\] for this unet, .*3, 9\]"),
        ({"text_embeds": None}, r"text_embeds must be a float tensor .* got NoneType"),
        ({"scheduler": FlowMatchEulerDiscreteScheduler()}, "got FlowMatchEulerDiscreteScheduler"),
        (
            {"scheduler": DDPMScheduler(num_train_timesteps=10)},
            "1000 timesteps, .* scheduler of 10",
        ),
        ({"all_noise": draw_noise(49)}, r"\[N >= 50, 4, 8, 8\], got \[49, 4, 8, 8\]"),
        ({"all_noise": draw_noise(50, (4, 4, 4))}, r"\[N >= 50, 4, 8, 8\], got \[50, 4, 4, 4\]"),
        ({"all_noise": NAN.expand(50, -1, -1, -1)}, "noise must be finite"),
        ({"args": Namespace(n_samples=[5])}, "Namespace without to_keep, n_trials, batch_size"),
        ({"mode": "fast"}, "mode must be one of race, paper, got 'fast'"),
    ],
)
def test_bad_arguments(unet, text, latent, changed, message) -> None:
    arguments = {
        "unet": unet,
        "latent": latent,
        "text_embeds": text,
        "scheduler": make_scheduler(),
        "args": make_args(),
        "latent_size": SIZE,
        **changed,
    }
    with pytest.raises(DiveFastError, match=message):
        eval_prob_adaptive(**arguments)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"ts": [0, 1000]}, r"ts must lie in \[0, 1000\), got values from 0 to 1000"),
        ({"ts": [0.5, 1.5]}, "ts must be a list of whole numbers, got torch.float32"),
        ({"ts": [1]}, r"must be as long, got \[1, 2, 2\]"),
        ({"noise_idxs": [-1, 0]}, r"noise_idxs must lie in \[0, 3\), got values from -1 to 0"),
        ({"text_embed_idxs": [0, 5]}, r"text_embed_idxs must lie in \[0, 5\)"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, got 0"),
        ({"dtype": "float8"}, "dtype must be one of .* got 'float8'"),
        ({"loss": "l3"}, "loss must be one of l2, l1, huber, got 'l3'"),
        ({"all_noise": None}, r"all_noise must have shape \[N >= 1, 4, 8, 8\], got NoneType"),
        ({"latent": NAN}, "latent must be finite"),
    ],
)
def test_bad_rows(unet, text, latent, changed, message) -> None:
    arguments = {
        "unet": unet,
        "scheduler": make_scheduler(),
        "latent": latent,
        "all_noise": draw_noise(3),
        "ts": [1, 2],
        "noise_idxs": [0, 1],
        "text_embeds": text,
        "text_embed_idxs": [0, 1],
        **changed,
    }
    with pytest.raises(DiveFastError, match=message):
        eval_error(**arguments)


def test_a_network_that_needs_more_than_text(text, latent) -> None:
    with pytest.raises(DiveFastError, match="also needs 'text_time'"):
        eval_prob_adaptive(
            make_unet("sdxl", cross_attention_dim=WIDTH),
            latent,
            text,
            make_scheduler(),
            make_args(),
            SIZE,
        )


@pytest.mark.parametrize("mode", ["race", "paper"])
def test_errors_that_are_not_finite(text, latent, mode) -> None:
    unet = make_unet("sd2")
    unet.conv_out.bias.fill_(torch.nan)
    with pytest.raises(DiveFastError, match="expected finite errors from the given unet"):
        eval_prob_adaptive(unet, latent, text, make_scheduler(), make_args(), SIZE, mode=mode)


# -- the network behind the functions ------------------------------------------------------------


@pytest.mark.parametrize("layout", ["sd1", "sd2", "ldm", "ldm_layout", "no_mid"])
def test_the_parts_make_the_whole(layout) -> None:
    unet = make_unet(layout)
    c, width = unet.config.in_channels, unet.config.cross_attention_dim
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(3, 5, width, generator=generator)
    schedule = Schedule.from_alpha_bar(make_scheduler().alphas_cumprod)
    model = wrap_unet(unet, text, schedule, (c, 8, 8))
    assert isinstance(model, StagedModel)
    x_t, t = torch.randn(4, c, 8, 8, generator=generator), torch.tensor([3, 500, 3, 999])
    classes = torch.tensor([0, 2, 1, 2])
    condition = model.vocabulary.table[classes]
    expected = unet(x_t, t, encoder_hidden_states=text[classes]).sample
    torch.testing.assert_close(model.predict(x_t, t, condition), expected)
    projected = tuple(part[classes] for part in model.project(model.vocabulary.table))
    parts = model.decoder(model.encoder(model.prefix(x_t, t), projected), projected)
    torch.testing.assert_close(parts, expected, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_cut_runs_whole(text, latent) -> None:
    hooked = make_unet("sd2")
    hooked.register_forward_hook(lambda module, args, output: None)
    schedule = Schedule.from_alpha_bar(make_scheduler().alphas_cumprod)
    model = wrap_unet(hooked, text, schedule, latent.shape[1:])
    assert isinstance(model, Model) and not isinstance(model, StagedModel)


def test_a_given_unet_takes_no_pictures(unet, text, latent) -> None:
    model = wrap_unet(unet, text, Schedule(torch.ones(1), torch.zeros(1)), latent.shape[1:])
    with pytest.raises(DiveFastError, match="expected latents, got pictures"):
        model.encode(latent)


def test_the_published_loop_reports_its_cost(unet, text, latent) -> None:
    arguments = (unet, latent, text, make_scheduler(), make_args(), SIZE, draw_noise(50))
    run = published.run(*arguments)
    assert run.answer == published_loop(*arguments)[0]
    assert run.evaluations == N_PROMPTS * 10 + 3 * 40
    assert run.seconds > 0
