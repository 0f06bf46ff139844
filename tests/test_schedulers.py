"""x_t of a schedule against diffusers' own ``add_noise``, and what is refused instead."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from tiny_transformer import make_dit

from dive_fast import DiffusionClassifier, ModelError, ProbeList
from dive_fast.core.schedule import Schedule
from dive_fast.models import load_model

T = 50
# Samplers whose add_noise gives x0 + sigma eps, which they then scale to x_t.
BY_SIGMA = {
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
}
BY_ALPHA = {
    "CogVideoXDDIMScheduler",
    "CogVideoXDPMScheduler",
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepInverseScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "LCMScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
    "TCDScheduler",
    "UnCLIPScheduler",
    "UniPCMultistepScheduler",
}
RESCALED = {
    "CogVideoXDDIMScheduler",
    "CogVideoXDPMScheduler",
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerDiscreteScheduler",
    "LCMScheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
}
# Neither betas nor alpha_bar, other states than x_t, or constructors that need more.
WITHOUT_BETAS = [
    "AmusedScheduler",
    "ConsistencyDecoderScheduler",
    "CMStochasticIterativeScheduler",
    "DDPMWuerstchenScheduler",
    "EDMDPMSolverMultistepScheduler",
    "EDMEulerScheduler",
    "IPNDMScheduler",
    "KarrasVeScheduler",
    "SCMScheduler",
    "ScoreSdeVeScheduler",
    "VQDiffusionScheduler",
]


# Their add_noise is right only after set_timesteps, and at the timesteps that are then set.
AFTER_SET = {
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler",
}


def timesteps_of(scheduler) -> list[int]:
    """Where its add_noise is defined."""
    if type(scheduler).__name__ not in AFTER_SET:
        return list(range(T))
    scheduler.set_timesteps(T)
    return scheduler.timesteps.unique().tolist()


def own_x_t(scheduler, x0: torch.Tensor, eps: torch.Tensor, t: int) -> torch.Tensor:
    """By diffusers."""
    noisy = scheduler.add_noise(x0, eps, torch.tensor([t]))
    if type(scheduler).__name__ not in BY_SIGMA:
        return noisy
    alpha_bar = scheduler.alphas_cumprod[t]
    return noisy * alpha_bar.sqrt().float()


def options_of(name: str) -> list[dict]:
    found = [{}, {"beta_schedule": "squaredcos_cap_v2"}]
    if name != "UnCLIPScheduler":
        found += [
            {"beta_schedule": "linear", "beta_start": 0.002, "beta_end": 0.2},
            {"trained_betas": np.linspace(0.01, 0.3, T).tolist()},
        ]
    if name in RESCALED:
        found.append({"rescale_betas_zero_snr": True})
    if name.startswith("CogVideoX"):
        found += [{"snr_shift_scale": 1.0}, {"snr_shift_scale": 1.0005}, {"snr_shift_scale": 2.5}]
    return found


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", sorted(BY_SIGMA | BY_ALPHA))
def test_x_t_is_that_of_the_scheduler(name: str, tmp_path: Path) -> None:
    if name == "LMSDiscreteScheduler":
        pytest.importorskip("scipy")
    x0, eps = torch.randn(2, 1, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    for options in options_of(name):
        scheduler = getattr(diffusers, name)(num_train_timesteps=T, **options)
        scheduler.save_config(tmp_path)
        config = json.loads((tmp_path / "scheduler_config.json").read_text())
        schedule = Schedule.from_config(config)
        assert len(schedule) == T
        timesteps = timesteps_of(scheduler)
        assert len(timesteps) > 0.9 * T
        for t in timesteps:
            got = schedule.a[t] * x0 + schedule.s[t] * eps
            # Samplers that cannot take alpha_bar = 0 keep 2^-24 instead: a = 2^-12.
            slack = 3e-3 if options.get("rescale_betas_zero_snr") and t == T - 1 else 2e-5
            expected = own_x_t(scheduler, x0, eps, t).float()
            torch.testing.assert_close(got, expected, rtol=0, atol=slack, msg=f"{options} {t}")


def test_a_shift_that_another_class_does_not_know_is_refused() -> None:
    """CogVideoX's schedule read by DDIM: diffusers would drop the shift without a word."""
    shifted = diffusers.CogVideoXDDIMScheduler(snr_shift_scale=3.0)
    config = dict(diffusers.DDIMScheduler.from_config(shifted.config).config)
    assert config["snr_shift_scale"] == 3.0
    with pytest.raises(ModelError, match=r"DDIMScheduler takes no snr_shift_scale, got 3.0"):
        Schedule.from_config({**config, "_class_name": "DDIMScheduler"})
    unshifted = Schedule.from_config({"_class_name": "DDIMScheduler", "snr_shift_scale": 1.0})
    assert torch.equal(unshifted.a, Schedule.from_config({"_class_name": "DDIMScheduler"}).a)
    with pytest.raises(ModelError, match="UnCLIPScheduler takes no trained_betas"):
        Schedule.from_config({"_class_name": "UnCLIPScheduler", "trained_betas": [0.1]})


STATED = {"beta_schedule": "linear", "beta_start": 0.001, "beta_end": 0.01}


@pytest.mark.parametrize("name", WITHOUT_BETAS)
@pytest.mark.parametrize("stated", [{}, STATED])
def test_a_scheduler_without_betas_is_refused_in_a_sentence(name: str, stated: dict) -> None:
    with pytest.raises(ModelError, match=r"betas|flow schedules|takes no|prediction_type") as error:
        Schedule.from_config({"_class_name": name, **stated})
    assert str(error.value).endswith(".") and "\n" not in str(error.value)


def test_only_what_ddpm_knows_is_read_as_ddpm() -> None:
    expected = Schedule.from_config({"_class_name": "DDPMScheduler", **STATED})
    plain = {**STATED, "clip_sample": False, "thresholding": False, "_diffusers_version": "0.1"}
    for config in ({"_class_name": "Mine", **plain}, plain, {**plain, "skip_prk_steps": True}):
        assert torch.equal(Schedule.from_config(config).a, expected.a)
    for config, got in [
        ({"_class_name": "Mine", **plain, "shift": 3.0}, "got Mine with 'shift'"),
        ({"_class_name": "Mine", **plain, "sigma_max": 8}, "got Mine with 'sigma_max'"),
        ({**plain, "snr_shift_scale": 3.0}, "got no _class_name with 'snr_shift_scale'"),
    ]:
        with pytest.raises(ModelError, match=f"{got}, which may change them"):
            Schedule.from_config(config)


@pytest.mark.parametrize(
    "config",
    [
        {"use_karras_sigmas": True},
        {"use_beta_sigmas": True},
        {"use_exponential_sigmas": True},
        {"timestep_spacing": "trailing", "steps_offset": 1},
        {"sigma_min": 0.03, "sigma_max": 14.0},
        {"final_sigmas_type": "sigma_min"},
        {"interpolation_type": "log_linear"},
    ],
)
def test_options_of_sampling_do_not_change_x_t(config: dict) -> None:
    name = {"_class_name": "EulerDiscreteScheduler"}
    assert torch.equal(Schedule.from_config({**name, **config}).a, Schedule.from_config(name).a)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        *(({"num_train_timesteps": n}, "num_train_timesteps of 1 to 100000, got")
          for n in (10**9, 0, -1, "1000", 1000.0, True, None, [5])),
        *(({"trained_betas": [*betas]}, "of which only the last may be 1, got")
          for betas in ([0.1, 1.0, 0.1], [10**300], [1e300], [[0.1], [0.2]], ["0.1"],
                        [float("nan")], [True], [0.0], [-0.1], [None])),
        ({"trained_betas": [0.5, 1 - 1e-12, 0.1]}, "between 0 and 1"),  # 1 in float32
        ({"trained_betas": [1e-60, 0.1]}, "between 0 and 1"),  # 0 in float32
        ({"trained_betas": [1.0]}, "must leave a part of the image"),
        ({"trained_betas": "0.1 0.2"}, "a list of numbers as trained_betas, got '0.1 0.2'"),
        ({"trained_betas": [0.1] * 10**7}, "1 to 100000 trained_betas, got 10000000"),
        ({"beta_start": "0.1"}, "at least 0 as beta_start, got '0.1'"),
        ({"beta_end": None}, "at least 0 as beta_end, got None"),
        ({"beta_start": -0.1}, "at least 0 as beta_start, got -0.1"),
        ({"num_train_timesteps": 1, "rescale_betas_zero_snr": True}, "one timestep cannot be"),
        ({"rescale_betas_zero_snr": "no"}, "true or false as rescale_betas_zero_snr, got 'no'"),
        ({"_class_name": ["DDPMScheduler"]}, "the name of a scheduler as _class_name"),
        ({"_class_name": "CogVideoXDDIMScheduler", "snr_shift_scale": 0}, "above 0 as snr_shift"),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}, "'discrete'"),
        ({"prediction_type": "flow_prediction"}, "prediction_type of epsilon"),
        ([], "the configuration of a scheduler, got list"),
    ],
    ids=range(33),
)  # fmt: skip
def test_what_is_no_schedule_is_one_short_sentence(config: dict, message: str) -> None:
    with pytest.raises(ModelError, match=message) as error:
        Schedule.from_config(config)
    text = str(error.value)
    assert text.endswith(".") and "\n" not in text and len(text) < 250


ZERO = {"rescale_betas_zero_snr": True}


def test_factors_are_finite() -> None:
    for betas in (torch.tensor([0.1, 1.1]), torch.tensor([0.1, float("nan")]), -torch.ones(2)):
        with pytest.raises(ModelError, match="factors a and s that are finite, got NaN"):
            Schedule.from_betas(betas)


def test_betas_that_end_in_one_are_the_flag() -> None:
    flag = Schedule.from_config({"rescale_betas_zero_snr": True})
    betas = diffusers.DDIMScheduler(rescale_betas_zero_snr=True).betas.tolist()
    assert betas[-1] == 1.0
    for config in ({"trained_betas": betas}, {"trained_betas": betas, **ZERO}):
        schedule = Schedule.from_config(config)
        assert schedule.a[-1] == 0 and schedule.s[-1] == 1
        torch.testing.assert_close(schedule.a, flag.a, rtol=0, atol=1e-4)


@pytest.mark.parametrize("target", ["epsilon", "v_prediction", "sample"])
def test_probes_at_a_zero_terminal_snr_are_finite(target: str) -> None:
    model = make_dit(target=target)
    model.schedule = Schedule.from_config({**ZERO, "prediction_type": target})
    noise = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    probes = ProbeList(torch.tensor([999, 999]), noise)
    x0 = torch.randn(model.latent_shape, generator=torch.Generator().manual_seed(1))
    losses = DiffusionClassifier(model).losses(latents=x0[None], probes=probes)
    prediction = model.predict(noise, torch.tensor([999, 999]), model.vocabulary.table[[2, 2]])
    wanted = {"epsilon": noise, "v_prediction": -x0.expand_as(noise), "sample": x0}[target]
    expected = (prediction[:, : len(x0)] - wanted).square().mean(dim=(1, 2, 3))
    assert torch.isfinite(losses).all()
    torch.testing.assert_close(losses[0, 2], expected, rtol=1e-4, atol=0)


def test_a_layout_model_whose_scheduler_cannot_be_made_is_refused(layout_dir, tmp_path) -> None:
    """Its schedule is known, but the sampler that would be saved again is not."""
    shutil.copytree(layout_dir, tmp_path / "model")
    path = tmp_path / "model" / "scheduler" / "scheduler_config.json"
    both = {"use_karras_sigmas": True, "use_exponential_sigmas": True}
    path.write_text(json.dumps({"_class_name": "EulerDiscreteScheduler", **both}))
    with pytest.raises(ModelError, match=r"scheduler in .* cannot be made: .*can be used"):
        load_model(tmp_path / "model")
