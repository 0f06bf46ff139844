"""Ways to find the best condition with few evaluations.

A strategy is a frozen dataclass of settings; its ``search`` is a generator for one image that
yields requests. ``register_strategy`` and ``register_preset`` take others from outside.
"""

from __future__ import annotations

from dive_fast.strategies.auto import Auto
from dive_fast.strategies.base import (
    DefaultProbes,
    Ledger,
    Strategy,
    Task,
    preset_names,
    register_preset,
    register_strategy,
    resolve_strategy,
    strategy_names,
)
from dive_fast.strategies.dive_paper import DivePaper
from dive_fast.strategies.enumerate import AdaptiveEnumerate, Enumerate
from dive_fast.strategies.invert import Invert
from dive_fast.strategies.race import Race

__all__ = [
    "AdaptiveEnumerate",
    "Auto",
    "DefaultProbes",
    "DivePaper",
    "Enumerate",
    "Invert",
    "Ledger",
    "Race",
    "Strategy",
    "Task",
    "preset_names",
    "register_preset",
    "register_strategy",
    "resolve_strategy",
    "strategy_names",
]

register_strategy("auto", Auto())
register_strategy("enumerate", Enumerate())
register_strategy("invert", Invert())
register_strategy("race", Race())
register_preset("dive-paper", "invert", DivePaper())
register_preset("diffusion-classifier", "enumerate", AdaptiveEnumerate())
