"""What a gradient at the mean embedding says of every class: a first-order estimate, corrected.

    L(y_c) ~ L(v0) + slope g . (v_c - v0) + curvature_c,     g = dL/dv at v0 = mean of the rows

The network answers a class vector nearly linearly, f(v) ~ f(v0) + J (v - v0), so that

    L(y_c) = L(v0) + g . (v_c - v0) + E || J (v_c - v0) ||^2 / dim

and the last term hardly depends on the image: it is learned once per class, from a few images and
without labels. The slope makes up for what is not linear. What is learned was tried on images that
it was not learned from; ``checks`` says with what result.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

import torch

from dive_fast.core.config import LARGEST_FLOAT
from dive_fast.core.numbers import is_number, is_whole
from dive_fast.core.vocabulary import Vocabulary
from dive_fast.errors import DiveFastError, shown

SLOPES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.5)
# Of an earlier version: nothing says how far to trust such a one.
OLD_FIELDS = {"slope", "curvature", "classes"}
_FIELDS = {*OLD_FIELDS, "error", "control", "checks"}
_LATER = {"weights"}  # left out where it says nothing
NEAREST = 4


@dataclass(frozen=True)
class Check:
    """How ``auto`` did at one ``min_agreement`` on images that were left out.

    Attributes:
        min_agreement: what was asked for.
        images: how many were left out, each in its turn.
        wrong: answers that were not enumeration's.
        evaluations: mean of an image.
    """

    min_agreement: float
    images: int
    wrong: int
    evaluations: float

    def __post_init__(self) -> None:
        numbers = all(map(is_number, (self.min_agreement, self.evaluations)))
        whole = is_whole(self.images, 1) and is_whole(self.wrong, 0)
        if not (numbers and whole and 0 < self.min_agreement < 1 and self.wrong <= self.images):
            raise DiveFastError(
                "a check needs min_agreement between 0 and 1, images, no more wrong ones, and "
                f"evaluations, got {shown(asdict(self))}."
            )

    def keeps(self, min_agreement: float) -> bool:
        """Whether a new image's answer is right that often, as far as so many images can tell.

        With one more image, wrong ones are at most (wrong + 1) / (images + 1) in expectation. Where
        no number of right answers would do, all must be right.
        """
        # 1 - 0.9 is less than 0.1 in float64.
        allowed = max(round((1 - min_agreement) * (self.images + 1), 9), 1)
        return self.wrong + 1 <= allowed


@dataclass(frozen=True)
class Shortlist:
    """The correction for one vocabulary.

    Attributes:
        slope: factor of the first-order term.
        curvature: [C], what is added to each class's estimate.
        error: tau, the standard error of a class's corrected estimate if the gradient were exact.
        control: factor of the first-order term as control variate of measured losses.
        classes: digest of the names that it was learned for.
        checks: at rising ``min_agreement``; empty if none were made.
        weights: digest of the ``LossWeights`` of the losses; empty of uniform ones.
    """

    slope: float
    curvature: tuple[float, ...]
    error: float
    control: float
    classes: str
    checks: tuple[Check, ...] = ()
    weights: str = ""

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
        for name in ("error", "control"):
            value = getattr(self, name)
            if not is_number(value) or not 0 <= value <= LARGEST_FLOAT:
                raise DiveFastError(
                    f"a shortlist needs a finite {name} of at least 0, got {shown(value)}."
                )
        if not isinstance(self.classes, str):
            raise DiveFastError(
                f"a shortlist needs the digest of its classes, got {shown(self.classes)}."
            )
        if not isinstance(self.weights, str):
            raise DiveFastError(
                f"a shortlist needs the digest of its weights, got {shown(self.weights)}."
            )
        object.__setattr__(self, "curvature", tuple(map(float, values)))
        object.__setattr__(self, "checks", tuple(self.checks))

    def fits(self, vocabulary: Vocabulary) -> bool:
        """Whether it was learned for these classes."""
        return self.classes == digest(vocabulary.names)

    def needed(self, min_agreement: float) -> float | None:
        """The ``min_agreement`` to ask for, so that so many answers are enumeration's.

        What is asked for where nothing was checked; None where no check kept it.
        """
        if not self.checks:
            return min_agreement
        kept = [x.min_agreement for x in self.checks if x.keeps(min_agreement)]
        return max(min_agreement, min(kept)) if kept else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, to six digits."""
        return {
            "slope": self.slope,
            "curvature": [_six(x) for x in self.curvature],
            "error": _six(self.error),
            "control": _six(self.control),
            "classes": self.classes,
            "checks": [asdict(check) for check in self.checks],
            **({"weights": self.weights} if self.weights else {}),
        }

    @classmethod
    def from_dict(cls, values: Any) -> Shortlist:
        """What ``to_dict`` made.

        Raises:
            DiveFastError: an entry is missing, unknown, or holds what it must not.
        """
        if not isinstance(values, Mapping) or set(values) - _LATER != _FIELDS:
            raise DiveFastError(f"a shortlist must hold exactly {', '.join(sorted(_FIELDS))}.")
        checks = values["checks"]
        keys = {field.name for field in fields(Check)}
        good = isinstance(checks, list) and all(isinstance(x, Mapping) for x in checks)
        if not good or any(set(x) != keys for x in checks):
            raise DiveFastError(
                f"the checks of a shortlist must be a list of {', '.join(sorted(keys))} each, "
                f"got {shown(checks)}."
            )
        return cls(**{**values, "checks": tuple(Check(**x) for x in checks)})


def digest(texts: Iterable[str]) -> str:
    """Tells one list of texts from another, as 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()[:16]


class Survey(NamedTuple):
    """What was measured of B images: every class, and the gradient at the mean of the rows.

    Attributes:
        losses: float64 [B, C, U], l by unit of the probes, U >= 2.
        base: float64 [B, U], l at v0 on them.
        slopes: float64 [B, C, U], g . (v_c - v0) of each unit's gradient.
    """

    losses: torch.Tensor
    base: torch.Tensor
    slopes: torch.Tensor


def estimate_shortlist(survey: Survey, classes: str) -> tuple[Shortlist, list[Shortlist]]:
    """Learns a shortlist from images whose classes were all measured.

    The curvature is the mean of what the first-order estimate leaves. Of ``SLOPES`` the one is
    taken under which the best class ranks highest on images that were left out. Error and control
    come from the best class and its nearest rivals: how the corrected estimates err about their
    difference (on images left out), and the regression of l on e between an image's units.

    Args:
        classes: digest of the names.

    Returns:
        the shortlist, and for every image the one that knows nothing of that image's curvature.

    Raises:
        DiveFastError: fewer than 2 images, or shapes that do not fit.
    """
    losses, base, slopes = (x.double() for x in survey)
    if losses.ndim != 3 or len(losses) < 2 or slopes.shape != losses.shape:
        raise DiveFastError(
            f"expected losses and slopes [B, C, U] of at least 2 images, "
            f"got {list(losses.shape)} and {list(slopes.shape)}."
        )
    n, measured = len(losses), losses.mean(dim=2) - base.mean(dim=1, keepdim=True)
    linear, order = slopes.mean(dim=2), losses.mean(dim=2).argsort(dim=1, stable=True)

    def others(slope: float) -> tuple[torch.Tensor, torch.Tensor]:
        left = measured - slope * linear
        return left, (left.sum(dim=0) - left) / (n - 1)

    def mean_rank(slope: float) -> float:
        estimates = slope * linear + others(slope)[1]
        best = estimates.gather(1, order[:, :1])
        return (estimates < best).sum(dim=1).double().mean().item()

    slope = min(SLOPES, key=mean_rank)
    left, without = others(slope)
    near = order[:, : NEAREST + 1]
    missed = (left - without).gather(1, near)
    error = ((missed[:, 1:] - missed[:, :1]).square().mean() / 2).sqrt().item()
    common = {
        "slope": slope,
        "error": error if math.isfinite(error) else 0.0,
        "control": _control(losses, slopes, near),
        "classes": classes,
    }
    learned = Shortlist(curvature=tuple(left.mean(dim=0).tolist()), **common)
    return learned, [Shortlist(curvature=tuple(x.tolist()), **common) for x in without]


def _control(losses: torch.Tensor, slopes: torch.Tensor, near: torch.Tensor) -> float:
    """Regression of l_c - l_b on e_c - e_b between the units of an image, pooled; 0 to 2."""
    index = near[:, :, None].expand(-1, -1, losses.shape[2])
    difference, expected = (
        x[:, 1:] - x[:, :1] for x in (losses.gather(1, index), slopes.gather(1, index))
    )
    difference, expected = (x - x.mean(dim=2, keepdim=True) for x in (difference, expected))
    square = expected.square().sum().item()
    return min(max((difference * expected).sum().item() / square, 0.0), 2.0) if square > 0 else 0.0


def _six(x: float) -> float:
    return float(f"{x:.6g}")
