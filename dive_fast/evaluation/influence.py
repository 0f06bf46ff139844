"""Standard errors of figures that are no means over images: by what each image contributes.

    se^2 = sum_i phi_i^2 / n^2

with the influence phi_i of image i on the figure, n times its derivative by the image's weight: the
infinitesimal jackknife (Efron 1982). Of AUROC it is what DeLong et al. (1988) have.
"""

from __future__ import annotations

import numpy as np
from scipy.stats import rankdata

from dive_fast.predict.calibration import BINS


def error_of(influence: np.ndarray) -> float | None:
    """The standard error that influences [n] come to; None of one image."""
    n = len(influence)
    return float(np.sqrt(np.square(influence).sum())) / n if n > 1 else None


def macro_f1_influence(truth: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Of each image on the macro F1, float64 [n].

    F_c = 2 tp_c / N_c, N_c = n_c + a_c, the images of class c and those answered with it. Of K
    classes that occur or are answered

        phi_i = n / K ( 2 [a_i = y_i] / N_{y_i} - F_{y_i} / N_{y_i} - F_{a_i} / N_{a_i} )

    Args:
        truth, index: whole numbers [n].
    """
    classes = int(max(truth.max(), index.max())) + 1
    hit = truth == index
    total = np.bincount(truth, minlength=classes) + np.bincount(index, minlength=classes)
    there = np.maximum(total, 1)
    per_hit = 2 / there
    slope = 2 * np.bincount(truth[hit], minlength=classes) / there**2
    influence = hit * per_hit[truth] - slope[truth] - slope[index]
    return len(truth) / np.count_nonzero(total) * influence


def calibration_influence(
    probability: np.ndarray, correct: np.ndarray, bins: int = BINS
) -> np.ndarray:
    """Of each image on the expected calibration error, float64 [n].

    phi_i = s_m ([a_i = y_i] - p_i) - ECE, s_m the sign of acc - conf in the image's bin. Where
    these are near each other the ECE is more than it should be, and this tells little of it.

    Args:
        probability: [n], of the answers.
        correct: bool [n].
        bins: how many, of equal width.
    """
    gap = correct - probability.astype(np.float64)
    place = np.searchsorted(np.arange(1, bins) / bins, probability.astype(np.float64))
    sign = np.sign(np.bincount(place, gap, bins))
    found = sign[place] * gap
    return found - found.mean()


def auroc_influence(scores: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Of each image on the area under one class's curve, float64 [n].

    With V_i the share of the other kind that image i is on the right side of, ties as a half, and
    the area A: phi_i = n / n_k (V_i - A), n_k the images of its kind.

    Args:
        scores: [n], p(y | x0) of the class.
        right: bool [n], the images of the class; some are and some are not.
    """
    n, n_right = len(scores), int(right.sum())
    n_other = n - n_right
    rank = rankdata(scores)
    found = np.empty(n)
    found[right] = (rank[right] - rankdata(scores[right])) / n_other
    found[~right] = 1 - (rank[~right] - rankdata(scores[~right])) / n_right
    area = found[right].mean()
    return (found - area) * np.where(right, n / n_right, n / n_other)
