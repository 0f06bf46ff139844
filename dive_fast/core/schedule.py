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

import numpy as np
import torch

from dive_fast.core.numbers import is_number, is_whole
from dive_fast.errors import ModelError, shown, some

BETA_SCHEDULES = ("linear", "scaled_linear")  # of make_betas; configurations have more
TARGETS = ("epsilon", "v_prediction", "sample")  # of configurations; flows say theirs otherwise
MAX_TIMESTEPS = 100_000  # what lies above is a mistake that would fill the memory

# What must be stated of a scheduler that diffusers does not have, or trained_betas instead.
_STATED = ("beta_schedule", "beta_start", "beta_end")
# What betas and alpha_bar depend on, in any scheduler of diffusers.
_OF_THE_BETAS = ("num_train_timesteps", *_STATED, "trained_betas", "snr_shift_scale")
# Of diffusers' samplers beside DDPM: how one samples. None of them changes x_t.
_OF_SAMPLING = frozenset(
    "algorithm_type corrector_order disable_corrector eta euler_at_final final_sigmas_type "
    "flow_shift interpolation_type lambda_min_clipped lower_order_final noise_sampler_seed "
    "original_inference_steps predict_x0 predictor_order set_alpha_to_one shift_terminal sigma_max "
    "sigma_min skip_prk_steps solver_order solver_p solver_type tau_func time_shift_type "
    "timestep_scaling timestep_type use_beta_sigmas use_dynamic_shifting use_exponential_sigmas "
    "use_flow_sigmas use_karras_sigmas use_lu_lambdas".split()
)
# Made by optional packages, or only one at a time: a sampler is not made for them.
_LEFT_OUT = {
    "rescale_betas_zero_snr",
    "use_beta_sigmas",
    "use_exponential_sigmas",
    "use_karras_sigmas",
    "use_lu_lambdas",
}


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
        if not (torch.isfinite(self.a).all() and torch.isfinite(self.s).all()):
            raise ModelError("a schedule needs factors a and s that are finite, got NaN or inf.")

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
        if not isinstance(config, Mapping):
            raise ModelError(
                f"expected the configuration of a scheduler, got {type(config).__name__}."
            )
        _check_kind(config)
        if is_flow(config):
            return _read_flow(config)
        target = config.get("prediction_type", "epsilon")
        if target not in TARGETS:
            raise ModelError(f"expected a prediction_type of {', '.join(TARGETS)}, got {target!r}.")
        try:
            _check_betas(config)
            alpha_bar = _read_alpha_bar(config)
        except ModelError:
            raise
        # Whatever a scheduler's constructor meets in a configuration that it does not expect.
        except Exception as error:
            raise ModelError(f"the scheduler's betas cannot be read: {error}.") from error
        return cls.from_alpha_bar(alpha_bar, target)


def is_flow(config: Mapping[str, Any]) -> bool:
    """Whether the configuration is that of a flow-matching scheduler."""
    return "FlowMatch" in str(config.get("_class_name")) or bool(config.get("use_flow_sigmas"))


def _read_flow(config: Mapping[str, Any]) -> Schedule:
    """Shifts only choose among the sigmas when it samples.

    Raises:
        ModelError: another prediction than the flow's, sigmas the other way round, or no number.
    """
    n = config.get("num_train_timesteps", 1000)
    if not is_whole(n, 1) or n > MAX_TIMESTEPS:
        raise ModelError(
            f"num_train_timesteps must be a whole number from 1 to {MAX_TIMESTEPS}, got {shown(n)}."
        )
    stated = config.get("prediction_type")
    if stated not in (None, "flow_prediction"):
        raise ModelError(
            f"the scheduler is a flow's, but its prediction_type is {shown(stated)}: expected "
            f"'flow_prediction', or the scheduler that the network was trained with."
        )
    if config.get("invert_sigmas"):
        raise ModelError("a flow schedule with invert_sigmas is not supported.")
    return Schedule.flow(n)


def _check_kind(config: Mapping[str, Any]) -> None:
    """That x_t = a_t x0 + s_t eps at whole timesteps is what the scheduler means.

    Raises:
        ModelError: it is not.
    """
    name = config.get("_class_name")
    if name is not None and not isinstance(name, str):
        raise ModelError(f"expected the name of a scheduler as _class_name, got {shown(name)}.")
    for key in ("rescale_betas_zero_snr", "use_flow_sigmas"):
        if not isinstance(config.get(key) or False, bool):
            raise ModelError(f"expected true or false as {key}, got {shown(config[key])}.")
    if config.get("timestep_type", "discrete") != "discrete":
        # The network then reads log(sigma) / 4, not t.
        raise ModelError(
            f"expected the timestep_type 'discrete' of a scheduler, "
            f"got {shown(config['timestep_type'])}."
        )


def _check_betas(config: Mapping[str, Any]) -> None:
    """That the numbers which betas are made of are numbers in range.

    Raises:
        ModelError: they are not.
    """
    n = config.get("num_train_timesteps", 1)
    if not is_whole(n, 1) or n > MAX_TIMESTEPS:
        raise _unreadable(f"num_train_timesteps of 1 to {MAX_TIMESTEPS}", n)
    if config.get("trained_betas") is not None:
        _check_trained(config["trained_betas"])
    else:
        for key in ("beta_start", "beta_end"):
            if key in config and not is_number(config[key], 0):
                raise _unreadable(f"a number of at least 0 as {key}", config[key])
    scale = config.get("snr_shift_scale")
    if scale is not None and not (is_number(scale, 0) and scale > 0):
        raise _unreadable("a number above 0 as snr_shift_scale", scale)


def _check_trained(betas: Any) -> None:
    """That they are numbers above 0 and below 1; the last may be 1, a zero terminal SNR."""
    if isinstance(betas, np.ndarray | torch.Tensor):
        betas = betas.tolist()
    if not isinstance(betas, list | tuple):
        raise _unreadable("a list of numbers as trained_betas", betas)
    if not 1 <= len(betas) <= MAX_TIMESTEPS:
        raise ModelError(
            f"the scheduler's betas cannot be read: expected 1 to {MAX_TIMESTEPS} trained_betas, "
            f"got {len(betas)}."
        )
    for i, beta in enumerate(betas):
        last = i == len(betas) - 1
        if not is_number(beta) or not 0 < beta <= 1 or (beta == 1 and not last):
            raise ModelError(
                f"the scheduler's betas must be a list of numbers between 0 and 1, of which only "
                f"the last may be 1, got {shown(beta)} at place {i} of {len(betas)}."
            )


def _unreadable(expected: str, got: Any) -> ModelError:
    return ModelError(
        f"the scheduler's betas cannot be read: expected {expected}, got {shown(got)}."
    )


def _read_alpha_bar(config: Mapping[str, Any]) -> torch.Tensor:
    """alpha_bar_t, float64 [T], of the scheduler that a configuration describes."""
    scheduler = _make_scheduler(config)
    betas, alpha_bar = scheduler.betas, scheduler.alphas_cumprod
    inside = (betas > 0) & (betas <= 1)
    if betas.ndim != 1 or len(betas) == 0 or not inside.all() or (betas[:-1] == 1).any():
        raise ModelError("the scheduler's betas must be a list of numbers between 0 and 1.")
    # diffusers multiplies in float32. What else a class does to the product (CogVideoX) stays.
    if torch.allclose(alpha_bar, torch.cumprod(1.0 - betas, dim=0), rtol=1e-6, atol=0):
        alpha_bar = torch.cumprod(1 - betas.double(), dim=0)
    alpha_bar = alpha_bar.double()
    if config.get("rescale_betas_zero_snr"):
        alpha_bar = _rescale_to_zero_snr(alpha_bar)
    # NaN compares as false.
    if not ((alpha_bar >= 0) & (alpha_bar < 1)).all() or not alpha_bar[0] > 0:
        raise ModelError(
            "the scheduler's betas must leave a part of the image and add a part of noise at the "
            f"first of {len(betas)} timesteps."
        )
    return alpha_bar


def _make_scheduler(config: Mapping[str, Any]) -> Any:
    """diffusers' own scheduler, which knows what the configuration leaves out.

    Not rescaled to a zero terminal SNR: some samplers do not let that become 0.

    Raises:
        ModelError: it has none with betas, and the configuration is not DDPM's, or does not state
            them.
    """
    import diffusers

    name = config.get("_class_name")
    kind = _find_class("DDPMScheduler" if name is None else name)
    given = {str(key) for key, value in config.items() if value is not None}
    given = {key for key in given if not key.startswith("_")}
    if config.get("snr_shift_scale") == 1:  # no shift
        given.discard("snr_shift_scale")
    if name is None or kind is None:
        plain = inspect.signature(diffusers.DDPMScheduler.__init__).parameters.keys()
        # Without a name, or of one that is not installed, it may be any of diffusers' samplers.
        of_diffusers = name is None or hasattr(diffusers, name)
        other = sorted(given - plain - (_OF_SAMPLING if of_diffusers else set()))
        if other:
            raise ModelError(
                f"expected a scheduler of diffusers that states its betas, got "
                f"{name or 'no _class_name'} with {some(other, 3)}, which may change them."
            )
        if kind is None and not ("trained_betas" in given or given.issuperset(_STATED)):
            raise ModelError(f"expected a scheduler that states its betas, got {name}.")
        kind = diffusers.DDPMScheduler
    known = inspect.signature(kind.__init__).parameters.keys()
    scheduler = _construct(kind, {key: config[key] for key in (known & config.keys()) - _LEFT_OUT})
    if not hasattr(scheduler, "betas") or not hasattr(scheduler, "alphas_cumprod"):
        raise ModelError(f"expected a scheduler that states its betas, got {name}.")
    ignored = [key for key in _OF_THE_BETAS if key in given and key not in known]
    if ignored:
        raise ModelError(f"{name} takes no {ignored[0]}, got {shown(config[ignored[0]])}.")
    return scheduler


def _find_class(name: str) -> type | None:
    """The scheduler of that name in diffusers; None where it has none, or one that it cannot run.

    Schedulers that need a package which is not installed are classes of another kind.
    """
    import diffusers

    # A few are not named at the top.
    kind = getattr(diffusers, name, None) or getattr(diffusers.schedulers, name, None)
    known = isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)
    return kind if known else None


def _construct(kind: type, given: Mapping[str, Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are about sampling, which is not done here
        try:
            return kind(**given)
        except NotImplementedError as error:
            raise ValueError(str(error).replace(str(kind), kind.__name__)) from error


def make_betas(schedule: str, n: int, start: float = 1e-4, end: float = 0.02) -> torch.Tensor:
    """beta_t as float64 [n] on the CPU, for one of ``BETA_SCHEDULES``.

    Raises:
        ModelError: another schedule is asked for.
    """
    if schedule == "linear":
        return torch.linspace(start, end, n, dtype=torch.float64, device="cpu")
    if schedule == "scaled_linear":
        root = torch.linspace(start**0.5, end**0.5, n, dtype=torch.float64, device="cpu")
        return root**2
    raise ModelError(f"expected a beta_schedule of {', '.join(BETA_SCHEDULES)}, got {schedule!r}.")


def _rescale_to_zero_snr(alpha_bar: torch.Tensor) -> torch.Tensor:
    """Shifts and scales sqrt(alpha_bar) so that it ends in zero (arXiv 2305.08891, algorithm 1)."""
    root = alpha_bar.sqrt()
    if len(root) == 1:
        raise ModelError("a schedule of one timestep cannot be rescaled to a zero terminal SNR.")
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
