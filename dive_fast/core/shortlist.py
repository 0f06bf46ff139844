"""What a gradient at the mean embedding says of every class: a first-order estimate, corrected.

    L(y_c) ~ L(v0) + slope g . (v_c - v0) + curvature_c,     g = dL/dv at v0 = mean of the rows

The network answers a class vector nearly linearly, f(v) ~ f(v0) + J (v - v0), so that

    L(y_c) = L(v0) + g . (v_c - v0) + E || J (v_c - v0) ||^2 / dim

and the last term hardly depends on the image: it is learned once per class, from a few images and
without labels. The slope makes up for what is not linear.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from dive_fast.core.config import LARGEST_FLOAT
from dive_fast.core.numbers import is_number
from dive_fast.core.vocabulary import Vocabulary
from dive_fast.errors import DiveFastError, shown

SLOPES = (0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.5)
_FIELDS = ("slope", "curvature", "classes")


@dataclass(frozen=True)
class Shortlist:
    """The correction for one vocabulary.

    Attributes:
        slope: factor of the first-order term.
        curvature: [C], what is added to each class's estimate.
        classes: digest of the names that it was learned for.
    """

    slope: float
    curvature: tuple[float, ...]
    classes: str

    def __post_init__(self) -> None:
        values = self.curvature
        good = isinstance(values, list | tuple) and all(map(is_number, values)) and len(values) > 0
        # Both meet float32.
        good = good and all(abs(x) <= LARGEST_FLOAT for x in values)
        if not good or not is_number(self.slope) or not 0 < self.slope <= LARGEST_FLOAT:
            raise DiveFastError(
                "a shortlist needs a slope above 0 and a finite curvature for every class, "
                f"got a slope of {shown(self.slope)} and a curvature of {shown(values)}."
            )
        if not isinstance(self.classes, str):
            raise DiveFastError(
                f"a shortlist needs the digest of its classes, got {shown(self.classes)}."
            )
        object.__setattr__(self, "curvature", tuple(map(float, values)))

    def fits(self, vocabulary: Vocabulary) -> bool:
        """Whether it was learned for these classes."""
        return self.classes == digest(vocabulary.names)

    def correct(self, linear: torch.Tensor) -> torch.Tensor:
        """slope g . (v_c - v0) + curvature_c of every class, of the first-order terms [C]."""
        return self.slope * linear + torch.tensor(self.curvature)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, to six digits."""
        curvature = [float(f"{x:.6g}") for x in self.curvature]
        return {"slope": self.slope, "curvature": curvature, "classes": self.classes}

    @classmethod
    def from_dict(cls, values: Any) -> Shortlist:
        """What ``to_dict`` made.

        Raises:
            DiveFastError: an entry is missing, unknown, or holds what it must not.
        """
        if not isinstance(values, Mapping) or set(values) != set(_FIELDS):
            raise DiveFastError(f"a shortlist must hold exactly {', '.join(_FIELDS)}.")
        return cls(**values)


def digest(texts: Iterable[str]) -> str:
    """Tells one list of texts from another, as 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()[:16]


def estimate_shortlist(
    losses: torch.Tensor, base: torch.Tensor, linear: torch.Tensor
) -> tuple[float, torch.Tensor]:
    """Learns slope and curvature from images whose classes were all measured.

    The curvature is the mean of what the first-order estimate leaves; the slope is the one of
    ``SLOPES`` under which the measured best class ranks highest on images that were left out.

    Args:
        losses: float [B, C], measured mean losses, B >= 2.
        base: float [B], L(v0) on the same probes.
        linear: float [B, C], g . (v_c - v0).

    Returns:
        slope, curvature float32 [C].
    """
    if losses.ndim != 2 or len(losses) < 2 or linear.shape != losses.shape:
        raise DiveFastError(
            f"expected losses and linear estimates [B, C] of at least 2 images, "
            f"got {list(losses.shape)} and {list(linear.shape)}."
        )
    n, best = len(losses), losses.argmin(dim=1, keepdim=True)
    measured = losses.double() - base.double()[:, None]

    def mean_rank(slope: float) -> float:
        left = measured - slope * linear
        others = (left.sum(dim=0) - left) / (n - 1)
        estimates = slope * linear + others
        return (estimates < estimates.gather(1, best)).sum(dim=1).double().mean().item()

    slope = min(SLOPES, key=mean_rank)
    return slope, (measured - slope * linear).mean(dim=0).float()
