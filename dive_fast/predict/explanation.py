"""Where one class explains a picture better than another, and how sure that is.

    d(i, j) = L_b(i, j) - L_a(i, j)

L_y(i, j) is the loss of class y at place (i, j) before its mean over the places, the mean over the
probes; so the mean of d over the places is what b's loss exceeds that of a by.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image

from dive_fast.core.numbers import is_number, whole
from dive_fast.core.probes import ProbeList
from dive_fast.core.requests import ErrorMaps, Search
from dive_fast.data.images import as_image, center_crop, to_mode
from dive_fast.errors import DiveFastError, shown
from dive_fast.predict.overlay import LONG_SIDE, draw_map, smoothed

MOST_GROUPS = 16  # of probes, between which the variance is taken
MOST_PIXELS = 8192  # of a drawing's side


@dataclass(frozen=True)
class Explanation:
    """The map d of two classes, and what it took.

    Attributes:
        groups: float32 [G, h, w] in the model's own space, d on the mean of each group of probes.
            A group holds whole units (antithetic pairs).
        sizes: how many probes each group has.
        a, b: names of the two classes; d is positive where a explains the picture better.
        evaluations: of the network for the map, beside those of a search for a or b.
        picture: as the model saw it, a square; None where latents were given.
    """

    groups: torch.Tensor
    sizes: Sequence[int]
    a: str
    b: str
    evaluations: int
    picture: Image.Image | None = field(default=None, repr=False)

    @property
    def n_probes(self) -> int:
        """That each of the two classes was measured on."""
        return sum(self.sizes)

    @property
    def difference(self) -> torch.Tensor:
        """d, float32 [h, w]."""
        return _mean(self.groups, self.sizes).float()

    @property
    def standard_error(self) -> torch.Tensor:
        """Of every place of d, float32 [h, w]; NaN with a single group.

        se^2 = G / (G - 1) sum_g (n_g / n)^2 (d_g - d)^2, between the G groups of n_g probes.
        Timesteps that cover their range evenly make the true error smaller rather than larger.
        """
        return _standard_error(self.groups, self.sizes).float()

    @property
    def gap(self) -> float:
        """L_b - L_a, the mean of d over the places."""
        return self.difference.double().mean().item()

    @property
    def gap_standard_error(self) -> float:
        """Of ``gap``, between the groups; NaN with a single one."""
        means = self.groups.double().mean(dim=(1, 2))
        return _standard_error(means, self.sizes).item()

    def smoothed(self) -> tuple[torch.Tensor, torch.Tensor]:
        """d and its standard error after a Gaussian of 1/16 of the sides, float32 [h, w] each.

        The error is that of the smoothed map: neighbours' errors cancel where they are independent.
        """
        groups = torch.from_numpy(smoothed(self.groups))
        mean, error = _mean(groups, self.sizes), _standard_error(groups, self.sizes)
        return mean.float(), error.float()

    def significant(self, z: float = 2.0) -> torch.Tensor:
        """bool [h, w]: where the smoothed d is more than z standard errors from 0.

        Every place by itself: with z = 2 and 16 groups, one of sixteen places without a difference
        is still among them. Nowhere with a single group of probes, of which no error is known.

        Raises:
            DiveFastError: z is no number of at least 0.
        """
        if not is_number(z, at_least=0):
            raise DiveFastError(f"z must be a number of at least 0, got {shown(z)}.")
        mean, error = self.smoothed()
        return mean.abs() > z * error

    def image(
        self, picture: Any = None, *, size: int = LONG_SIDE, z: float | None = 2.0
    ) -> Image.Image:
        """The smoothed map over the picture in pale grey: red for a, blue for b, at one scale.

        Args:
            picture: to draw on, in a form that ``clf`` takes; its central square is what the map
                lies over. None: as the model saw it, or plain grey where latents were given.
            size: a smaller picture is enlarged to at least so many pixels, by a whole factor.
            z: places that are within so many standard errors stay grey (``significant``); None
                colours all.

        Returns:
            An RGB image.

        Raises:
            DiveFastError: bad input.
        """
        size = whole("size", size, 1, MOST_PIXELS)
        picture = self.picture if picture is None else _square(as_image(picture))
        if picture is None:
            picture = Image.new("L", self.groups.shape[:0:-1], 255)
        known = None if z is None else self.significant(z).numpy()
        return draw_map(smoothed(self.difference), picture, size, known)


def groups_of(probes: ProbeList) -> list[torch.Tensor]:
    """Rows of the probes int64 [n_g] of each group: at most 16, of whole units and nearly alike.

    Probes behind the last whole unit are left out, unless there is no whole one.
    """
    units = len(probes) // probes.unit
    if units == 0:
        return [torch.arange(len(probes))]
    rows = torch.arange(units * probes.unit).view(units, probes.unit)
    return [part.flatten() for part in rows.tensor_split(min(MOST_GROUPS, units))]


def grouped_maps(classes: torch.Tensor, groups: Sequence[torch.Tensor]) -> Search:
    """Asks for the error maps of n classes on each group of probes; returns float32 [G, n, h, w].

    A part of a search: a whole one returns an ``Answer``.
    """
    maps = []
    for probe_ids in groups:
        maps.append((yield ErrorMaps(classes, probe_ids)))
    return torch.stack(maps)


def _mean(groups: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """Over all probes, float64 [...] of [G, ...]."""
    share = torch.tensor(sizes, dtype=torch.float64) / sum(sizes)
    return torch.tensordot(share, groups.double(), dims=1)


def _standard_error(groups: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """float64 [...] of [G, ...]."""
    n = len(groups)
    if n == 1:
        return torch.full(groups.shape[1:], math.nan, dtype=torch.float64)
    share = torch.tensor(sizes, dtype=torch.float64) / sum(sizes)
    squares = (groups.double() - _mean(groups, sizes)).square()
    return (n / (n - 1) * torch.tensordot(share.square(), squares, dims=1)).sqrt()


def _square(picture: Image.Image) -> Image.Image:
    """What the model sees of it, in its own size."""
    return center_crop(to_mode(picture, 3), min(picture.size))


def as_picture(pixels: torch.Tensor) -> Image.Image:
    """Of float32 pixels [channels, h, w] in [-1, 1], 1 or 3 channels."""
    values = ((pixels + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
    return Image.fromarray(np.ascontiguousarray(values[..., 0] if len(pixels) == 1 else values))
