"""The noise schedule: which x_t a timestep stands for.

    x_t = a_t x0 + s_t eps        a_t = sqrt(alpha_bar_t),  s_t = sqrt(1 - alpha_bar_t)

Source: DDPM (arXiv 2006.11239); cosine: arXiv 2102.09672; rescaling: arXiv 2305.08891.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from dive_fast.errors import ModelError

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
TARGETS = ("epsilon", "v_prediction", "sample")

# The betas that diffusers' schedulers have where a configuration leaves them out. Samplers of all
# kinds describe the same training schedule; those that are not listed have none of this form.
_LINEAR = ("linear", 1e-4, 0.02)
_SCALED = ("scaled_linear", 0.00085, 0.012)
_DEFAULT_BETAS = {
    "DDIMInverseScheduler": _LINEAR,
    "DDIMParallelScheduler": _LINEAR,
    "DDIMScheduler": _LINEAR,
    "DDPMParallelScheduler": _LINEAR,
    "DDPMScheduler": _LINEAR,
    "DEISMultistepScheduler": _LINEAR,
    "DPMSolverMultistepScheduler": _LINEAR,
    "DPMSolverSinglestepScheduler": _LINEAR,
    "EulerAncestralDiscreteScheduler": _LINEAR,
    "EulerDiscreteScheduler": _LINEAR,
    "HeunDiscreteScheduler": ("linear", 0.00085, 0.012),
    "KDPM2AncestralDiscreteScheduler": ("linear", 0.00085, 0.012),
    "KDPM2DiscreteScheduler": ("linear", 0.00085, 0.012),
    "LCMScheduler": _SCALED,
    "LMSDiscreteScheduler": _LINEAR,
    "PNDMScheduler": _LINEAR,
    "SASolverScheduler": _LINEAR,
    "TCDScheduler": _SCALED,
    "UniPCMultistepScheduler": _LINEAR,
}


@dataclass(frozen=True)
class Schedule:
    """The two factors of every timestep, and what the network predicts.

    Attributes:
        a: float32 [T], factor of x0.
        s: float32 [T], factor of eps.
        target: "epsilon", "v_prediction" (a eps - s x0) or "sample" (x0).
    """

    a: torch.Tensor
    s: torch.Tensor
    target: str = "epsilon"

    def __post_init__(self) -> None:
        if self.a.ndim != 1 or self.a.shape != self.s.shape:
            raise ModelError(
                f"a schedule needs a and s of one shape [T], got {list(self.a.shape)} "
                f"and {list(self.s.shape)}."
            )

    def __len__(self) -> int:
        return len(self.a)

    def identity(self) -> dict[str, Any]:
        """What tells this schedule from another, for JSON; rounded, to be the same everywhere."""
        a, s = (round(float(factor.double().mean()), 6) for factor in (self.a, self.s))
        return {"target": self.target, "timesteps": len(self), "mean_a": a, "mean_s": s}

    @classmethod
    def from_betas(cls, betas: torch.Tensor, target: str = "epsilon") -> Schedule:
        """From beta_t [T]: alpha_bar_t = prod_{i <= t} (1 - beta_i), in float64."""
        return cls.from_alpha_bar(torch.cumprod(1 - betas.double(), dim=0), target)

    @classmethod
    def from_alpha_bar(cls, alpha_bar: torch.Tensor, target: str = "epsilon") -> Schedule:
        """From alpha_bar_t [T], also called ``alphas_cumprod``."""
        alpha_bar = alpha_bar.double()
        return cls(alpha_bar.sqrt().float(), (1 - alpha_bar).sqrt().float(), target)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Schedule:
        """Reads the ``scheduler_config.json`` of a diffusers scheduler (DDPM, DDIM, Euler ...).

        Raises:
            ModelError: a scheduler, a beta schedule or a prediction type that is not supported.
        """
        if "FlowMatch" in str(config.get("_class_name", "")) or config.get("use_flow_sigmas"):
            raise ModelError(f"flow schedules are not supported, got {config.get('_class_name')}.")
        target = config.get("prediction_type", "epsilon")
        if target not in TARGETS:
            raise ModelError(f"expected a prediction_type of {', '.join(TARGETS)}, got {target!r}.")
        try:
            betas = _read_betas(config)
        except ModelError:
            raise
        except (TypeError, ValueError, RuntimeError) as error:
            raise ModelError(f"the scheduler's betas cannot be read: {error}.") from error
        if betas.ndim != 1 or len(betas) == 0 or not bool(((betas > 0) & (betas < 1)).all()):
            raise ModelError("the scheduler's betas must be a list of numbers between 0 and 1.")
        if config.get("rescale_betas_zero_snr", False):
            return cls.from_alpha_bar(_rescale_to_zero_snr(torch.cumprod(1 - betas, 0)), target)
        return cls.from_betas(betas, target)


def _read_betas(config: Mapping[str, Any]) -> torch.Tensor:
    if config.get("trained_betas") is not None:
        return torch.tensor(config["trained_betas"], dtype=torch.float64)
    name = config.get("_class_name", "DDPMScheduler")
    if name not in _DEFAULT_BETAS and "beta_schedule" not in config:
        raise ModelError(f"expected a scheduler that states its betas, got {name}.")
    schedule, start, end = _DEFAULT_BETAS.get(name, _LINEAR)
    return make_betas(
        config.get("beta_schedule", schedule),
        config.get("num_train_timesteps", 1000),
        config.get("beta_start", start),
        config.get("beta_end", end),
    )


def make_betas(schedule: str, n: int, start: float = 1e-4, end: float = 0.02) -> torch.Tensor:
    """beta_t as float64 [n] for one of ``BETA_SCHEDULES``; start and end do not enter the cosine.

    Raises:
        ModelError: another schedule is asked for.
    """
    if schedule == "linear":
        return torch.linspace(start, end, n, dtype=torch.float64)
    if schedule == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, n, dtype=torch.float64) ** 2
    if schedule == "squaredcos_cap_v2":

        def alpha_bar(t: float) -> float:
            return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

        betas = [min(1 - alpha_bar((i + 1) / n) / alpha_bar(i / n), 0.999) for i in range(n)]
        return torch.tensor(betas, dtype=torch.float64)
    raise ModelError(f"expected a beta_schedule of {', '.join(BETA_SCHEDULES)}, got {schedule!r}.")


def _rescale_to_zero_snr(alpha_bar: torch.Tensor) -> torch.Tensor:
    """Shifts and scales sqrt(alpha_bar) so that it ends in zero (arXiv 2305.08891, algorithm 1)."""
    root = alpha_bar.sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
