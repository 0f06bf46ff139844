"""What a loss at timestep t counts when classes are compared: learned from labelled images.

    L_w(y; x0) = mean over t of w(t) l(y; t),    mean over t of w(t) = 1

Other than learned timesteps, which estimate the plain mean from fewer probes, weights w(t) change
what is compared, and with it what the classifier answers (Self-Bench, arXiv 2505.17955). Losses
have another scale then, so that the weights come with a beta of their own:

    log p(y | x0) = -beta_w L_w(y; x0) + log p(y) + const
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from dive_fast.core.config import LARGEST, LARGEST_FLOAT
from dive_fast.core.numbers import is_number, is_whole
from dive_fast.core.shortlist import digest
from dive_fast.core.timesteps import TimestepWeights
from dive_fast.errors import DiveFastError, shown

# Share of the probes that does not follow the weights: a region that counts little is still seen.
FLOOR = 0.1


@dataclass(frozen=True)
class LossWeights:
    """w(t), constant within equal bins of [0, T), and the beta that belongs to it.

    Attributes:
        n_timesteps: T of the schedule.
        weights: [bins], w(t), above 0, of mean 1.
        beta: inverse temperature of the weighted losses.
        form: what w(t) was chosen from, in words.
        images: how many it was learned from.
        gain: how much less -log p(label) was than with uniform weights, in nats per image that was
            left out of the fit.
        error: standard error of ``gain``.
    """

    n_timesteps: int
    weights: tuple[float, ...]
    beta: float
    form: str = "given"
    images: int = 0
    gain: float = 0.0
    error: float = 0.0

    def __post_init__(self) -> None:
        if not is_whole(self.n_timesteps, 1) or self.n_timesteps > LARGEST:
            raise DiveFastError(
                f"n_timesteps must be a whole number of at least 1, got {shown(self.n_timesteps)}."
            )
        values = self.weights
        good = isinstance(values, list | tuple) and len(values) > 0
        # Of extremes the products with other weights would leave float32.
        good = good and all(is_number(x) and 1e-12 <= x <= 1e12 for x in values)
        if not good:
            raise DiveFastError(
                f"weights must be a list of numbers from 1e-12 to 1e12, got {shown(values)}."
            )
        if not is_number(self.beta) or not 0 < self.beta <= LARGEST_FLOAT:
            raise DiveFastError(f"beta must be above 0 and below 3e38, got {shown(self.beta)}.")
        if not isinstance(self.form, str):
            raise DiveFastError(f"form must be a text, got {shown(self.form)}.")
        if not is_whole(self.images, 0):
            raise DiveFastError(
                f"images must be a whole number of at least 0, got {shown(self.images)}."
            )
        for name, least in (("gain", -math.inf), ("error", 0)):
            if not is_number(getattr(self, name), least):
                raise DiveFastError(
                    f"{name} must be a finite number, got {shown(getattr(self, name))}."
                )
        mean = sum(values) / len(values)
        # beta is that of weights of mean 1; six digits may be all that was kept of them.
        if abs(mean - 1) > 1e-4:
            raise DiveFastError(f"weights must have mean 1, got a mean of {mean:.6g}.")
        object.__setattr__(self, "weights", tuple(map(float, values)))
        object.__setattr__(self, "beta", float(self.beta))

    def placed(self, timesteps: TimestepWeights | None, follow: bool = True) -> TimestepWeights:
        """Where probes are taken for L_w, and what each counts.

        Of probes from a density q that count v, for the plain mean, it makes probes from q' that
        count v', for the weighted one. The density follows the weights, so that probes count nearly
        alike: tests that stop early would otherwise be misled where the first ones count little.

            q' ~ q (0.9 w / E_q[w] + 0.1),    v' = q v w / q'

        Args:
            timesteps: q and v; even timesteps if None.
            follow: False leaves the density as it is, v' = v w.

        Raises:
            DiveFastError: they are for another number of timesteps.
        """
        base = timesteps or TimestepWeights(self.n_timesteps, (1.0,), (1.0,))
        if base.n_timesteps != self.n_timesteps:
            raise DiveFastError(
                f"expected timesteps of {self.n_timesteps}, got such of {base.n_timesteps}."
            )
        bins = math.lcm(len(self.weights), len(base.density))
        w, q, v = (_spread(x, bins) for x in (self.weights, base.density, base.weights))
        if not follow:
            counts = [x * y for x, y in zip(v, w, strict=True)]
            return TimestepWeights(self.n_timesteps, tuple(q), tuple(counts))
        mean = sum(x * y for x, y in zip(q, w, strict=True)) / sum(q)
        share = [(1 - FLOOR) * x / mean + FLOOR for x in w]
        density = tuple(x * y for x, y in zip(q, share, strict=True))
        counts = tuple(x * y / z for x, y, z in zip(v, w, share, strict=True))
        return TimestepWeights(self.n_timesteps, density, counts)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "weights": list(self.weights)}

    @classmethod
    def from_dict(cls, values: Any) -> LossWeights:
        """What ``to_dict`` made.

        Raises:
            DiveFastError: an entry is missing, unknown, or holds what it must not.
        """
        names = [field.name for field in fields(cls)]
        if not isinstance(values, Mapping) or set(values) != set(names):
            raise DiveFastError(
                f"loss weights must hold exactly {', '.join(names)}, "
                f"got {shown(list(values) if isinstance(values, Mapping) else values)}."
            )
        return cls(**values)

    def __str__(self) -> str:
        bars = "".join("▁▂▃▄▅▆▇█"[min(7, int(7 * w / max(self.weights)))] for w in self.weights)
        return (
            f"w(t) over t = 0 to {self.n_timesteps}: {bars}\n"
            f"relative to uniform: {' '.join(f'{w:.2g}' for w in self.weights)}\n"
            f"{self.form}, from {self.images} images; beta {self.beta:.4g}; "
            f"{self.gain:.3f} +- {self.error:.3f} nats better on images left out"
        )


def digest_of(weights: LossWeights | None) -> str:
    """Tells weights from others by their w(t), of which depends what losses mean; "" of none."""
    if weights is None:
        return ""
    return digest(map(str, (weights.n_timesteps, *weights.weights)))


def _spread(values: tuple[float, ...], bins: int) -> list[float]:
    """The same function in finer bins."""
    return [values[b * len(values) // bins] for b in range(bins)]
