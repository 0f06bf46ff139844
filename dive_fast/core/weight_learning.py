"""Learns w(t) from losses of labelled images: a small problem, nearly convex.

With m_ib(y) the mean loss of image i under y in bin b of the timesteps, and n_b of K probes there,

    E_i(y) = sum_b u_b n_b / K m_ib(y),     u_b = beta w_b = exp(a + s_b),     s = Phi theta
    J(a, theta) = mean_i CE(softmax_y(-E_i(y)), label_i) + lambda sum_j c_j theta_j^2

E is linear in u, so the cross-entropy CE is convex in u. The columns of Phi have mean 0 and mean
square 1. Of a polynomial of degree D they are the first D orthogonal ones and c = 1; where every
bin has a weight of its own they are cosines, and the penalty is that of squared differences between
neighbouring bins. lambda = infinity are the uniform weights.

Which form and which lambda is said by images that were left out (cross-validation).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import minimize, minimize_scalar

from dive_fast.core.loss_weights import LossWeights
from dive_fast.core.timesteps import BINS, compared_in_bins

DEGREES = (1, 2, 3, 4)
PENALTIES = (0.1, 0.01, 0.001)
# Standard errors by which the best of these candidates must beat uniform weights: it is the best of
# fifteen, so that one alone is often passed by chance.
MARGIN = 2.0
_LOG_BETA = math.log(1e-3), math.log(1e7)
_LARGEST_THETA = 10.0


class Form(NamedTuple):
    """A family of log w: s = basis @ theta, at a cost of penalty * (cost @ theta^2)."""

    name: str
    basis: np.ndarray  # [BINS, P]
    cost: np.ndarray  # [P]
    penalty: float

    @property
    def text(self) -> str:
        return f"{self.name}, penalty {self.penalty:g}"


@dataclass(frozen=True)
class Trial:
    """A candidate on images that were left out, against uniform weights.

    Attributes:
        form: what it is, in words.
        gain: mean difference of -log p(label), in nats per image; above 0 it is better.
        error: standard error of the gain.
        right: images whose label had the lowest loss.
    """

    form: str
    gain: float
    error: float
    right: int


class Learned(NamedTuple):
    """What cross-validation says.

    Attributes:
        weights: of the best candidate, learned from all images; None where uniform weights win.
        trials: of all candidates.
        right: images that uniform weights answer right when left out.
        nll: their -log p(label) per image then, in nats.
    """

    weights: LossWeights | None
    trials: tuple[Trial, ...]
    right: int
    nll: float


def candidates() -> list[Form]:
    """All forms at all penalties."""
    at = (np.arange(BINS) + 0.5) / BINS
    columns, _ = np.linalg.qr(np.polynomial.legendre.legvander(2 * at - 1, max(DEGREES)))
    # The first column is the constant one.
    polynomials = columns[:, 1:] * math.sqrt(BINS)
    order = np.arange(1, BINS)
    cosines = math.sqrt(2) * np.cos(math.pi * np.outer(at, order))
    rough = (1 - np.cos(math.pi * order / BINS)) / (1 - math.cos(math.pi / BINS))
    forms = [(f"polynomial of degree {d}", polynomials[:, :d], np.ones(d)) for d in DEGREES]
    forms.append((f"{BINS} bins", cosines, rough))
    return [Form(*form, penalty) for form in forms for penalty in PENALTIES]


def differences(losses: torch.Tensor, timesteps: torch.Tensor, n_timesteps: int) -> np.ndarray:
    """n_b / K (m_ib(rival) - m_ib(label)), float64 [N, R, BINS].

    Args:
        losses: float [N, 1 + R, K], of the label and R rivals on common probes.
        timesteps: int64 [K], at least 2 in every bin.
        n_timesteps: T.

    Raises:
        DiveFastError: no images, rivals or too few probes, or losses that are not finite.
    """
    bins, apart = compared_in_bins(losses, timesteps, n_timesteps)
    found = torch.zeros(*apart.shape[:2], BINS, dtype=torch.float64)
    return (found.index_add_(2, bins, apart) / losses.shape[2]).numpy()


def objective(
    parameters: np.ndarray, apart: np.ndarray, form: Form, penalty: float | None = None
) -> tuple[float, np.ndarray]:
    """J and its gradient; targets are Platt's, (n + 1) / (n + 2) for the label, as for beta.

    Args:
        parameters: float64 [1 + P], a and theta.
        apart: float64 [N, R, BINS], what ``differences`` gives.
    """
    n, rivals, _ = apart.shape
    theta = parameters[1:]
    u = np.exp(parameters[0] + form.basis @ theta)
    energy = apart @ u
    wrong = 1 / (n + 2) / rivals
    highest = np.maximum(-energy.min(axis=1, keepdims=True), 0)
    p = np.exp(-energy - highest)
    total = p.sum(axis=1, keepdims=True) + np.exp(-highest)
    log_total = highest + np.log(total)
    penalty = form.penalty if penalty is None else penalty
    value = (wrong * energy.sum() + log_total.sum()) / n + penalty * (form.cost @ theta**2)
    by_u = np.einsum("ir,irb->b", wrong - p / total, apart) / n * u
    gradient = np.concatenate([[by_u.sum()], form.basis.T @ by_u + 2 * penalty * form.cost * theta])
    return float(value), gradient


def fit(apart: np.ndarray, form: Form | None) -> np.ndarray:
    """u = beta w, float64 [BINS], of the lowest J; of uniform weights without a form."""
    plain = Form("uniform", np.empty((BINS, 0)), np.empty(0), 0.0)
    start = minimize_scalar(
        lambda a: objective(np.array([a]), apart, plain)[0], bounds=_LOG_BETA, method="bounded"
    ).x
    if form is None:
        return np.full(BINS, math.exp(start))
    bounds = [_LOG_BETA] + [(-_LARGEST_THETA, _LARGEST_THETA)] * len(form.cost)
    found = minimize(
        objective,
        np.concatenate([[start], np.zeros(len(form.cost))]),
        args=(apart, form),
        jac=True,
        method="L-BFGS-B",
        bounds=bounds,
        options={"maxiter": 500},
    ).x
    return np.exp(found[0] + form.basis @ found[1:])


def held_out(
    apart: np.ndarray, folds: np.ndarray, form: Form | None
) -> tuple[np.ndarray, np.ndarray]:
    """-log p(label) and whether the label has the lowest loss, of images left out; [N] both.

    Args:
        folds: int64 [N], the fold that each image is left out with.
    """
    nll, right = np.empty(len(apart)), np.empty(len(apart), dtype=bool)
    for fold in np.unique(folds):
        out = folds == fold
        energy = apart[out] @ fit(apart[~out], form)
        nll[out] = np.logaddexp.reduce(np.pad(-energy, ((0, 0), (1, 0))), axis=1)
        right[out] = (energy > 0).all(axis=1)
    return nll, right


def learn(
    apart: np.ndarray,
    folds: np.ndarray,
    n_timesteps: int,
    forms: Sequence[Form] | None = None,
    margin: float = MARGIN,
) -> Learned:
    """The weights that cross-validation chooses, uniform ones among them.

    A candidate wins if its likelihood of images left out is higher by more than ``margin`` standard
    errors of the paired difference, and no fewer of them are answered right.

    Args:
        apart: float64 [N, R, BINS], what ``differences`` gives.
        folds: int64 [N], the fold that each image is left out with; two or more.
        n_timesteps: T.
        forms: the candidates; all if None.
    """
    forms = candidates() if forms is None else forms
    nll, right = held_out(apart, folds, None)
    trials = []
    for form in forms:
        other, answers = held_out(apart, folds, form)
        gain = nll - other
        error = gain.std(ddof=1) / math.sqrt(len(gain))
        trials.append(Trial(form.text, float(gain.mean()), float(error), int(answers.sum())))
    best = max(range(len(forms)), key=lambda i: trials[i].gain)
    trial, common = trials[best], (tuple(trials), int(right.sum()), float(nll.mean()))
    if trial.gain <= margin * trial.error or trial.right < right.sum():
        return Learned(None, *common)
    u = fit(apart, forms[best])
    weights = tuple(_six(x) for x in u / u.mean())
    return Learned(
        LossWeights(
            n_timesteps,
            weights,
            _six(u.mean()),
            trial.form,
            len(apart),
            _six(trial.gain),
            _six(trial.error),
        ),
        *common,
    )


def _six(x: float) -> float:
    return float(f"{x:.6g}")
