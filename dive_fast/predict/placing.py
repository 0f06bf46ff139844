"""Which probes a run takes, and what each counts: learned timesteps and weights together."""

from __future__ import annotations

from typing import Any, ClassVar

from dive_fast.core.loss_weights import LossWeights
from dive_fast.core.numbers import whole_seed
from dive_fast.core.probes import ProbeList
from dive_fast.core.timesteps import TimestepWeights
from dive_fast.errors import DiveFastError, ModelError, shown
from dive_fast.models.protocol import Model, optional
from dive_fast.predict.arguments import as_probes
from dive_fast.strategies import DefaultProbes
from dive_fast.strategies.base import DEFAULT_PROBES
from dive_fast.strategies.layout.board import DEFAULT_PROBES as LAYOUT_PROBES
from dive_fast.strategies.layout.board import LayoutProbes

# The lists of probes that are ours to place, and how many probes they have unless told.
_OURS = {DefaultProbes.probes: DEFAULT_PROBES, LayoutProbes.probes: LAYOUT_PROBES}
_NAMED = (None, "learned", "uniform")
_ATTRIBUTES = {TimestepWeights: "timesteps", LossWeights: "loss_weights"}  # of a model
_ARTICLES = {TimestepWeights: "a TimestepWeights", LossWeights: "LossWeights"}


class Placing:
    """The part of ``Predictor`` that says where its model is asked."""

    model: Model
    # Whether the model's learned weights are used unless told: they are those of its classes.
    _weighted: ClassVar[bool] = False

    def probe_list(
        self,
        strategy: Any,
        probes: int | ProbeList | None = None,
        seed: int = 0,
        timesteps: str | TimestepWeights | None = None,
        weights: str | LossWeights | None = None,
    ) -> ProbeList:
        """The probes that ``strategy`` would run on: given, counted, or its own choice.

        Raises:
            DiveFastError: a list that does not suit the model; or as ``learned_timesteps`` and
                ``learned_weights``.
        """
        probes, seed = self._count(as_probes(probes), strategy), whole_seed(seed)
        shape, n_timesteps = tuple(self.model.latent_shape), len(self.model.schedule)
        placed = self._placed(strategy, probes, timesteps, weights)
        if placed is not None:
            count = _OURS[type(strategy).probes] if probes is None else probes
            probes = placed.probes(count, shape, seed)
        elif not isinstance(probes, ProbeList):
            probes = strategy.probes(probes, n_timesteps, shape, seed)
            if not isinstance(probes, ProbeList):
                raise DiveFastError(
                    f"expected the strategy {strategy.name} to choose a ProbeList, got "
                    f"{shown(probes)}."
                )
        probes.check(shape, n_timesteps)
        return probes

    def _count(self, probes: int | ProbeList | None, strategy: Any) -> int | ProbeList | None:
        """What was given, or how many a fit was made with; None for the usual number."""
        return probes

    def learned_timesteps(
        self,
        strategy: Any,
        probes: int | ProbeList | None = None,
        timesteps: str | TimestepWeights | None = None,
    ) -> TimestepWeights | None:
        """The learned timesteps that a run follows, or None for the strategy's own list.

        Args:
            timesteps: "learned" takes the model's, "uniform" none, a ``TimestepWeights`` that one;
                None the model's where it has them and the list of probes is ours to place.

        Raises:
            DiveFastError: something else, or learned timesteps asked for where the probes are given
                or published.
            ModelError: the model has none, or such as are not for its schedule.
        """
        ours = _is_ours(strategy, probes)
        return self._chosen("timesteps", timesteps, TimestepWeights, ours, ours)

    def learned_weights(
        self,
        strategy: Any,
        probes: int | ProbeList | None = None,
        weights: str | LossWeights | None = None,
    ) -> LossWeights | None:
        """The learned weights that a run's losses are multiplied with, or None for none.

        Args:
            weights: "learned" takes the model's, "uniform" none, a ``LossWeights`` that one; None
                those of a classifier's model where it has them and the list of probes is ours to
                place.

        Raises:
            DiveFastError: something else, or learned weights asked for where the probes are given
                or published.
            ModelError: the model has none, or such as are not for its schedule.
        """
        ours = _is_ours(strategy, probes)
        return self._chosen("weights", weights, LossWeights, ours, ours and self._weighted)

    def _chosen(self, what: str, given: Any, kind: type, ours: bool, default: bool) -> Any:
        """What was given, or the model's own; None for none.

        Args:
            what: "timesteps" or "weights".
            kind: the class that may be given.
            ours: whether the list of probes is ours to place.
            default: whether None means the model's own.
        """
        asked = isinstance(given, kind)
        if not asked and not (isinstance(given, str | None) and given in _NAMED):
            raise DiveFastError(
                f"expected {what} 'learned', 'uniform' or {_ARTICLES[kind]}, got {shown(given)}."
            )
        if given == "uniform" or (given is None and not default):
            return None
        if not ours:
            raise DiveFastError(
                f"learned {what} need a list of probes that is ours to choose: "
                "this one is given or published."
            )
        found = given if asked else optional(self.model, _ATTRIBUTES[kind])
        if found is None and given == "learned":
            raise ModelError(f"{self.model.name} has no learned {what}; see fit_{what}.")
        if found is not None:
            self._check_timesteps(found)
        return found

    def _placed(
        self,
        strategy: Any,
        probes: int | ProbeList | None,
        timesteps: str | TimestepWeights | None,
        weights: str | LossWeights | None,
    ) -> TimestepWeights | None:
        """Where learned timesteps and weights together take the probes, and what each counts."""
        density = self.learned_timesteps(strategy, probes, timesteps)
        learned = self.learned_weights(strategy, probes, weights)
        if learned is None:
            return density
        as_told = timesteps == "uniform" or isinstance(timesteps, TimestepWeights)
        return learned.placed(density, follow=not as_told)

    def _check_timesteps(self, weights: TimestepWeights | LossWeights) -> None:
        if weights.n_timesteps != len(self.model.schedule):
            raise ModelError(
                f"{self.model.name} has {len(self.model.schedule)} timesteps, "
                f"but these were learned for {weights.n_timesteps}."
            )


def _is_ours(strategy: Any, probes: int | ProbeList | None) -> bool:
    """Whether the list of probes is ours to place: neither given nor the strategy's own."""
    _check_strategy(strategy)
    return not isinstance(probes, ProbeList) and getattr(type(strategy), "probes", None) in _OURS


def _check_strategy(strategy: Any) -> None:
    """That it has what a strategy has; a class is not yet one."""
    lacks = [name for name in ("name", "loss", "probes", "search") if not hasattr(strategy, name)]
    if lacks or isinstance(strategy, type):
        raise DiveFastError(
            "expected a strategy by name or as an object with name, loss, probes and search, got "
            f"{shown(strategy)}."
        )
