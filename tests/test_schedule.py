"""Schedules against diffusers' own, and the vocabulary's projection."""

from __future__ import annotations

import json

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
)

from dive_fast import DiveFastError, ModelError, ProbeList
from dive_fast.core.schedule import Schedule, make_betas
from dive_fast.core.vocabulary import Vocabulary


@pytest.mark.parametrize(
    "beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"]
)
@pytest.mark.parametrize("target", ["epsilon", "v_prediction", "sample"])
def test_read_from_a_scheduler_config(beta_schedule, target):
    scheduler = DDPMScheduler(
        num_train_timesteps=700,
        beta_schedule=beta_schedule,
        beta_start=2e-4,
        beta_end=0.015,
        prediction_type=target,
    )
    schedule = Schedule.from_config(scheduler.config)
    assert len(schedule) == 700 and schedule.target == target
    # diffusers multiplies up in float32.
    torch.testing.assert_close(schedule.a**2, scheduler.alphas_cumprod, rtol=2e-4, atol=1e-9)
    torch.testing.assert_close(schedule.a**2 + schedule.s**2, torch.ones(700))


@pytest.mark.parametrize("target", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    "sampler", [PNDMScheduler, DDIMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler]
)
def test_every_sampler_describes_the_same_training(sampler, target, tmp_path):
    """Stable Diffusion's schedule, saved by whichever scheduler a pipeline happens to have."""
    scheduler = sampler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type=target
    )
    scheduler.save_config(tmp_path)
    config = json.loads((tmp_path / "scheduler_config.json").read_text())
    schedule = Schedule.from_config(config)
    assert len(schedule) == 1000 and schedule.target == target
    torch.testing.assert_close(schedule.a**2, scheduler.alphas_cumprod, rtol=2e-4, atol=1e-9)


# beta_schedule, beta_start and beta_end where a configuration says nothing (diffusers 0.42).
LINEAR = ("linear", 1e-4, 0.02)
HEUN = ("linear", 0.00085, 0.012)
SCALED = ("scaled_linear", 0.00085, 0.012)
SAMPLERS = {
    "DDIMInverseScheduler": LINEAR,
    "DDIMParallelScheduler": LINEAR,
    "DDIMScheduler": LINEAR,
    "DDPMParallelScheduler": LINEAR,
    "DDPMScheduler": LINEAR,
    "DEISMultistepScheduler": LINEAR,
    "DPMSolverMultistepScheduler": LINEAR,
    "DPMSolverSinglestepScheduler": LINEAR,
    "EulerAncestralDiscreteScheduler": LINEAR,
    "EulerDiscreteScheduler": LINEAR,
    "HeunDiscreteScheduler": HEUN,
    "KDPM2AncestralDiscreteScheduler": HEUN,
    "KDPM2DiscreteScheduler": HEUN,
    "LCMScheduler": SCALED,
    "LMSDiscreteScheduler": LINEAR,
    "PNDMScheduler": LINEAR,
    "SASolverScheduler": LINEAR,
    "TCDScheduler": SCALED,
    "UniPCMultistepScheduler": LINEAR,
}


def expected_alpha_bar(kind: str, start: float, end: float) -> torch.Tensor:
    root = kind == "scaled_linear"
    ends = (start**0.5, end**0.5) if root else (start, end)
    betas = np.linspace(*ends, 1000) ** (2 if root else 1)
    return torch.from_numpy(np.cumprod(1 - betas))


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("zero_snr", [False, True])
def test_what_a_config_leaves_out_is_what_the_scheduler_takes(name: str, zero_snr: bool) -> None:
    """The factors of 19 samplers, in float64 and ending in exactly zero where that is said."""
    schedule = Schedule.from_config({"_class_name": name, "rescale_betas_zero_snr": zero_snr})
    alpha_bar = expected_alpha_bar(*SAMPLERS[name])
    if zero_snr:
        root = alpha_bar.sqrt()
        alpha_bar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
        assert schedule.a[-1] == 0 and schedule.s[-1] == 1
    for got, expected in ((schedule.a, alpha_bar.sqrt()), (schedule.s, (1 - alpha_bar).sqrt())):
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", ["RePaintScheduler", "UnCLIPScheduler", "CogVideoXDDIMScheduler"])
def test_any_scheduler_of_diffusers_with_betas_is_read(name: str) -> None:
    """Also one that changes alpha_bar after the betas (CogVideoX: by snr_shift_scale)."""
    scheduler = getattr(diffusers, name)()
    schedule = Schedule.from_config({"_class_name": name, **scheduler.config})
    expected = scheduler.alphas_cumprod.float()
    torch.testing.assert_close(schedule.a**2, expected, rtol=2e-4, atol=1e-7)


def test_a_scheduler_that_diffusers_does_not_have_must_state_its_betas() -> None:
    stated = {"beta_schedule": "scaled_linear", "beta_start": 0.001, "beta_end": 0.01}
    schedule = Schedule.from_config({"_class_name": "MyScheduler", **stated})
    expected = expected_alpha_bar("scaled_linear", 0.001, 0.01).sqrt()
    torch.testing.assert_close(schedule.a.double(), expected, rtol=0, atol=1e-7)
    assert len(Schedule.from_config({"_class_name": "MyScheduler", "trained_betas": [0.1]})) == 1
    guesses = [{k: v for k, v in stated.items() if k != key} for key in stated]
    for config in (*guesses, {}, {**stated, "snr_shift_scale": 3.0}):
        with pytest.raises(ModelError, match="states its betas, got MyScheduler"):
            Schedule.from_config({"_class_name": "MyScheduler", **config})


def test_trained_betas_and_zero_snr():
    betas = [0.1, 0.2, 0.3, 0.05]
    schedule = Schedule.from_config({"trained_betas": betas})
    torch.testing.assert_close(schedule.a[-1] ** 2, torch.tensor(0.9 * 0.8 * 0.7 * 0.95))
    scheduler = DDIMScheduler(rescale_betas_zero_snr=True)
    schedule = Schedule.from_config(scheduler.config)
    assert schedule.a[-1] == 0 and schedule.s[-1] == 1
    torch.testing.assert_close(schedule.a**2, scheduler.alphas_cumprod, rtol=1e-3, atol=1e-6)


def test_bad_schedules():
    with pytest.raises(ModelError, match="betas cannot be read: cubic is not implemented for DDPM"):
        Schedule.from_config({"beta_schedule": "cubic"})
    with pytest.raises(ModelError, match="beta_schedule of linear, .* got 'cubic'"):
        make_betas("cubic", 10)
    with pytest.raises(ModelError, match="prediction_type of epsilon, .* got 'flow'"):
        Schedule.from_config({"prediction_type": "flow"})
    for config in (
        {"num_train_timesteps": "x"},
        {"num_train_timesteps": 0},
        {"trained_betas": ["a"]},
        {"trained_betas": []},
        {"beta_start": float("nan")},
        {"beta_end": 2.0},
    ):
        with pytest.raises(ModelError, match="the scheduler's betas (cannot be read|must be)"):
            Schedule.from_config(config)
    with pytest.raises(ModelError, match="states its betas, got EDMEulerScheduler"):
        Schedule.from_config({"_class_name": "EDMEulerScheduler", "sigma_min": 0.002})
    with pytest.raises(ModelError, match=r"one shape \[T\], got \[3\] and \[4\]"):
        Schedule(torch.ones(3), torch.ones(4))


def table_of(*rows):
    return torch.tensor(rows, dtype=torch.float32)


def test_nearest_ties_go_to_the_lowest_index():
    vocabulary = Vocabulary(table_of([1, 0], [-1, 0], [1, 0], [0, 5]), "abcd")
    v = table_of([0, 0], [0.9, 0.1], [0.2, 4]).requires_grad_()
    assert vocabulary.nearest(v).tolist() == [0, 0, 3]
    # (0.6, 1.5) lies nearer to (1, 0), but points more to (0, 5).
    assert vocabulary.nearest(table_of([0.6, 1.5])).item() == 0
    assert vocabulary.nearest(table_of([0.6, 1.5]), "cosine").item() == 3


def test_nearest_agrees_with_the_distances_of_a_large_table():
    generator = torch.Generator().manual_seed(0)
    vocabulary = Vocabulary(torch.randn(501, 33, generator=generator), list(map(str, range(501))))
    v = torch.randn(65, 33, generator=generator)
    distance = (v[:, None].double() - vocabulary.table[None].double()).norm(dim=2)
    assert torch.equal(vocabulary.nearest(v), distance.argmin(dim=1))


def test_spread_counts_the_unconditional_row():
    table, extra = table_of([1, 2], [3, 4]), torch.tensor([10.0, 20.0])
    mean, std = Vocabulary(table, "ab", extra).spread()
    entries = torch.cat([table, extra[None]])
    assert mean == pytest.approx(entries.mean().item())
    assert std == pytest.approx(entries.std().item())
    assert torch.equal(Vocabulary(table, "ab", extra).mean(), torch.tensor([2.0, 3.0]))


def test_bad_vocabularies():
    vocabulary = Vocabulary(torch.randn(3, 4), "abc")
    with pytest.raises(DiveFastError, match=r"v must have shape \[N, 4\], got \[2, 5\]"):
        vocabulary.nearest(torch.zeros(2, 5))
    with pytest.raises(DiveFastError, match="metric must be one of l2, cosine, .*'l1'"):
        vocabulary.nearest(torch.zeros(2, 4), "l1")
    with pytest.raises(ModelError, match=r"a table \[V, D\], got \[0, 4\]"):
        Vocabulary(torch.zeros(0, 4), "")
    with pytest.raises(ModelError, match="3 rows needs as many names, got 2"):
        Vocabulary(torch.zeros(3, 4), "ab")


def test_bad_probe_lists():
    noise = torch.randn(3, 1, 2, 2)
    for arguments, message in [
        ((torch.zeros(0, dtype=torch.int64), noise), r"shape \[K\] with K >= 1"),
        ((torch.zeros(2), noise), "whole numbers"),
        ((torch.arange(4), noise), r"\[N, C, h, w\] with N > 3, got \[3, 1, 2, 2\]"),
        ((torch.arange(2), noise[0]), r"\[N, C, h, w\]"),
        ((torch.arange(2), noise, torch.arange(3)), r"shape of timesteps, \[2\], got \[3\]"),
        ((torch.arange(2), noise / 0), "must be finite"),
    ]:
        with pytest.raises(DiveFastError, match=message):
            ProbeList(*arguments)
    with pytest.raises(DiveFastError, match=r"lie in \[0, 1000\), got values from -1 to 5"):
        ProbeList(torch.tensor([5, -1]), noise).check((1, 2, 2), 1000)


@pytest.mark.parametrize(
    "config",
    [
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0},
        {"_class_name": "FlowMatchHeunDiscreteScheduler"},
        {"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True},
        {"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True,
         "prediction_type": "flow_prediction", "flow_shift": 3.0},
    ],
)  # fmt: skip
def test_flows(config: dict) -> None:
    """x_t = (1 - sigma) x0 + sigma eps as FlowMatchEulerDiscreteScheduler.scale_noise has it."""
    schedule = Schedule.from_config(config)
    assert schedule.target == "flow" and len(schedule) == 1000
    scheduler = FlowMatchEulerDiscreteScheduler()
    x0, eps = torch.randn(2, 1, 3, 4, 4)
    for t in (0, 499, 999):
        expected = scheduler.scale_noise(x0, torch.tensor([t + 1.0]), eps)
        torch.testing.assert_close(schedule.a[t] * x0 + schedule.s[t] * eps, expected)


@pytest.mark.parametrize("n", [0, -3, 2.5, "1000", True, 10**9])
def test_bad_flows(n: object) -> None:
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": n}
    with pytest.raises(ModelError, match="num_train_timesteps must be a whole number from 1 to"):
        Schedule.from_config(config)


def test_edm_follows_the_density_of_its_training() -> None:
    """Of log sigma: mean, standard deviation, and the signal-to-noise ratio of x0 / sigma_data."""
    schedule = Schedule.edm(sigma_data=0.5, mean=-1.2, std=1.2, n=4000)
    sigma = 0.5 * schedule.s / schedule.a
    assert abs(sigma.log().mean() + 1.2) < 1e-3 and abs(sigma.log().std() - 1.2) < 5e-3
    torch.testing.assert_close(schedule.a**2 + schedule.s**2, torch.ones(4000))


def test_linear_and_cosine_are_those_of_diffusers() -> None:
    for name, schedule in (
        ("linear", Schedule.linear()),
        ("squaredcos_cap_v2", Schedule.cosine()),
    ):
        alpha_bar = DDPMScheduler(beta_schedule=name).alphas_cumprod
        torch.testing.assert_close(schedule.a**2, alpha_bar, rtol=1e-3, atol=1e-5)
