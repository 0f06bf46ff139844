"""What a search for objects asks of one: the numbers that are fitted to annotated images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from dive_fast.core.config import LARGEST_FLOAT
from dive_fast.core.numbers import is_number
from dive_fast.errors import DiveFastError, shown

_FIELDS = ("margin", "prior_weight")


@dataclass(frozen=True)
class DetectionRule:
    """When an object counts as found.

    Attributes:
        margin: share of the loss that an object has to explain, in [0, 1).
        prior_weight: w of the prior that the fit had; None where it had none.

    Raises:
        DiveFastError: a value that is none of its kind.
    """

    margin: float
    prior_weight: float | None = None

    def __post_init__(self) -> None:
        if not is_number(self.margin, 0) or self.margin >= 1:
            raise DiveFastError(f"margin must be in [0, 1), got {shown(self.margin)}.")
        weight = self.prior_weight
        if weight is not None and not (is_number(weight, 0) and weight <= LARGEST_FLOAT):
            raise DiveFastError(f"prior_weight must be at least 0, got {shown(weight)}.")

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> DetectionRule:
        """What ``to_dict`` gave.

        Raises:
            DiveFastError: other fields, or values that are none of their kind.
        """
        if not isinstance(content, Mapping) or set(content) != set(_FIELDS):
            raise DiveFastError(f"expected {' and '.join(_FIELDS)}, got {shown(content)}.")
        return cls(**content)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)
