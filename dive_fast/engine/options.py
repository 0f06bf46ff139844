"""How the engine computes: caching, precision and compilation. None of it changes the question."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dive_fast.core.numbers import whole
from dive_fast.errors import DiveFastError, shown

CACHE_LEVELS = ("auto", "off", "exact", "encoder")
AUTOCAST = (None, "bfloat16")


@dataclass(frozen=True)
class EngineOptions:
    """Settings of the engine; docs/caching.md says what each was measured to do.

    Attributes:
        cache: which activations are kept. "off": none. "exact": what does not depend on the
            condition, per (image, probe), and what depends on the class alone; answers are those of
            "off" to rounding. "encoder": in addition the first part of the network is reused while
            a search moves its condition; approximate. "auto": the model's measured default, "off"
            for models that do not come in parts.
        cache_bytes: bound on all that is kept; 0 shares within a batch and keeps nothing.
        refresh: level "encoder" computes the first part anew at every ``refresh``-th gradient of
            the same (image, probe); 1 is exact.
        autocast: None, or "bfloat16": the network runs under ``torch.autocast``.
        compile: the network runs through ``torch.compile``.
        channels_last: convolution weights and inputs lie in channels-last order.
    """

    cache: str = "auto"
    cache_bytes: int = 1 << 30
    refresh: int = 2
    autocast: str | None = None
    compile: bool = False
    channels_last: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.cache, str) or self.cache not in CACHE_LEVELS:
            raise DiveFastError(
                f"expected a cache of {', '.join(CACHE_LEVELS)}, got {shown(self.cache)}."
            )
        for name, least in (("cache_bytes", 0), ("refresh", 1)):
            object.__setattr__(self, name, whole(name, getattr(self, name), least))
        if not isinstance(self.autocast, str | None) or self.autocast not in AUTOCAST:
            raise DiveFastError(
                f"expected an autocast of bfloat16 or None, got {shown(self.autocast)}."
            )
        for name in ("compile", "channels_last"):
            if not isinstance(value := getattr(self, name), bool):
                raise DiveFastError(f"{name} must be True or False, got {shown(value)}.")

    def identity(self) -> dict[str, Any]:
        """The settings that change answers by more than rounding; a run is resumed on the same."""
        found: dict[str, Any] = {}
        if self.cache == "encoder":
            found.update(cache=self.cache, refresh=self.refresh)
        if self.autocast is not None:
            found.update(autocast=self.autocast)
        return found
