"""The noise schedule: which x_t a timestep stands for.

    x_t = a_t x0 + s_t eps        a_t = sqrt(alpha_bar_t),  s_t = sqrt(1 - alpha_bar_t)

Source: DDPM (arXiv 2006.11239); rescaling: arXiv 2305.08891.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from dive_fast.errors import ModelError

BETA_SCHEDULES = ("linear", "scaled_linear")  # of make_betas; configurations have more
TARGETS = ("epsilon", "v_prediction", "sample")

# What must be stated of a scheduler that diffusers does not have, or trained_betas instead.
_STATED = ("beta_schedule", "beta_start", "beta_end")


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
            ModelError: a scheduler, betas or a prediction type that are not supported.
        """
        if "FlowMatch" in str(config.get("_class_name", "")) or config.get("use_flow_sigmas"):
            raise ModelError(f"flow schedules are not supported, got {config.get('_class_name')}.")
        target = config.get("prediction_type", "epsilon")
        if target not in TARGETS:
            raise ModelError(f"expected a prediction_type of {', '.join(TARGETS)}, got {target!r}.")
        try:
            alpha_bar = _read_alpha_bar(config)
        except ModelError:
            raise
        # Whatever a scheduler's constructor meets in a configuration that it does not expect.
        except (TypeError, ValueError, RuntimeError, ArithmeticError, LookupError) as error:
            raise ModelError(f"the scheduler's betas cannot be read: {error}.") from error
        if config.get("rescale_betas_zero_snr", False):
            alpha_bar = _rescale_to_zero_snr(alpha_bar)
        return cls.from_alpha_bar(alpha_bar, target)


def _read_alpha_bar(config: Mapping[str, Any]) -> torch.Tensor:
    """alpha_bar_t, float64 [T], of the scheduler that a configuration describes; not rescaled."""
    scheduler = _make_scheduler(config)
    betas, alpha_bar = scheduler.betas.double(), scheduler.alphas_cumprod.double()
    if betas.ndim != 1 or len(betas) == 0 or not bool(((betas > 0) & (betas < 1)).all()):
        raise ModelError("the scheduler's betas must be a list of numbers between 0 and 1.")
    exact = torch.cumprod(1 - betas, dim=0)
    # diffusers multiplies in float32. What differs by more (CogVideoX) was changed afterwards.
    return exact if torch.allclose(alpha_bar, exact, rtol=1e-3, atol=1e-6) else alpha_bar


def _make_scheduler(config: Mapping[str, Any]) -> Any:
    """diffusers' own scheduler, which knows what the configuration leaves out.

    Not rescaled to a zero terminal SNR: some samplers do not let that become 0.

    Raises:
        ModelError: it has none with betas, and the configuration does not state them.
    """
    import diffusers

    name = str(config.get("_class_name", "DDPMScheduler"))
    kind = getattr(diffusers, name, None)
    known = isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)
    stated = config.get("trained_betas") is not None or all(key in config for key in _STATED)
    if not known and stated and config.get("snr_shift_scale") is None:
        kind, known = diffusers.DDPMScheduler, True
    if known:
        expected = inspect.signature(kind.__init__).parameters.keys() & config.keys()
        given = {key: config[key] for key in expected - {"rescale_betas_zero_snr"}}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they are about sampling, which is not done here
            try:
                scheduler = kind(**given)
            except NotImplementedError as error:
                raise ValueError(str(error).replace(str(kind), kind.__name__)) from error
        if hasattr(scheduler, "betas") and hasattr(scheduler, "alphas_cumprod"):
            return scheduler
    raise ModelError(f"expected a scheduler that states its betas, got {name}.")


def make_betas(schedule: str, n: int, start: float = 1e-4, end: float = 0.02) -> torch.Tensor:
    """beta_t as float64 [n] for one of ``BETA_SCHEDULES``.

    Raises:
        ModelError: another schedule is asked for.
    """
    if schedule == "linear":
        return torch.linspace(start, end, n, dtype=torch.float64)
    if schedule == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, n, dtype=torch.float64) ** 2
    raise ModelError(f"expected a beta_schedule of {', '.join(BETA_SCHEDULES)}, got {schedule!r}.")


def _rescale_to_zero_snr(alpha_bar: torch.Tensor) -> torch.Tensor:
    """Shifts and scales sqrt(alpha_bar) so that it ends in zero (arXiv 2305.08891, algorithm 1)."""
    root = alpha_bar.sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
