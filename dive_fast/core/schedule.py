"""The noise schedule: which x_t a timestep stands for.

    x_t = a_t x0 + s_t eps

    variance preserving   a_t = sqrt(alpha_bar_t),  s_t = sqrt(1 - alpha_bar_t)
    flow                  a_t = 1 - sigma_t,        s_t = sigma_t
    EDM                   a_t = sigma_data / r_t,   s_t = sigma_t / r_t,
                          r_t = sqrt(sigma_t^2 + sigma_data^2),  x0 in units of sigma_data

Source: DDPM (arXiv 2006.11239); rescaling: arXiv 2305.08891; rectified flow: arXiv 2209.03003; EDM:
arXiv 2206.00364.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from dive_fast.core.numbers import is_whole
from dive_fast.errors import ModelError

BETA_SCHEDULES = ("linear", "scaled_linear")  # of make_betas; configurations have more
TARGETS = ("epsilon", "v_prediction", "sample")  # of configurations; flows say theirs otherwise

MOST_TIMESTEPS = 10**6

# What must be stated of a scheduler that diffusers does not have, or trained_betas instead.
_STATED = ("beta_schedule", "beta_start", "beta_end")


@dataclass(frozen=True)
class Schedule:
    """The two factors of every timestep, and what the network predicts.

    Attributes:
        a: float32 [T], factor of x0.
        s: float32 [T], factor of eps.
        target: "epsilon", "v_prediction" (a eps - s x0), "sample" (x0) or "flow" (eps - x0).
        sigma_data: of EDM's preconditioning, whose x0 are images / sigma_data; None for others.
    """

    a: torch.Tensor
    s: torch.Tensor
    target: str = "epsilon"
    sigma_data: float | None = None

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
    def linear(
        cls, n: int = 1000, start: float = 1e-4, end: float = 0.02, target: str = "epsilon"
    ) -> Schedule:
        """beta_t evenly from ``start`` to ``end``: DDPM's, ADM's and DiT's."""
        return cls.from_betas(make_betas("linear", n, start, end), target)

    @classmethod
    def cosine(cls, n: int = 1000, target: str = "epsilon") -> Schedule:
        """alpha_bar_t = f(t) / f(0), f(t) = cos^2((t / T + 0.008) / 1.008 pi / 2).

        beta_t is cut at 0.999, as published (arXiv 2102.09672).
        """
        f = (torch.linspace(0, 1, n + 1, dtype=torch.float64) + 0.008).div(1.008)
        alpha_bar = f.mul(math.pi / 2).cos().square()
        return cls.from_betas((1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999), target)

    @classmethod
    def flow(cls, n: int = 1000) -> Schedule:
        """Rectified flow: x_t = (1 - sigma) x0 + sigma eps, sigma = 1 / n, 2 / n, ..., 1.

        A shift of the sigmas says where sampling goes, not what a sigma means: it is not needed.
        """
        sigma = torch.arange(1, n + 1, dtype=torch.float64) / n
        return cls((1 - sigma).float(), sigma.float(), "flow")

    @classmethod
    def edm(
        cls,
        sigma_data: float = 0.5,
        mean: float = -1.2,
        std: float = 1.2,
        n: int = 1000,
        sigma_min: float = 0.0,
        sigma_max: float = math.inf,
    ) -> Schedule:
        """Karras' preconditioned training (arXiv 2206.00364): log sigma ~ N(mean, std^2).

        The n sigmas are the quantiles of that density between ``sigma_min`` and ``sigma_max``, so
        that evenly spread timesteps follow it.
        With r = sqrt(sigma^2 + sigma_data^2) the network's input c_in (x0 + sigma eps) is
        (sigma_data x0' + sigma eps) / r for x0' = x0 / sigma_data, and its target is
        (sigma x0' - sigma_data eps) / r: v of x0' with the other sign.
        """
        ends = torch.tensor([sigma_min, sigma_max], dtype=torch.float64).log()
        low, high = torch.special.ndtr((ends - mean) / std)
        if not high > low:
            raise ModelError(
                f"expected a sigma_min below sigma_max near exp({mean}), "
                f"got {sigma_min} and {sigma_max}."
            )
        quantile = low + (high - low) * (torch.arange(n, dtype=torch.float64) + 0.5) / n
        sigma = torch.exp(mean + std * torch.special.ndtri(quantile))
        r = (sigma**2 + sigma_data**2).sqrt()
        return cls((sigma_data / r).float(), (sigma / r).float(), "v_prediction", sigma_data)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Schedule:
        """Reads the ``scheduler_config.json`` of a diffusers scheduler (DDPM, DDIM, Euler ...).

        Raises:
            ModelError: a scheduler, betas or a prediction type that are not supported.
        """
        if "FlowMatch" in str(config.get("_class_name", "")) or config.get("use_flow_sigmas"):
            return _read_flow(config)
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


def _read_flow(config: Mapping[str, Any]) -> Schedule:
    """Of a flow-matching scheduler. Shifts only choose among its sigmas when it samples."""
    n = config.get("num_train_timesteps", 1000)
    if not is_whole(n, 1) or n > MOST_TIMESTEPS:
        raise ModelError(
            f"num_train_timesteps must be a whole number from 1 to {MOST_TIMESTEPS}, got {n!r}."
        )
    stated = config.get("prediction_type")
    if stated not in (None, "flow_prediction"):
        raise ModelError(
            f"the scheduler is a flow's, but its prediction_type is {stated!r}: expected "
            f"'flow_prediction', or the scheduler that the network was trained with."
        )
    return Schedule.flow(n)


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
