"""What a strategy is, and the register of all of them."""

from __future__ import annotations

from dataclasses import Field, dataclass, fields, is_dataclass, replace
from numbers import Integral, Real
from typing import Any, ClassVar, Protocol

import torch

from dive_fast.core.head import Head
from dive_fast.core.probes import ProbeList, low_discrepancy_probes
from dive_fast.core.requests import Answer, Search
from dive_fast.core.shortlist import Shortlist
from dive_fast.core.vocabulary import Vocabulary
from dive_fast.errors import DiveFastError, shown

DEFAULT_PROBES = 100
# What settings of these annotations take.
_KINDS: dict[str, tuple[str, type]] = {
    "bool": ("true or false", bool),
    "int": ("a whole number", Integral),
    "float": ("a number", Real),
    "str": ("a word", str),
}


@dataclass(frozen=True)
class Task:
    """What a strategy knows of the one image it works for: nothing but the possible answers.

    Attributes:
        vocabulary: the possible answers.
        probes: the probe list; requests name its rows.
        seed: for strategies that draw at random.
        log_prior: float64 [C] over the inverse temperature, log p(y) / beta, if it is not uniform:
            the best class has the lowest L(y; x0) - log_prior.
        shortlist: learned correction of what a gradient says of these classes, if there is one.
        head: learned ranking of these classes by the features of one forward, if there is one
            (``looking.look``). Given to strategies whose ``uses_head`` is True only.
    """

    vocabulary: Vocabulary
    probes: ProbeList
    seed: int = 0
    log_prior: torch.Tensor | None = None
    shortlist: Shortlist | None = None
    head: Head | None = None

    def penalty(self) -> torch.Tensor:
        """What is added to each class's mean loss before classes are compared, float64 [C]."""
        if self.log_prior is None:
            return torch.zeros(len(self.vocabulary), dtype=torch.float64)
        return -self.log_prior.double()


class Strategy(Protocol):
    """The settings of a way to find the best condition: a frozen dataclass with two methods.

    Attributes:
        loss: "l2", "l1" or "huber".
    """

    name: ClassVar[str]
    loss: str

    def probes(
        self, k: int | None, n_timesteps: int, shape: tuple[int, ...], seed: int
    ) -> ProbeList:
        """The probe list that this strategy wants when the user gives none."""
        ...

    def search(self, task: Task) -> Search:
        """A generator that yields requests for one image and returns an ``Answer``."""
        ...


class DefaultProbes:
    """Mixin: K probes (100 unless said) in low-discrepancy order."""

    def probes(
        self, k: int | None, n_timesteps: int, shape: tuple[int, ...], seed: int
    ) -> ProbeList:
        return low_discrepancy_probes(DEFAULT_PROBES if k is None else k, n_timesteps, shape, seed)


_STRATEGIES: dict[str, Strategy] = {}
_PRESETS: dict[str, tuple[str, Strategy]] = {}


def register_strategy(name: str, default: Strategy) -> None:
    """Makes ``strategy=name`` mean ``default``, everywhere and on the command line."""
    _STRATEGIES[name] = default


def register_preset(name: str, strategy: str, settings: Strategy) -> None:
    """Makes ``preset=name`` mean ``settings``, a variant of the strategy called ``strategy``."""
    _PRESETS[name] = (strategy, settings)


def strategy_names() -> tuple[str, ...]:
    """Of all strategies that are registered."""
    return tuple(_STRATEGIES)


def preset_names() -> tuple[str, ...]:
    """Of all presets that are registered."""
    return tuple(_PRESETS)


def resolve_strategy(
    strategy: str | Strategy | None, preset: str | None, settings: dict[str, Any]
) -> Strategy:
    """The strategy that a user asked for by name, by preset, or as an object, with settings.

    Raises:
        DiveFastError: an unknown name or setting, or a preset of another strategy.
    """
    if not isinstance(preset, str | None):
        raise DiveFastError(f"expected a preset of {', '.join(_PRESETS)}, got {shown(preset)}.")
    chosen = _by_name(strategy, preset) if isinstance(strategy, str | None) else strategy
    if not isinstance(strategy, str | None) and preset is not None:
        raise DiveFastError("expected a strategy object or a preset, got both.")
    return with_settings(chosen, settings)


def with_settings(chosen: Any, settings: dict[str, Any]) -> Any:
    """The strategy with other settings.

    Raises:
        DiveFastError: it has no setting of that name, or refuses the value.
    """
    if not settings:
        return chosen
    known = {field.name: field for field in fields(chosen)} if is_dataclass(chosen) else {}
    for key, value in settings.items():
        if key not in known:
            raise DiveFastError(
                f"unknown setting {key!r}: {type(chosen).__name__} has {', '.join(known)}."
            )
        _check_kind(known[key], value)
    return replace(chosen, **settings)


def _check_kind(field: Field, value: Any) -> None:
    """That the value is a number, a word, or true or false, where the field is annotated so."""
    annotated = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", "")
    kinds = [kind.strip() for kind in annotated.split("|")]
    if kinds[0] not in _KINDS or (value is None and "None" in kinds):
        return
    what, kind = _KINDS[kinds[0]]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise DiveFastError(f"{field.name} must be {what}, got {value!r}.")


def _by_name(strategy: str | None, preset: str | None) -> Strategy:
    if preset is not None:
        if preset not in _PRESETS:
            raise DiveFastError(f"expected a preset of {', '.join(_PRESETS)}, got {preset!r}.")
        owner, settings = _PRESETS[preset]
        if strategy not in (None, owner):
            raise DiveFastError(
                f"preset {preset!r} belongs to strategy {owner!r}, got {strategy!r}."
            )
        return settings
    name = "auto" if strategy is None else strategy
    if name not in _STRATEGIES:
        raise DiveFastError(f"expected a strategy of {', '.join(_STRATEGIES)}, got {name!r}.")
    return _STRATEGIES[name]


class Ledger:
    """The losses seen so far: float32 [C, K], NaN where a class was not measured on a probe."""

    def __init__(self, n_classes: int, n_probes: int) -> None:
        self.losses = torch.full((n_classes, n_probes), torch.nan)

    def add(self, classes: torch.Tensor, probe_ids: torch.Tensor, losses: torch.Tensor) -> None:
        """Enters losses [n, k] of the classes [n] on the probes [k]."""
        self.losses[classes[:, None], probe_ids[None, :]] = losses

    def means(self) -> torch.Tensor:
        """Each class's mean over the probes it was measured on, float32 [C]; NaN without any."""
        return self.losses.nanmean(dim=1)

    def answer(self, index: int, bound: torch.Tensor | None = None, **trace: Any) -> Answer:
        """The answer ``index``, with losses that can be compared.

        A probe's loss depends on its timestep far more than on the class, so the mean of a class
        over fewer probes is no measure by itself. It enters as the winner's mean plus the mean of
        the paired differences to the winner, over the probes that both were measured on.
        """
        winner = self.losses[index]
        losses = winner.nanmean() + (self.losses - winner).nanmean(dim=1)
        n_probes = self.losses.isfinite().sum(dim=1)
        return Answer(index, losses, n_probes, trace, bound)
