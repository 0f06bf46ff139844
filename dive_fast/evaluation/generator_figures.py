"""What generators come to on the same images: figures of each, and paired differences.

L(y) the mean loss of class y, y* the right class, n images, M the classes measured of an image:

    accuracy = mean [ argmin_y L(y) = y* ]
    rank     = mean of 1 + | { y in M : L(y) < L(y*) } |
    margin   = mean of beta (min_{y in M, y != y*} L(y) - L(y*))              nats: a log-odds
    nll      = mean of -log softmax_{y in M}(-beta L)(y*)                        nats

beta is each generator's own, so that losses of different size compare: the one of the highest
likelihood of the right classes. It is fitted twice, on every other image and on the rest, and each
image is judged with the one that it was not fitted to.

Intervals are of 95%, by the percentiles of means over images drawn anew with replacement, the same
for all generators; beta stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from scipy.stats import bootstrap

from dive_fast.evaluation.comparison import LEVEL
from dive_fast.evaluation.records import Form
from dive_fast.evaluation.runfiles import RESULTS, each_result
from dive_fast.predict.calibration import fit_beta

FIGURES = ("accuracy", "rank", "margin", "nll", "log_likelihood")
_BLOCK = 2**22  # numbers of resampled images that are held at once


@dataclass(frozen=True)
class Estimate:
    """A mean over images, with its interval; None where one image allows of none."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True, eq=False)
class Measurements:
    """What a run found, one row for every answered image.

    Attributes:
        ids: of the images.
        truth: int64 [n].
        index: int64 [n], the answers.
        losses: float32 [n, C]; NaN where a class was not measured.
        log_likelihood: float64 [n], nats; NaN where there is none.
        evaluations, seconds: [n].
    """

    ids: list[str]
    truth: np.ndarray
    index: np.ndarray
    losses: np.ndarray = field(repr=False)
    log_likelihood: np.ndarray
    evaluations: np.ndarray
    seconds: np.ndarray

    @classmethod
    def read(cls, run: Path, names: Sequence[str]) -> Measurements:
        """From a run directory, without the images that could not be read.

        Raises:
            RunError: it is damaged.
        """
        form = Form("classification", names)
        rows: dict[str, tuple] = {}
        for _, _, record in each_result(run / RESULTS, form):
            if "error" not in record:
                losses = np.array([np.nan if x is None else x for x in record["losses"]])
                likelihood = record.get("log_likelihood")
                rows[record["id"]] = (
                    record["truth"],
                    record["index"],
                    losses.astype(np.float32),
                    np.nan if likelihood is None else likelihood,
                    record["evaluations"],
                    record["seconds"],
                )
        columns = list(zip(*rows.values(), strict=True)) if rows else [()] * 6
        return cls(
            list(rows),
            np.array(columns[0], np.int64),
            np.array(columns[1], np.int64),
            np.array(columns[2], np.float32).reshape(len(rows), len(names)),
            *(np.array(column, np.float64) for column in columns[3:]),
        )

    def take(self, ids: Sequence[str]) -> Measurements:
        """The rows of these images, in their order."""
        at = {key: row for row, key in enumerate(self.ids)}
        rows = np.array([at[key] for key in ids], np.int64)
        columns = (
            self.truth, self.index, self.losses, self.log_likelihood, self.evaluations,
            self.seconds,
        )  # fmt: skip
        return Measurements(list(ids), *(column[rows] for column in columns))


def image_figures(of: Measurements) -> dict[str, np.ndarray]:
    """Each of ``FIGURES`` of every image, float64 [n]; without those that cannot be told."""
    losses, rows = of.losses.astype(np.float64), np.arange(len(of.truth))
    right = losses[rows, of.truth]
    others = losses.copy()
    others[rows, of.truth] = np.nan
    found = {
        "accuracy": (of.index == of.truth).astype(np.float64),
        "rank": 1.0 + (others < right[:, None]).sum(axis=1),
    }
    if (beta := cross_fitted_beta(of.losses, of.truth)) is not None:
        found["margin"] = beta * (np.nanmin(others, axis=1) - right)
        # Less the right class's loss first: exp of what is left cannot lose it.
        energy = np.where(np.isnan(losses), -np.inf, -beta[:, None] * (losses - right[:, None]))
        found["nll"] = np.logaddexp.reduce(energy, axis=1)
    if len(rows) and not np.isnan(of.log_likelihood).any():
        found["log_likelihood"] = of.log_likelihood
    return found


def cross_fitted_beta(losses: np.ndarray, truth: np.ndarray) -> np.ndarray | None:
    """For every image the beta fitted to the half that it is not in, [n]; None of one image."""
    if len(truth) < 2:
        return None
    half = np.arange(len(truth)) % 2
    beta = np.empty(len(truth))
    for this in (0, 1):
        other = half != this
        beta[half == this] = fit_beta(torch.from_numpy(losses[other]), truth[other])
    return beta


def estimates(of_images: dict[str, np.ndarray], resamples: int, seed: int) -> dict[str, Estimate]:
    """The mean and its interval of figures float64 [n] of images, drawn together.

    With one seed the draws are the same for any figures of as many images.
    """
    if not of_images:
        return {}
    values = np.stack(list(of_images.values()))
    means, n = values.mean(axis=1), values.shape[1]
    if n < 2:
        return {
            name: Estimate(float(m), None, None) for name, m in zip(of_images, means, strict=True)
        }
    interval = bootstrap(
        (values,),
        np.mean,
        axis=1,
        vectorized=True,
        n_resamples=resamples,
        batch=max(1, _BLOCK // values.size),
        confidence_level=LEVEL,
        method="percentile",
        random_state=np.random.default_rng(seed),
    ).confidence_interval
    columns = zip(of_images, means, interval.low, interval.high, strict=True)
    return {name: Estimate(*map(float, rest)) for name, *rest in columns}
