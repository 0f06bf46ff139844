"""What a search for objects asks of one: the numbers that are fitted to annotated images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from dive_fast.core.config import LARGEST, LARGEST_FLOAT
from dive_fast.core.numbers import is_number, is_whole
from dive_fast.errors import DiveFastError, shown

_FIELDS = {"margin", "prior_weight", "probes", "sizes", "final_margin"}
_LATER = {"sizes", "final_margin"}  # which files of earlier versions lack

Size = tuple[float, float]  # width and height, shares of the image


@dataclass(frozen=True)
class DetectionRule:
    """When an object counts as found.

    Attributes:
        margin: share of the loss that an object has to explain, in [0, 1); None where not fitted.
        prior_weight: w of the prior that the fit had; None where it had none.
        probes: K of the search that it was fitted with; None for the usual number.
        sizes: usual ones of objects, widths and heights as shares of the image in (0, 1], of which
            windows are scanned; None where the search goes without.
        final_margin: share of the loss that an object has to explain in the end, in [0, 1); None
            where that is ``margin``.

    Raises:
        DiveFastError: a value that is none of its kind.
    """

    margin: float | None = None
    prior_weight: float | None = None
    probes: int | None = None
    sizes: tuple[Size, ...] | None = None
    final_margin: float | None = None

    def __post_init__(self) -> None:
        for name in ("margin", "final_margin"):
            margin = getattr(self, name)
            if margin is not None and not (is_number(margin, 0) and margin < 1):
                raise DiveFastError(f"{name} must be in [0, 1), got {shown(margin)}.")
        weight = self.prior_weight
        if weight is not None and not (is_number(weight, 0) and weight <= LARGEST_FLOAT):
            raise DiveFastError(f"prior_weight must be at least 0, got {shown(weight)}.")
        if self.probes is not None and not (is_whole(self.probes, 1) and self.probes <= LARGEST):
            raise DiveFastError(f"probes must be at least 1, got {shown(self.probes)}.")
        if self.sizes is not None:
            object.__setattr__(self, "sizes", as_sizes(self.sizes))

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> DetectionRule:
        """What ``to_dict`` gave.

        Raises:
            DiveFastError: other fields, or values that are none of their kind.
        """
        if not isinstance(content, Mapping) or not _FIELDS - _LATER <= set(content) <= _FIELDS:
            raise DiveFastError(f"expected {', '.join(sorted(_FIELDS))}, got {shown(content)}.")
        return cls(**content)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def as_sizes(sizes: Any) -> tuple[Size, ...]:
    """Widths and heights as shares of an image, in tuples.

    Raises:
        DiveFastError: they are no pairs of numbers in (0, 1].
    """
    pairs = sizes if isinstance(sizes, list | tuple) else [None]
    for pair in pairs:
        if not (
            isinstance(pair, list | tuple)
            and len(pair) == 2
            and all(is_number(share, 0) and 0 < share <= 1 for share in pair)
        ):
            raise DiveFastError(
                "sizes must be pairs of a width and a height, shares of the image in (0, 1], got "
                f"{shown(sizes)}."
            )
    return tuple((float(width), float(height)) for width, height in pairs)
