"""What losses and gradients say of every class: its gap to the leader, and how sure that is.

Let l_c,u be the loss of class c on unit u of the probes (an antithetic pair), and e_c,u =
g_u . (v_c - v0) what the gradient at v0 = mean of the rows expects of it. Two sources speak:

    from the gradient alone:   L_c - L(v0) ~ slope mean_G(e_c) + curvature_c,   with error tau
    measured on n units:       L_c ~ mean_n(l_c - control e_c) + control mean_G(e_c)

The second is a control variate: unbiased whatever the gradient is worth, and where both go together
n units say as much as several times n. Of c and the leader b, with r = l - control e:

    var(gap) = control^2 var(e_c - e_b) / G + 1 / (1 / (2 tau^2) + n / var(r_c - r_b))

All vanish as the probes run out (finite population correction). Control variates and moderated
variances (Smyth 2004) are textbook; this use of them is ours. Arrays are NumPy's: they are tiny.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from dive_fast.strategies.base import Ledger, Task

# Degrees of freedom that the variance of the nearest rivals counts for in each class's own.
PRIOR_UNITS = 4
NEAREST = 4
# The control where none was fitted; the image's own losses correct it.
CONTROL, HIGHEST = 0.7, 2.0
# Of the gradient's slope where none was fitted: standard deviation around 1.
SLOPE_SPREAD = 2.0
# Measured classes from which an image tells how far its gradient errs, where nothing was fitted.
FEWEST = 4


@dataclass(frozen=True)
class Standing:
    """Every class against the leader.

    Attributes:
        leader: the class of the lowest estimate.
        gap: estimated L_c - L_leader with penalties, float64 [C]; infinite without an estimate.
        error: standard error of the gap, float64 [C]; 0 for the leader.
    """

    leader: int
    gap: np.ndarray
    error: np.ndarray


class Evidence:
    """All that was seen of one image, in units of ``task.probes.unit`` probes.

    Attributes:
        ledger: the losses, probe by probe.
        units: in the list of probes; the last may be smaller.
        measured: int64 [C], units of each class, always the first ones.
        slopes: e by unit, float64 [C, G].
    """

    def __init__(self, task: Task) -> None:
        c, k = len(task.vocabulary), len(task.probes)
        self.unit, self.fitted = task.probes.unit, task.shortlist
        self.penalty = task.penalty().numpy()
        self.units = -(-k // self.unit)
        self.ledger = Ledger(c, k)
        self.measured = np.zeros(c, dtype=np.int64)
        self.slopes = np.empty((c, 0))
        self._losses = np.zeros((c, 0))  # l by unit, 0 where unknown
        self._within = np.zeros((c, self.unit))  # the first unit, probe by probe
        self._base = np.empty(0)  # l of v0 by unit
        self._learned = None
        if self.fitted is not None:
            curvature = np.asarray(self.fitted.curvature)
            self._learned = self.fitted.slope, curvature, np.full(c, self.fitted.error)

    @property
    def looked(self) -> int:
        """G, the units of the gradient."""
        return self.slopes.shape[1]

    def probes(self, first: int, last: int) -> torch.Tensor:
        """The probes of units first to last, int64."""
        k = self.ledger.losses.shape[1]
        return torch.arange(first * self.unit, min(last * self.unit, k))

    def add_losses(self, classes: np.ndarray, last: int, losses: torch.Tensor) -> None:
        """Enters losses [n, k] of classes that had equally many units, up to unit ``last``."""
        first = int(self.measured[classes[0]])
        self.ledger.add(torch.from_numpy(classes), self.probes(first, last), losses)
        values = losses.double().numpy()
        if first == 0:
            self._within[classes, : values.shape[1]] = values[:, : self.unit]
        more = last - self._losses.shape[1]
        if more > 0:
            self._losses = np.pad(self._losses, ((0, 0), (0, more)))
        self._losses[classes, first:last] = by_unit(values, self.unit)
        self.measured[classes] = last

    def add_gradients(self, base: torch.Tensor, slopes: torch.Tensor) -> None:
        """Enters, of the gradient's next units, l at v0 [probes] and e [C, units]."""
        more = by_unit(base.double().numpy()[None], self.unit)[0]
        self._base = np.concatenate([self._base, more])
        self.slopes = np.concatenate([self.slopes, slopes.double().numpy()], axis=1)

    def differences(self, classes: np.ndarray, n: int) -> np.ndarray:
        """l_c - l_b of the first n units, b the first of these classes, float64 [m, n]."""
        return self._losses[classes, :n] - self._losses[classes[0], :n]

    def expected(self) -> np.ndarray:
        """What the gradient alone expects of L_c - L(v0), float64 [C]."""
        slope, curvature, _ = self.correction()
        return slope * self.slopes.mean(axis=1) + curvature

    def correction(self) -> tuple[float, np.ndarray | float, np.ndarray]:
        """Slope and curvature of the gradient's expectation, and its standard error, float64 [C].

        Unfitted they are the regression of what was measured on what was expected, the slope before
        all measurements N(1, 2^2). Classes were chosen by what was expected, which biases nothing,
        and those unlike all measured ones are the least sure.
        """
        if self._learned is not None:
            return self._learned
        known = self.measured > 0
        if self.looked == 0 or known.sum() < FEWEST:
            return 1.0, 0.0, np.full(len(known), np.inf)
        expected, found = self.slopes.mean(axis=1), self._controlled()[known]
        at = expected[known].mean()
        x, y = expected[known] - at, found - found.mean()
        prior = (y - x).var(ddof=1) / SLOPE_SPREAD**2
        square = max(x @ x + prior, 1e-300)
        slope = (x @ y + prior) / square
        variance = (y - slope * x).var(ddof=1)
        unsure = 1 + 1 / len(x) + (expected - at) ** 2 / square
        return slope, found.mean() - slope * at, np.sqrt(variance * unsure)

    def control(self) -> float:
        """How much of e is taken off: fitted, or regressed on what was measured of this image."""
        if self.fitted is not None:
            return self.fitted.control
        n = min(self._losses.shape[1], self.looked)
        known = self.measured >= max(n, 2)
        if n < 2 or known.sum() < 2:
            return CONTROL
        seen, expected = self._losses[known, :n], self.slopes[known, :n]
        seen, expected = _centred(seen), _centred(expected)
        square = (expected**2).sum()
        prior = square * PRIOR_UNITS / expected.size
        if not square > 0:
            return CONTROL
        found = ((seen * expected).sum() + prior * CONTROL) / (square + prior)
        return float(np.clip(found, 0, HIGHEST))

    def standing(self) -> Standing:
        """Where every class stands now."""
        gap, error = self.against(leader := int((self._alone() + self.penalty).argmin()))
        # Paired with the others the leader may look different than alone.
        if gap.min() < 0:
            gap, error = self.against(leader := int(gap.argmin()))
        return Standing(leader, gap, error)

    def against(self, b: int) -> tuple[np.ndarray, np.ndarray]:
        """Gap to class b and its standard error, float64 [C] both."""
        gap, variance = self._unmeasured(b)
        n = np.minimum(self.measured, self.measured[b])
        if n[b] > 0:
            difference = self._losses - self._losses[b]
            mean, own = _moments(difference, n)
            if len(self.ledger.losses[0]) % self.unit:
                mean = np.where(n == self.units, self._over_all(b), mean)
            near = self._nearest(mean, n, b)
            spread = self._moderated(own, n, near, b)
            left = 1 / np.maximum(n, 1) - 1 / self.units
            gap = np.where(n > 0, mean, gap)
            variance = np.where(n > 0, spread * left, variance)
            use = (n > 0) & (n < self.looked)
            if use.any():
                paired = self._paired(b, difference, n, near, spread, left)
                gap, variance = (
                    np.where(use, x, y) for x, y in zip(paired, (gap, variance), strict=True)
                )
        gap = gap + self.penalty - self.penalty[b]
        gap[b], variance[b] = 0.0, 0.0
        return gap, np.sqrt(np.maximum(variance, 0))

    def _over_all(self, b: int) -> np.ndarray:
        """Mean difference to class b over all probes: the last unit is a smaller one."""
        return (self.ledger.losses - self.ledger.losses[b]).double().mean(dim=1).numpy()

    def _alone(self) -> np.ndarray:
        """An estimate of each class's loss without pairing, float64 [C]."""
        most, g = int(self.measured.max()), self.looked
        if most >= max(g, 1):
            mean = self._losses[:, :most].mean(axis=1)
            return np.where(self.measured == most, mean, np.inf)
        expected = self.expected() if g else np.full(len(self.measured), np.inf)
        if most == 0:
            return expected
        return np.where(self.measured > 0, self._controlled(), expected)

    def _controlled(self) -> np.ndarray:
        """mean_n(l_c - l(v0) - control e_c) + control mean_G(e_c), float64 [C]; 0 unmeasured."""
        m, control = min(self._losses.shape[1], self.looked), self.control()
        n = np.minimum(self.measured, m)
        rest = self._losses[:, :m] - self._base[:m] - control * self.slopes[:, :m]
        return _moments(rest, n)[0] + control * self.slopes.mean(axis=1)

    def _paired(
        self,
        b: int,
        difference: np.ndarray,
        n: np.ndarray,
        near: np.ndarray,
        spread: np.ndarray,
        left: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Gap and variance by the control variate, shrunk to what was learned; float64 [C] both.

        Args:
            difference: l_c - l_b by unit, float64 [C, units].
            n: units that class and b share, int64 [C].
            near: the nearest rivals, int64.
            spread: variance of ``difference`` by unit, float64 [C].
            left: what n units leave of it, 1 / n - 1 / K, float64 [C].
        """
        control = self.control()
        expected = self.slopes - self.slopes[b]
        m = min(self.looked, difference.shape[1])
        mean, own = _moments(difference[:, :m] - control * expected[:, :m], np.minimum(n, m))
        # One unit tells no variance; without the control it would be no less.
        v = self._moderated(np.where(n > 1, own, spread), n, near, b) * left
        slope, curvature, error = self.correction()
        there = expected.mean(axis=1)
        gap = control * there + mean
        if np.isfinite(error[b]):
            both = error**2 + error[b] ** 2
            share = both / np.maximum(both + v, 1e-300)
            curved = 0.0 if self._learned is None else curvature - curvature[b]
            prior = slope * there + curved
            gap = share * gap + (1 - share) * prior
            v = share * v
        return gap, control**2 * self._expected_variance(expected) + v

    def _unmeasured(self, b: int) -> tuple[np.ndarray, np.ndarray]:
        """Gap and variance of classes that only the gradient speaks of."""
        c = len(self.measured)
        slope, _, error = self.correction()
        if self.looked == 0 or not np.isfinite(error[b]):
            # Nothing tells how far the gradient errs: neither in nor out.
            return np.full(c, np.inf), np.zeros(c)
        variance = slope**2 * self._expected_variance(self.slopes - self.slopes[b])
        expected = self.expected()
        if self.measured[b] > 0:
            return expected - self._controlled()[b], variance + error**2
        return expected - expected[b], variance + error**2 + error[b] ** 2

    def _expected_variance(self, expected: np.ndarray) -> np.ndarray:
        """Of mean_G(e_c - e_b), float64 [C]."""
        g = self.looked
        if g < 2:
            return (expected**2).mean(axis=1)
        own = expected.var(axis=1, ddof=1)
        own = (PRIOR_UNITS * own.mean() + (g - 1) * own) / (PRIOR_UNITS + g - 1)
        return own * (1 / g - 1 / self.units)

    def _nearest(self, gap: np.ndarray, n: np.ndarray, b: int) -> np.ndarray:
        """The measured rivals that are nearest to class b, int64."""
        order = np.where(n > 0, gap, np.inf).argsort(kind="stable")
        order = order[order != b]
        return order[: min(NEAREST, int((n > 0).sum()) - 1)]

    def _moderated(self, own: np.ndarray, n: np.ndarray, near: np.ndarray, b: int) -> np.ndarray:
        """Variance by unit [C]: each class's own together with that of the nearest rivals."""
        if len(near) == 0:
            return own
        pool = np.where(n[near] < 2, self._first(near, b), own[near]).mean()
        degrees = np.maximum(n - 1, 0)
        return (PRIOR_UNITS * pool + degrees * own) / (PRIOR_UNITS + degrees)

    def _first(self, classes: np.ndarray, b: int) -> np.ndarray:
        """Variance by unit from the probes of the first unit.

        For pairs an upper bound, unless their two probes go up and down together.
        """
        difference = self._within[classes] - self._within[b]
        if self.unit < 2:
            return (difference**2).mean(axis=1)
        return difference.var(axis=1, ddof=1) / self.unit


def _moments(x: np.ndarray, n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and unbiased variance of the first n_c columns of every row, float64 [C]."""
    known = np.arange(x.shape[1]) < n[:, None]
    mean = np.where(known, x, 0.0).sum(axis=1) / np.maximum(n, 1)
    square = np.where(known, (x - mean[:, None]) ** 2, 0.0).sum(axis=1)
    return mean, square / np.maximum(n - 1, 1)


def _centred(x: np.ndarray) -> np.ndarray:
    """Without what all classes and all units have in common."""
    x = x - x.mean(axis=0)
    return x - x.mean(axis=1, keepdims=True)


def by_unit(values: np.ndarray, unit: int) -> np.ndarray:
    """Means over every ``unit`` columns, the last over what is left."""
    starts = np.arange(0, values.shape[1], unit)
    sizes = np.minimum(values.shape[1] - starts, unit)
    return np.add.reduceat(values, starts, axis=1) / sizes
