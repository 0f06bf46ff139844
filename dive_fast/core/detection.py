"""What a search for objects asks of one: the numbers that are fitted to annotated images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from dive_fast.core.config import LARGEST, LARGEST_FLOAT
from dive_fast.core.numbers import is_number, is_whole
from dive_fast.errors import DiveFastError, shown

_FIELDS = ("margin", "prior_weight", "probes")


@dataclass(frozen=True)
class DetectionRule:
    """When an object counts as found.

    Attributes:
        margin: share of the loss that an object has to explain, in [0, 1); None where not fitted.
        prior_weight: w of the prior that the fit had; None where it had none.
        probes: K of the search that it was fitted with; None for the usual number.

    Raises:
        DiveFastError: a value that is none of its kind.
    """

    margin: float | None = None
    prior_weight: float | None = None
    probes: int | None = None

    def __post_init__(self) -> None:
        margin = self.margin
        if margin is not None and not (is_number(margin, 0) and margin < 1):
            raise DiveFastError(f"margin must be in [0, 1), got {shown(self.margin)}.")
        weight = self.prior_weight
        if weight is not None and not (is_number(weight, 0) and weight <= LARGEST_FLOAT):
            raise DiveFastError(f"prior_weight must be at least 0, got {shown(weight)}.")
        if self.probes is not None and not (is_whole(self.probes, 1) and self.probes <= LARGEST):
            raise DiveFastError(f"probes must be at least 1, got {shown(self.probes)}.")

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> DetectionRule:
        """What ``to_dict`` gave.

        Raises:
            DiveFastError: other fields, or values that are none of their kind.
        """
        if not isinstance(content, Mapping) or set(content) != set(_FIELDS):
            raise DiveFastError(f"expected {', '.join(_FIELDS)}, got {shown(content)}.")
        return cls(**content)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)
