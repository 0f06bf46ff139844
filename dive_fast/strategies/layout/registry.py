"""The register of the searches for layouts."""

from __future__ import annotations

from typing import Any

from dive_fast.errors import DiveFastError
from dive_fast.strategies.base import with_settings
from dive_fast.strategies.layout.board import LayoutStrategy

_STRATEGIES: dict[str, LayoutStrategy] = {}


def register_layout_strategy(name: str, default: LayoutStrategy) -> None:
    """Makes ``strategy=name`` mean ``default`` for detectors, and on the command line."""
    _STRATEGIES[name] = default


def layout_strategy_names() -> tuple[str, ...]:
    """Of all searches for boxes that are registered."""
    return tuple(_STRATEGIES)


def resolve_layout_strategy(
    strategy: str | LayoutStrategy | None, settings: dict[str, Any]
) -> LayoutStrategy:
    """The search that a user asked for by name or as an object, with settings.

    Raises:
        DiveFastError: an unknown name or setting.
    """
    chosen = "guided" if strategy is None else strategy
    if isinstance(chosen, str):
        if chosen not in _STRATEGIES:
            raise DiveFastError(
                f"expected a strategy for layouts of {', '.join(_STRATEGIES)}, got {chosen!r}."
            )
        chosen = _STRATEGIES[chosen]
    return with_settings(chosen, settings)
