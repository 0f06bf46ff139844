"""Which timesteps are worth a probe, and what each counts: learned once per model.

A loss is a mean over timesteps. Taking more of the probes where classes differ more, and counting
each of them less, estimates the same mean with less noise (importance sampling):

    L(y; x0) = mean over t of l(y; t) = E_{t ~ q} [ w(t) l(y; t) ],    w(t) = 1 / q(t)
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from dive_fast.core.config import LARGEST, LARGEST_FLOAT
from dive_fast.core.numbers import is_number, is_whole
from dive_fast.core.probes import ProbeList, low_discrepancy_probes, van_der_corput
from dive_fast.errors import DiveFastError, shown

BINS = 20
_FIELDS = ("n_timesteps", "density", "weights")


@dataclass(frozen=True)
class TimestepWeights:
    """Where probes are taken and what they count, constant within equal bins of [0, T).

    The scale of neither matters: probes are drawn from the density divided by its sum, and weights
    are divided by their mean under the density, so that losses keep their scale.

    Attributes:
        n_timesteps: T of the schedule.
        density: [bins], q(t), how often the timesteps of each bin are taken.
        weights: [bins], w(t), what a probe in each bin counts.
    """

    n_timesteps: int
    density: tuple[float, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        if not is_whole(self.n_timesteps, 1) or self.n_timesteps > LARGEST:
            raise DiveFastError(
                f"n_timesteps must be a whole number of at least 1, got {shown(self.n_timesteps)}."
            )
        for name in ("density", "weights"):
            values = getattr(self, name)
            good = isinstance(values, list | tuple) and all(is_number(x, 0) for x in values)
            # Beyond that their products leave float64.
            if not good or not all(x <= LARGEST_FLOAT for x in values):
                raise DiveFastError(f"{name} must be a list of finite numbers of at least 0.")
            object.__setattr__(self, name, tuple(map(float, values)))
        if len(self.density) != len(self.weights) or not self.density:
            raise DiveFastError(
                f"density and weights must have one number per bin, "
                f"got {len(self.density)} and {len(self.weights)}."
            )
        if not self._mean_weight() > 0:
            raise DiveFastError("density and weights must be above 0 together in some bin.")

    def probes(self, k: int, shape: tuple[int, ...], seed: int = 0) -> ProbeList:
        """K probes whose timesteps follow the density, with their weights.

        The van der Corput sequence goes through the inverse of the density's distribution function,
        so every prefix follows the density, and a shorter list is a prefix of a longer one. The
        noises are those of ``low_discrepancy_probes``.

        Args:
            k: number of probes.
            shape: of a latent, (C, h, w).
            seed: of the noises.
        """
        base = low_discrepancy_probes(k, self.n_timesteps, shape, seed)
        total = sum(self.density)
        edges = [x / total for x in itertools.accumulate(self.density, initial=0.0)]
        placed = [self._place(u, edges) for u in van_der_corput(k)]
        mean = self._mean_weight()
        return dataclasses.replace(
            base,
            timesteps=torch.tensor([t for t, _ in placed]),
            weights=torch.tensor([self.weights[b] / mean for _, b in placed]),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "n_timesteps": self.n_timesteps,
            "density": list(self.density),
            "weights": list(self.weights),
        }

    @classmethod
    def from_dict(cls, values: Any) -> TimestepWeights:
        """What ``to_dict`` made.

        Raises:
            DiveFastError: an entry is missing, unknown, or holds what it must not.
        """
        if not isinstance(values, Mapping) or set(values) != set(_FIELDS):
            raise DiveFastError(
                f"timesteps must hold exactly {', '.join(_FIELDS)}, "
                f"got {shown(list(values) if isinstance(values, Mapping) else values)}."
            )
        return cls(**values)

    def _mean_weight(self) -> float:
        total = sum(self.density)
        both = sum(q * w for q, w in zip(self.density, self.weights, strict=True))
        return both / total if total > 0 else 0.0

    def _place(self, u: float, edges: list[float]) -> tuple[int, int]:
        """Timestep and bin at the quantile u in (0, 1) of the density."""
        bins = len(self.density)
        # Rounding can leave the last edge below 1 and u behind it.
        last = max(b for b in range(bins) if self.density[b] > 0)
        b = min(bisect.bisect_right(edges, u) - 1, last)
        share = (u - edges[b]) / (edges[b + 1] - edges[b])
        # A whisker up: a quantile that is a whole timestep must not round to the one before.
        t = int((b + share) * self.n_timesteps / bins + 1e-9)
        return min(t, self.n_timesteps - 1), b


def estimate(
    losses: torch.Tensor, timesteps: torch.Tensor, n_timesteps: int, floor: float = 0.1
) -> TimestepWeights:
    """Learns density and weights from how the right class and its rivals part.

    In every bin of timesteps the paired differences d = l(rival) - l(right class) vary between
    probes by sigma(t). The density that estimates their mean over t with the fewest probes is
    proportional to sigma (Neyman 1934). A share ``floor`` of the probes stays uniform, so that no
    weight 1 / q exceeds 1 / floor.

    Args:
        losses: float [N, 1 + R, K], of the right class and R rivals on common probes.
        timesteps: int64 [K], at least 2 in every one of the 20 bins.
        n_timesteps: T.
        floor: share of the probes that stays uniform.

    Raises:
        DiveFastError: no images, rivals or too few probes, or losses that are not finite.
    """
    bins, difference = compared_in_bins(losses, timesteps, n_timesteps)
    variance = torch.stack([difference[:, :, bins == b].var(dim=2).mean() for b in range(BINS)])
    sigma = _smoothed(variance).sqrt()
    if not sigma.sum() > 0:
        raise DiveFastError("the classes do not differ at any timestep: nothing can be learned.")
    density = (1 - floor) * sigma / sigma.mean() + floor
    # Six digits: what is stored is what is used, and can be read.
    rounded = [round(q, 6) for q in density.tolist()]
    return TimestepWeights(n_timesteps, tuple(rounded), tuple(round(1 / q, 6) for q in rounded))


def compared_in_bins(
    losses: torch.Tensor, timesteps: torch.Tensor, n_timesteps: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The bin of each probe, int64 [K], and the rivals' losses above the label's, float64.

    Args:
        losses: float [N, 1 + R, K], of the label and R rivals on common probes.
        timesteps: int64 [K], at least 2 in every bin.
        n_timesteps: T.

    Returns:
        The bins, and the differences [N, R, K].

    Raises:
        DiveFastError: no images, rivals or too few probes, or losses that are not finite.
    """
    if losses.ndim != 3 or len(losses) == 0 or losses.shape[1] < 2:
        raise DiveFastError(
            f"expected losses [N, 1 + R, K] of at least one image and one rival, "
            f"got {list(losses.shape)}."
        )
    if not torch.isfinite(losses).all():
        raise DiveFastError("expected finite losses, got NaN or infinity.")
    bins = timesteps * BINS // n_timesteps
    if len(bins) != losses.shape[2] or int(torch.bincount(bins, minlength=BINS).min()) < 2:
        raise DiveFastError(
            f"expected at least 2 probes in each of {BINS} bins of the timesteps (64 in all are "
            f"enough), got {losses.shape[2]}."
        )
    return bins, losses[:, 1:].double() - losses[:, :1].double()


def _smoothed(values: torch.Tensor) -> torch.Tensor:
    """Each bin averaged with its neighbours, 1 : 2 : 1."""
    padded = torch.cat([values[:1], values, values[-1:]])
    return (padded[:-2] + 2 * padded[1:-1] + padded[2:]) / 4
