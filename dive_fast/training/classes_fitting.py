"""What follows the training: the fitted values, and an honest figure of the classifier."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dive_fast.models.files.sidecar import write_extra
from dive_fast.predict.classifier import DiffusionClassifier
from dive_fast.predict.fitting_shortlist import FINALISTS
from dive_fast.strategies.base import DEFAULT_PROBES
from dive_fast.training.classes_data import Pictures
from dive_fast.training.classes_parts import Parts

STRATEGY = "auto"
SCREENED = 20  # probes on which ``fit_timesteps`` finds rivals; it compares four classes
SHORTLIST_PROBES = 24
# A shortlist spares nothing among fewer classes.
SHORTLIST_CLASSES = 5
MOST_IMAGES = 1000
# What one image takes ``auto`` at most of the time, for the budget.
AUTO_EVALUATIONS = 500
FEWEST_FITTED, FEWEST_MEASURED = 8, 100  # whatever the budget


@dataclass(frozen=True)
class Expected:
    """What to expect of a classifier, of pictures neither trained on nor fitted to.

    Attributes:
        strategy: that answered, with its default probes.
        n: pictures that were classified.
        accuracy: share of them whose answer is right.
        standard_error: of the accuracy.
        evaluations, seconds: an image, the mean.
        fitted_to: pictures that timesteps, shortlist and beta were fitted to, at most.
    """

    strategy: str
    n: int
    accuracy: float
    standard_error: float
    evaluations: float
    seconds: float
    fitted_to: int


def fit_and_measure(
    out: Path,
    pictures: Pictures,
    parts: Parts,
    budget: int,
    facts: Mapping[str, Any],
    seed: int,
    device: torch.device,
    progress: bool,
) -> Expected:
    """Fits timesteps, shortlist and beta of the model in ``out``, and classifies the test part.

    Args:
        budget: evaluations for all of it, about; each step takes fewer images where it is short.
        facts: further entries of ``dive_fast.json``, which is written last.
        device: that classifies.
    """
    classifier = DiffusionClassifier.from_pretrained(out, device=device)
    fit, test = (shuffled(part, seed)[:MOST_IMAGES] for part in (parts.fit, parts.test))
    share, c = budget // 4, len(pictures.names)

    def affordable(rows: Tensor, evaluations: int, fewest: int = FEWEST_FITTED) -> Tensor:
        return rows[: max(fewest, share // evaluations)]

    def latents(rows: Tensor) -> Tensor:
        return classifier.encode(pictures.pixels[rows])

    rows = affordable(fit, SCREENED * c + 4 * DEFAULT_PROBES)
    classifier.fit_timesteps(
        latents=latents(rows), labels=pictures.labels[rows], seed=seed, progress=progress
    )
    few = affordable(fit, SHORTLIST_PROBES * (c + 2) + DEFAULT_PROBES * min(c, FINALISTS))
    if c >= SHORTLIST_CLASSES and len(few) > 1:
        classifier.fit_shortlist(
            latents=latents(few), probes=SHORTLIST_PROBES, seed=seed, progress=progress
        )
    rows = affordable(fit, AUTO_EVALUATIONS)
    classifier.calibrate(
        latents=latents(rows),
        labels=pictures.labels[rows],
        strategy=STRATEGY,
        seed=seed,
        progress=progress,
    )
    tried = affordable(test, AUTO_EVALUATIONS, FEWEST_MEASURED)
    # Other noises than those that anything was fitted on.
    answers = classifier(
        latents=latents(tried), strategy=STRATEGY, seed=seed + 1, progress=progress
    )
    right = [a.index == y for a, y in zip(answers, pictures.labels[tried].tolist(), strict=True)]
    n, accuracy = len(right), sum(right) / len(right)
    expected = Expected(
        STRATEGY,
        n,
        accuracy,
        math.sqrt(accuracy * (1 - accuracy) / n),
        sum(a.evaluations for a in answers) / n,
        sum(a.seconds for a in answers) / n,
        len(fit),
    )
    write_extra(out, {**facts, "expected": dataclasses.asdict(expected)})
    classifier.save_fitted(out)
    return expected


def shuffled(rows: Tensor, seed: int) -> Tensor:
    """In a random order: the first of a part may all be of one class."""
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]
