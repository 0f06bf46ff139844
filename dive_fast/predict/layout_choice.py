"""Which search a detector runs, on how many probes: part of ``LayoutDetector``."""

from __future__ import annotations

import dataclasses
from typing import Any

from dive_fast.core.detection import DetectionRule
from dive_fast.core.probes import ProbeList
from dive_fast.models.protocol import optional
from dive_fast.predict.predictor import Predictor
from dive_fast.strategies.layout import Guided, LayoutStrategy, resolve_layout_strategy
from dive_fast.strategies.layout.board import LayoutProbes


class LayoutChoice(Predictor):
    """The part of ``LayoutDetector`` that takes what was fitted where nobody says otherwise."""

    def layout_strategy(
        self, strategy: str | LayoutStrategy | None, settings: dict[str, Any]
    ) -> LayoutStrategy:
        """The search that a caller asked for, with margin and sizes as fitted unless it has some.

        Raises:
            DiveFastError: an unknown name or setting.
        """
        chosen = resolve_layout_strategy(strategy, settings)
        if not isinstance(chosen, LayoutProbes):
            return chosen
        rule = optional(self.model, "detection") or DetectionRule()
        fitted: dict[str, Any] = {}
        # One of somebody's own need not have a margin.
        if getattr(chosen, "margin", 0) is None:
            fitted["margin"] = chosen.least_share if rule.margin is None else rule.margin
        if isinstance(chosen, Guided) and chosen.sizes is None:
            fitted["sizes"] = rule.sizes or ()
        # It was fitted beside the margin: with another one it says nothing.
        if isinstance(chosen, Guided) and chosen.final_margin is None and "margin" in fitted:
            fitted["final_margin"] = rule.final_margin
        return dataclasses.replace(chosen, **fitted) if fitted else chosen

    def _count(self, probes: int | ProbeList | None, strategy: Any) -> int | ProbeList | None:
        """As many as margin and beta were fitted with, where nobody says."""
        rule = optional(self.model, "detection")
        if probes is not None or rule is None or not isinstance(strategy, LayoutProbes):
            return probes
        return rule.probes


def counted(strategy: Any, probes: ProbeList) -> Any:
    """A search with the numbers of probes that it takes of a list."""
    return strategy.counted(len(probes)) if isinstance(strategy, Guided) else strategy
