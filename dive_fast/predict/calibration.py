"""The temperature that makes log p(y | x0) = -beta L(y; x0) mean something, and how well it does.

Confidence and accuracy are compared by the expected calibration error (Guo et al. 2017, arXiv
1706.04599), whose remedy, one temperature fitted to labelled images, is the one used here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scipy.optimize import minimize_scalar

from dive_fast.core.numbers import is_number, whole
from dive_fast.errors import DiveFastError, shown

BINS = 15
# p(label) in a likelihood where the label's class was never measured: it has no loss to tell.
UNMEASURED_PROBABILITY = 1e-6
_LOWEST, _HIGHEST = 1e-3, 1e7
_GRID = 231  # betas that ``fit_beta_with_lapses`` tries, a tenth apart
_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)  # torch has no minimum of these
_ENOUGH = 0.5  # nats below the highest likelihood of all labels together


@dataclass(frozen=True)
class Calibration:
    """What fitting beta did, measured on the images that it was fitted to.

    One number is fitted, so figures on other images of the same kind come out much the same.

    Attributes:
        beta_before, beta_after: inverse temperature.
        ece_before, ece_after: expected calibration error over 15 bins, in [0, 1].
        nll_before, nll_after: mean of -log p(label), in nats, lapses included; a label whose class
            was not measured counts as p = 1e-6.
        n: images, or what ``counted`` says.
        unmeasured: of these, images whose label was not among the classes that the strategy
            measured. They count in both figures, but no beta can mend them.
        counted: what ``n`` counts.
    """

    beta_before: float
    beta_after: float
    ece_before: float
    ece_after: float
    nll_before: float
    nll_after: float
    n: int
    unmeasured: int = 0
    counted: str = "images"

    def __str__(self) -> str:
        lines = [
            f"                            {'before':>10} {'after':>10}",
            f"beta                        {self.beta_before:10.2f} {self.beta_after:10.2f}",
            f"expected calibration error  {self.ece_before:10.2%} {self.ece_after:10.2%}",
            f"-log p(label), nats         {self.nll_before:10.4f} {self.nll_after:10.4f}",
            f"{self.counted:28}{self.n:10d}",
        ]
        if self.unmeasured:
            lines.append(f"label not measured          {self.unmeasured:10d}")
        return "\n".join(lines)


def calibrate(
    losses: torch.Tensor,
    labels: Any,
    beta: float,
    answers: torch.Tensor | None = None,
    lapse: float = 0.0,
) -> Calibration:
    """Fits beta and says what it changes.

    Args:
        losses: float [B, C], NaN where a class was not measured.
        labels: whole numbers [B].
        beta: the one in use.
        answers: int64 [B], the classes answered; those of the lowest loss if None.
        lapse: above 0 ``fit_beta_with_lapses`` fits, else ``fit_beta``.

    Raises:
        DiveFastError: as these two.
    """
    labels = as_labels(labels, *_shape(losses))
    if not is_number(beta) or beta <= 0:
        raise DiveFastError(f"beta must be a number above 0, got {shown(beta)}.")
    fitted = fit_beta_with_lapses(losses, labels, lapse) if lapse else fit_beta(losses, labels)
    if answers is None:
        answers = losses.nan_to_num(math.inf).argmin(dim=1)
    before, after = (_figures(losses, labels, answers, b, lapse) for b in (beta, fitted))
    unmeasured = int(losses.gather(1, labels[:, None]).isnan().sum())
    return Calibration(
        beta, fitted, before[0], after[0], before[1], after[1], len(labels), unmeasured
    )


def fit_beta(losses: torch.Tensor, labels: Any) -> float:
    """The beta that gives labelled images the highest likelihood.

    Minimises the cross-entropy of softmax(-beta L), which is convex in beta, over log beta. The
    targets are Platt's, (n + 1) / (n + 2) for the label, so that beta stays finite where every
    image is answered right (Platt, 1999).

    A class that was not measured takes no part in its image's softmax. Where that is the label's
    class, p(label) is a floor that does not depend on beta, so the image has no say.

    Args:
        losses: float [B, C], mean loss of each class over the probes; NaN where not measured.
        labels: whole numbers [B].

    Raises:
        DiveFastError: shapes that do not fit, labels outside [0, C), infinite losses, an image
            without any measured class, or no image whose label was measured beside another class.
    """
    labels = as_labels(labels, *_shape(losses))
    energy = losses.double().cpu()
    if energy.isinf().any():
        raise DiveFastError("losses must be finite, or NaN where not measured; got infinity.")
    measured = ~energy.isnan()
    if not measured.any(dim=1).all():
        raise DiveFastError("every image needs a class that was measured, got one without any.")
    useful = measured.gather(1, labels[:, None])[:, 0] & (measured.sum(dim=1) > 1)
    if not useful.any():
        raise DiveFastError(
            "beta needs an image whose label was measured beside another class, got none."
        )
    energy, measured, labels = energy[useful], measured[useful], labels[useful]
    n = len(energy)
    rivals = measured.sum(dim=1, keepdim=True) - 1
    target = torch.where(measured, 1 / (n + 2) / rivals, 0.0)
    target[torch.arange(n), labels] = (n + 1) / (n + 2)

    def cross_entropy(log_beta: float) -> float:
        log_p = _log_softmax(energy, math.exp(log_beta))
        return -(target * log_p.where(measured, 0.0)).sum().item()

    bounds = math.log(_LOWEST), math.log(_HIGHEST)
    return math.exp(minimize_scalar(cross_entropy, bounds=bounds, options={"xatol": 1e-10}).x)


def fit_beta_with_lapses(losses: torch.Tensor, labels: Any, lapse: float) -> float:
    """The beta that explains labels of which a few have nothing to do with the losses.

        p(label) = (1 - lapse) softmax(-beta L)_label + lapse / C

    Where a search goes astray its losses may favour a wrong answer by far, and one such label would
    decide beta. The smallest beta whose likelihood is within half a nat of the highest one is
    taken, so it stays finite where every label is explained.

    Args:
        losses: finite float [B, C].
        labels: whole numbers [B].
        lapse: the share of such labels, in (0, 1).

    Raises:
        DiveFastError: shapes that do not fit, labels outside [0, C), losses that are not finite, a
            share out of range, or losses that explain the labels no better than chance does.
    """
    labels = as_labels(labels, *_shape(losses))
    energy = losses.double().cpu()
    if not energy.isfinite().all():
        raise DiveFastError("losses must be finite where labels may be lapses.")
    if not is_number(lapse) or not 0 < lapse < 1:
        raise DiveFastError(f"lapse must lie in (0, 1), got {shown(lapse)}.")
    betas = torch.logspace(math.log10(_LOWEST), math.log10(_HIGHEST), _GRID, dtype=torch.float64)
    likelihoods = []
    for beta in betas.tolist():
        p = _log_softmax(energy, beta).gather(1, labels[:, None])[:, 0].exp()
        likelihoods.append((p * (1 - lapse) + lapse / energy.shape[1]).log().sum())
    found = torch.stack(likelihoods)
    enough = found >= found.max() - _ENOUGH
    if enough[0]:
        raise DiveFastError(
            f"beta needs losses that tell right answers from wrong ones, got {len(labels)} labels "
            "that chance explains as well."
        )
    return float(betas[enough][0])


def expected_calibration_error(
    confidence: torch.Tensor | Sequence[float],
    correct: torch.Tensor | Sequence[bool],
    bins: int = BINS,
) -> float:
    """How far confidence and accuracy lie apart (Guo et al. 2017, arXiv 1706.04599, equation 3).

        ECE = sum_m |B_m| / n  | acc(B_m) - conf(B_m) |

    over ``bins`` bins of equal width, B_m = ((m - 1) / bins, m / bins]; 0 falls into the first.

    Args:
        confidence: [n], the probability that each answer was given.
        correct: [n], whether it was right.
        bins: 15 in the paper.

    Returns:
        A share in [0, 1].

    Raises:
        DiveFastError: no answers, shapes that do not fit, or values outside [0, 1].
    """
    try:
        p = torch.as_tensor(confidence, dtype=torch.float64).cpu()
        hit = torch.as_tensor(correct).cpu()
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise DiveFastError(
            f"expected confidence and correct as numbers [n], got {shown(confidence)} and "
            f"{shown(correct)}."
        ) from error
    bins = whole("bins", bins, 1)
    if p.ndim != 1 or len(p) == 0 or hit.shape != p.shape:
        raise DiveFastError(
            f"expected confidence [n] and correct [n] with n >= 1, got {list(p.shape)} "
            f"and {list(hit.shape)}."
        )
    # A softmax in float32 may end a rounding error above 1.
    if not bool(((p >= 0) & (p <= 1 + 1e-6)).all()):
        raise DiveFastError("confidence must lie in [0, 1], got values outside.")
    if not bool(((hit == 0) | (hit == 1)).all()):
        raise DiveFastError("correct must be true or false for every answer.")
    edges = torch.arange(1, bins, dtype=torch.float64) / bins
    index = torch.bucketize(p, edges)
    gap = torch.zeros(bins, dtype=torch.float64).index_add_(0, index, hit.double() - p)
    return gap.abs().sum().item() / len(p)


def as_labels(labels: Any, n: int, classes: int) -> torch.Tensor:
    """Labels as int64 [n] on the CPU.

    Raises:
        DiveFastError: they are no whole numbers [n] in [0, classes), or there are none.
    """
    try:
        given = torch.as_tensor(labels).cpu()
        given = given.long() if given.dtype in _UNSIGNED else given
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise DiveFastError(
            f"labels must be the classes' whole numbers, one for each of {n} images, got "
            f"{shown(labels)}."
        ) from error
    if given.layout != torch.strided or given.is_nested or given.is_quantized:
        raise DiveFastError("labels must be a dense tensor of whole numbers.")
    if given.is_floating_point() or given.is_complex() or given.dtype == torch.bool:
        raise DiveFastError(f"labels must be whole numbers, got {given.dtype}.")
    if list(given.shape) != [n]:
        raise DiveFastError(
            f"labels must have shape [{n}], one for each image, got {list(given.shape)}."
        )
    if n == 0:
        raise DiveFastError("expected at least one labelled image, got none.")
    if int(given.min()) < 0 or int(given.max()) >= classes:
        raise DiveFastError(
            f"labels must lie in [0, {classes}), got {int(given.min())} to {int(given.max())}."
        )
    return given.long().cpu()


def _shape(losses: torch.Tensor) -> tuple[int, int]:
    if not isinstance(losses, torch.Tensor) or not losses.is_floating_point():
        raise DiveFastError(f"losses must be a tensor of floats [B, C], got {shown(losses)}.")
    if losses.ndim != 2 or losses.numel() == 0:
        raise DiveFastError(
            f"expected losses [B, C] of at least one image, got {list(losses.shape)}."
        )
    return losses.shape[0], losses.shape[1]


def _log_softmax(energy: torch.Tensor, beta: float) -> torch.Tensor:
    """log p(y | x0) of losses [B, C]; -inf where the loss is NaN."""
    return (-beta * energy).masked_fill(energy.isnan(), -math.inf).log_softmax(dim=1)


def _figures(
    losses: torch.Tensor, labels: torch.Tensor, answers: torch.Tensor, beta: float, lapse: float
) -> tuple[float, float]:
    """Expected calibration error and mean -log p(label) at one beta."""
    log_p = _log_softmax(losses.double().cpu(), beta)
    confidence = log_p.gather(1, answers[:, None])[:, 0].exp()
    of_label = log_p.gather(1, labels[:, None])[:, 0]
    of_label = of_label.masked_fill(of_label == -math.inf, math.log(UNMEASURED_PROBABILITY))
    if lapse:
        of_label = (of_label.exp() * (1 - lapse) + lapse / losses.shape[1]).log()
    return expected_calibration_error(confidence, answers == labels), -of_label.mean().item()
