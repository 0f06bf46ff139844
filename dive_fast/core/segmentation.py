"""How error maps become a posterior of each place: the three numbers that are fitted.

    s_c(p) = gamma (G_sigma * e_c)(p) + b [c is the background],    P(c | p) = softmax_c s_c(p)

e_c is the evidence for class c: minus its error map, or what the error grows by without the object.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from dive_fast.core.config import LARGEST_FLOAT
from dive_fast.core.numbers import is_number
from dive_fast.errors import DiveFastError, shown

LARGEST_SIGMA = 1.0  # of the map's sides
_FIELDS = ("gamma", "sigma", "background")


@dataclass(frozen=True)
class SegmentationRule:
    """What evidence counts at a place.

    Attributes:
        gamma: log-odds per unit of the loss, above 0.
        sigma: standard deviation of the Gaussian, as a share of the map's sides; 0 for none.
        background: b, log-odds of the background where there is no evidence.

    Raises:
        DiveFastError: a value that is none of its kind.
    """

    gamma: float
    sigma: float = 0.0
    background: float = 0.0

    def __post_init__(self) -> None:
        if not is_number(self.gamma) or not 0 < self.gamma <= LARGEST_FLOAT:
            raise DiveFastError(f"gamma must be a finite number above 0, got {shown(self.gamma)}.")
        if not is_number(self.sigma, 0) or self.sigma > LARGEST_SIGMA:
            raise DiveFastError(f"sigma must be a number from 0 to 1, got {shown(self.sigma)}.")
        if not is_number(self.background) or abs(self.background) > LARGEST_FLOAT:
            raise DiveFastError(
                f"background must be a finite number, got {shown(self.background)}."
            )

    @classmethod
    def for_model(
        cls, beta: float, shape: tuple[int, int], sigma: float, background: float = 0.0
    ) -> SegmentationRule:
        """What holds without a fit: a window is judged as the classifier judges an image.

            gamma = beta / (h w) max(1, 4 pi sigma^2 h w)

        beta / (h w) is what a unit of error at one place counts in -beta L, and 4 pi sigma^2 h w =
        1 / sum G^2 the number of places that a mean weighted by the Gaussian is worth.

        Args:
            beta: of log p(y | x0) = -beta L + log p(y).
            shape: (h, w) of the maps.
            sigma, background: as the attributes.
        """
        places = shape[0] * shape[1]
        return cls(beta / places * max(1.0, 4 * math.pi * sigma**2 * places), sigma, background)

    def scores(self, evidence: Tensor, background: bool) -> Tensor:
        """s of evidence float [C, h, w], float64; ``background``: the last class is that."""
        found = self.gamma * smooth(evidence, self.sigma)
        if background:
            found[-1] += self.background
        return found

    def to_dict(self) -> dict[str, float]:
        """All attributes, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> SegmentationRule:
        """Reads ``to_dict``.

        Raises:
            DiveFastError: an entry is missing, unknown, or no number in its range.
        """
        if not isinstance(content, Mapping) or set(content) != set(_FIELDS):
            raise DiveFastError(f"expected {', '.join(_FIELDS)}, got {shown(content)}.")
        return cls(**content)


def smooth(maps: Tensor, sigma: float) -> Tensor:
    """Maps [..., h, w] after the Gaussian, float64; reflected at the edges, which keeps means."""
    found = maps.double()
    if sigma == 0:
        return found.clone()
    sides = [sigma * side for side in maps.shape[-2:]]
    widths = [0.0] * (maps.ndim - 2) + sides
    return torch.from_numpy(gaussian_filter(found.numpy(), widths, mode="reflect"))
