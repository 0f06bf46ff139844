"""What Diffusion Classifier's functions refuse, and the network behind them."""

from __future__ import annotations

from argparse import Namespace

import pytest
import torch
from compat_inputs import (
    CHANNELS,
    LATENT,
    SIZE,
    TEXT,
    WIDTH,
    draw_noise,
    make_args,
    make_scheduler,
)
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from tiny_unet import make_unet

from dive_fast import DiveFastError
from dive_fast.compat import eval_error, eval_prob_adaptive
from dive_fast.core.schedule import Schedule
from dive_fast.models.protocol import Model, StagedModel
from dive_fast.models.unet.wrapped import wrap_unet

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
def test_bad_args(sd2_unet, mode, changed, message) -> None:
    with pytest.raises(DiveFastError, match=message):
        args = make_args(**changed)
        eval_prob_adaptive(sd2_unet, LATENT, TEXT, make_scheduler(), args, SIZE, mode=mode)


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
def test_bad_arguments(sd2_unet, changed, message) -> None:
    arguments = {
        "unet": sd2_unet,
        "latent": LATENT,
        "text_embeds": TEXT,
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
def test_bad_rows(sd2_unet, changed, message) -> None:
    arguments = {
        "unet": sd2_unet,
        "scheduler": make_scheduler(),
        "latent": LATENT,
        "all_noise": draw_noise(3),
        "ts": [1, 2],
        "noise_idxs": [0, 1],
        "text_embeds": TEXT,
        "text_embed_idxs": [0, 1],
        **changed,
    }
    with pytest.raises(DiveFastError, match=message):
        eval_error(**arguments)


def test_a_network_that_needs_more_than_text() -> None:
    with pytest.raises(DiveFastError, match="also needs 'text_time'"):
        eval_prob_adaptive(
            make_unet("sdxl", cross_attention_dim=WIDTH),
            LATENT,
            TEXT,
            make_scheduler(),
            make_args(),
            SIZE,
        )


@pytest.mark.parametrize("mode", ["race", "paper"])
def test_errors_that_are_not_finite(mode) -> None:
    unet = make_unet("sd2")
    unet.conv_out.bias.fill_(torch.nan)
    with pytest.raises(DiveFastError, match="expected finite losses from the given unet"):
        eval_prob_adaptive(unet, LATENT, TEXT, make_scheduler(), make_args(), SIZE, mode=mode)


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


def test_what_cannot_be_cut_runs_whole() -> None:
    hooked = make_unet("sd2")
    hooked.register_forward_hook(lambda module, args, output: None)
    schedule = Schedule.from_alpha_bar(make_scheduler().alphas_cumprod)
    model = wrap_unet(hooked, TEXT, schedule, LATENT.shape[1:])
    assert isinstance(model, Model) and not isinstance(model, StagedModel)


def test_a_given_unet_takes_no_pictures(sd2_unet) -> None:
    model = wrap_unet(sd2_unet, TEXT, Schedule(torch.ones(1), torch.zeros(1)), LATENT.shape[1:])
    with pytest.raises(DiveFastError, match="expected latents, got images"):
        model.encode(LATENT)
