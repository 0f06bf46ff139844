"""How ``fit_weights`` comes by its images' losses, and what it says of the result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from dive_fast.core.loss_weights import LossWeights
from dive_fast.core.probes import low_discrepancy_probes
from dive_fast.core.weight_learning import MARGIN, Trial, differences, learn
from dive_fast.errors import DiveFastError
from dive_fast.predict.comparing import SCREEN_PROBES, compared_losses
from dive_fast.predict.predictor import Predictor

LEAST_IMAGES = 20
PROBES, RIVALS, FOLDS = 100, 9, 5


@dataclass(frozen=True)
class WeightFit:
    """What cross-validation says of learned weights.

    Attributes:
        weights: the best candidate, learned from all images; None where uniform weights win.
        trials: of all candidates against uniform weights, on images left out.
        images: how many.
        right: of them, answered right by uniform weights among the classes that were measured.
        nll: their -log p(label) then, in nats per image.
        evaluations: what was measured, all images together.
    """

    weights: LossWeights | None
    trials: tuple[Trial, ...]
    images: int
    right: int
    nll: float
    evaluations: int

    @property
    def best(self) -> Trial:
        """The candidate of the highest likelihood, whether it won or not."""
        return max(self.trials, key=lambda trial: trial.gain)

    def __str__(self) -> str:
        best = self.best
        said = (
            f"{best.form}: {best.gain:+.4f} +- {best.error:.4f} nats an image left out, "
            f"{best.right} right of {self.images}; uniform weights {self.right}"
        )
        if self.weights is not None:
            return f"{said}\n{self.weights}"
        return (
            f"{said}\nthe weights stay uniform: the best of {len(self.trials)} candidates must "
            f"gain more than {MARGIN:g} standard errors and answer no fewer right"
        )


def evaluations_per_image(n_classes: int, probes: int, rivals: int) -> int:
    """What ``fit_weights`` costs."""
    others = n_classes - 1
    screened = others * min(SCREEN_PROBES, probes) if others > rivals else 0
    return screened + probes * (1 + min(rivals, others))


class Measured(NamedTuple):
    """What weights are learned from.

    Attributes:
        apart: float64 [N, R, bins], see ``core.weight_learning.differences``.
        folds: int64 [N], the part that each image is left out with.
        evaluations: what it cost.
    """

    apart: np.ndarray
    folds: np.ndarray
    evaluations: int


def learned_weights(
    classifier: Predictor,
    x0: torch.Tensor,
    labels: torch.Tensor,
    probes: int,
    rivals: int,
    folds: int,
    seed: int,
    progress: bool,
) -> WeightFit:
    """Measures labelled images, and learns from them; arguments and errors of ``measured``."""
    found = measured(classifier, x0, labels, probes, rivals, folds, seed, progress)
    learned = learn(found.apart, found.folds, len(classifier.model.schedule))
    return WeightFit(
        learned.weights, learned.trials, len(x0), learned.right, learned.nll, found.evaluations
    )


def measured(
    classifier: Predictor,
    x0: torch.Tensor,
    labels: torch.Tensor,
    probes: int = PROBES,
    rivals: int = RIVALS,
    folds: int = FOLDS,
    seed: int = 0,
    progress: bool = False,
) -> Measured:
    """How far the label and its nearest rivals lie apart in every bin of the timesteps.

    Every fold has noises of its own: weights that only suit the noises that they were learned on
    do no good on the images left out.

    Args:
        x0: float32 [B, C, h, w].
        labels: int64 [B].

    Raises:
        DiveFastError: a model of one class, or too few images or probes.
    """
    model = classifier.model
    n_classes, n_timesteps = len(model.vocabulary), len(model.schedule)
    if n_classes < 2:
        raise DiveFastError(f"{model.name} has one class: nothing to tell it from.")
    if len(x0) < LEAST_IMAGES:
        raise DiveFastError(
            f"weights are learned from {LEAST_IMAGES} images or more, got {len(x0)}."
        )
    rivals = min(rivals, n_classes - 1)
    generator = np.random.default_rng(seed)
    fold, seeds = generator.permutation(len(x0)) % folds, generator.integers(2**31, size=folds)
    timesteps = low_discrepancy_probes(probes, n_timesteps, (1, 1, 1)).timesteps
    # Too few probes shall not wait until all are measured.
    differences(torch.zeros(1, 2, probes), timesteps, n_timesteps)
    losses, evaluations = torch.empty(len(x0), 1 + rivals, probes), 0
    for number in range(folds):
        part = np.flatnonzero(fold == number).tolist()
        noises = low_discrepancy_probes(probes, n_timesteps, model.latent_shape, int(seeds[number]))
        jobs = (
            classifier._job(i, x0[i], compared_losses(n_classes, int(labels[i]), probes, rivals))
            for i in part
        )
        for done in classifier._run(jobs, noises, progress=len(part) if progress else None):
            losses[done.key] = done.answer.trace["losses"]
            evaluations += done.evaluations
    return Measured(differences(losses, timesteps, n_timesteps), fold, evaluations)
