"""What a network is told of x_t and t, and how its prediction becomes that of ``Schedule.target``.

Networks of one schedule differ: one is told the timestep, another sigma or its logarithm; one
predicts eps - x0, another x0 - eps. An EDM network is called with c_in x or, where it is the whole
denoiser, with x (arXiv 2206.00364); a consistency function is one with a boundary at sigma_min
(arXiv 2303.01469, appendix C).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dive_fast.core.numbers import is_number
from dive_fast.core.schedule import Schedule
from dive_fast.errors import ModelError

# What the network is told of a timestep, float [M]; sigma is s_t / a_t, of a flow s_t.
TIMES: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "t": lambda t, sigma, n: t,
    "t / T": lambda t, sigma, n: t / n,
    "sigma": lambda t, sigma, n: sigma,
    "T sigma": lambda t, sigma, n: n * sigma,
    "1000 sigma": lambda t, sigma, n: 1000 * sigma,
    "1 - sigma": lambda t, sigma, n: 1 - sigma,
    "log sigma / 4": lambda t, sigma, n: sigma.log() / 4,
    "250 log sigma": lambda t, sigma, n: 250 * sigma.log(),
}
PREDICTS = ("epsilon", "v_prediction", "sample", "noise - data", "data - noise", "edm", "denoised")
CONSISTENCY = "consistency"  # only of a scheduler, which says where the boundary lies

_KIND = {
    "noise - data": "flow", "data - noise": "flow", "edm": "EDM", "denoised": "EDM",
    CONSISTENCY: "EDM",
}  # fmt: skip
_USUAL_TIME = {"noise - data": "sigma", "data - noise": "1 - sigma", "denoised": "sigma"}

_EDM_SCHEDULERS = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
_CONSISTENCY_SCHEDULER = "CMStochasticIterativeScheduler"
_SIGMAS = {"sigma_data": 0.5, "sigma_min": 0.002, "sigma_max": 80.0}  # diffusers' defaults


@dataclass(frozen=True)
class Convention:
    """How a network of a schedule is called and read.

    Attributes:
        schedule: of the training.
        predicts: one of ``PREDICTS``, or ``CONSISTENCY``.
        time: one of ``TIMES``.
        sigma_min: where a consistency function is the identity.
    """

    schedule: Schedule
    predicts: str
    time: str
    sigma_min: float = 0.0

    @classmethod
    def of(
        cls, schedule: Schedule, predicts: str | None = None, time: str | None = None
    ) -> Convention:
        """What is asked for; what is None is what is usual for the schedule.

        Raises:
            ModelError: an unknown word, or a prediction that is none of the schedule.
        """
        predicts = _chosen("predicts", predicts, PREDICTS, _usual_prediction(schedule))
        _check_prediction(predicts, schedule)
        usual = _usual_time(predicts, schedule)
        return cls(schedule, predicts, _chosen("time", time, tuple(TIMES), usual))

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], predicts: str | None = None, time: str | None = None
    ) -> Convention:
        """Of diffusers' ``scheduler_config.json``; what is None is what its pipelines do.

        Those tell a flow's network T sigma. Beside the schedules of ``Schedule.from_config`` these
        are EDM's and those of consistency models, with the density of EDM's training between the
        scheduler's ``sigma_min`` and ``sigma_max``.

        Raises:
            ModelError: as ``of`` and ``Schedule.from_config``.
        """
        name = config.get("_class_name")
        if name not in (*_EDM_SCHEDULERS, _CONSISTENCY_SCHEDULER):
            schedule = Schedule.from_config(config)
            usual = "T sigma" if schedule.target == "flow" else None
            return cls.of(schedule, predicts, time or usual)
        sigmas = _read_sigmas(config)
        schedule = Schedule.edm(**sigmas)
        if name == _CONSISTENCY_SCHEDULER:
            if predicts is not None:
                raise ModelError(
                    f"a {name} says what is predicted: expected none, got {predicts!r}."
                )
            time = _chosen("time", time, tuple(TIMES), "250 log sigma")
            return cls(schedule, CONSISTENCY, time, sigmas["sigma_min"])
        stated = config.get("prediction_type", "epsilon")
        # diffusers' "epsilon" is EDM's F, its "v_prediction" the same with the other sign.
        raw = _chosen("prediction_type", stated, ("epsilon", "v_prediction"), "epsilon")
        usual = "edm" if raw == "epsilon" else raw
        return cls.of(schedule, predicts or usual, time)

    def told(self, t: Tensor) -> Tensor:
        """What the network is told of timesteps int64 [M]: float32, or int64 for "t"."""
        if self.time == "t":
            return t
        a, s = self._factors(t)
        sigma = s if self.schedule.target == "flow" else s / a * (self.schedule.sigma_data or 1)
        return TIMES[self.time](t, sigma, len(self.schedule))

    def given(self, x_t: Tensor, t: Tensor) -> Tensor:
        """The network's input [M, C, h, w]: x_t, or the x that an EDM denoiser scales itself."""
        if self.predicts != "denoised":
            return x_t
        return x_t * self.schedule.sigma_data / _wide(self._factors(t)[0])

    def target(self, found: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The network's output [M, C or 2C, h, w] as a prediction of ``schedule.target``."""
        if self.predicts not in ("denoised", CONSISTENCY):
            return self.signed(found)
        a, s = map(_wide, self._factors(t))
        data = self.schedule.sigma_data
        if found.shape[1] == 2 * x_t.shape[1]:
            found = found.chunk(2, dim=1)[0]
        # F = (D - c_skip x) / c_out of x0 and D in units of sigma_data; the target is -F.
        if self.predicts == "denoised":
            return -(found / data - a * x_t) / s
        above = data * s / a - self.sigma_min
        skip, out = data**2 / (above**2 + data**2), above * a / data
        return -((skip / a - a) * x_t + out * found) / s

    def signed(self, found: Tensor) -> Tensor:
        """``target`` where neither x_t nor t is needed for it."""
        return -found if self.predicts in ("data - noise", "edm") else found

    def facts(self) -> dict[str, Any]:
        """For ``identity``."""
        return {"predicts": self.predicts, "time": self.time}

    def _factors(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """a_t and s_t, float32 [M]."""
        return self.schedule.a.to(t.device)[t], self.schedule.s.to(t.device)[t]


def _wide(factor: Tensor) -> Tensor:
    return factor.view(-1, 1, 1, 1)


def _usual_prediction(schedule: Schedule) -> str:
    if schedule.sigma_data is not None:
        return "edm"
    return "noise - data" if schedule.target == "flow" else schedule.target


def _usual_time(predicts: str, schedule: Schedule) -> str:
    """The usual one."""
    edm = schedule.sigma_data is not None
    return _USUAL_TIME.get(predicts, "log sigma / 4" if edm else "t")


def _check_prediction(predicts: str, schedule: Schedule) -> None:
    """That schedule and prediction are of one kind."""
    kind = "flow" if schedule.target == "flow" else "variance-preserving"
    kind = kind if schedule.sigma_data is None else "EDM"
    expected = _KIND.get(predicts, "variance-preserving")
    if kind == "EDM" and predicts == schedule.target:  # v of x0 / sigma_data
        return
    if kind != expected:
        raise ModelError(f"{predicts!r} needs a schedule of the kind {expected}, got {kind}.")
    if expected == "variance-preserving" and predicts != schedule.target:
        raise ModelError(
            f"expected a schedule with the target {predicts!r}, got one with {schedule.target!r}."
        )


def _chosen(what: str, value: Any, known: Sequence[str], default: str) -> str:
    value = default if value is None else value
    if value not in known:
        raise ModelError(f"expected {what} to be one of {', '.join(known)}, got {value!r}.")
    return value


def _read_sigmas(config: Mapping[str, Any]) -> dict[str, float]:
    sigmas = {key: config.get(key, default) for key, default in _SIGMAS.items()}
    for key, value in sigmas.items():
        if not (is_number(value) and value > 0):
            raise ModelError(f"expected {key} of the scheduler to be above 0, got {value!r}.")
    return sigmas
