"""What a classifier learns from labelled images: part of ``DiffusionClassifier``."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch

from dive_fast.core.loss_weights import LossWeights
from dive_fast.core.numbers import whole, whole_seed
from dive_fast.core.probes import MOST_PROBES, check_count, low_discrepancy_probes
from dive_fast.core.shortlist import Shortlist
from dive_fast.core.timesteps import TimestepWeights, estimate
from dive_fast.errors import DiveFastError, shown
from dive_fast.models.files.sidecar import fitted_shortlist
from dive_fast.predict.calibration import Calibration, as_labels, calibrate
from dive_fast.predict.comparing import compared_losses
from dive_fast.predict.fitting_shortlist import surveyed_shortlist
from dive_fast.predict.fitting_weights import FOLDS, PROBES, RIVALS, WeightFit, learned_weights
from dive_fast.predict.predictor import Predictor
from dive_fast.predict.sampling import sample
from dive_fast.strategies import Strategy, resolve_strategy

log = logging.getLogger(__name__)

# Their noises are all in memory.
MOST_GENERATED = 1_000_000


class Fitting(Predictor):
    """The part of ``DiffusionClassifier`` that fits values to the frozen model."""

    def calibrate(
        self,
        images: Any = None,
        labels: Any = None,
        *,
        latents: torch.Tensor | None = None,
        strategy: str | Strategy = "enumerate",
        probes: int | None = None,
        seed: int = 0,
        timesteps: str | TimestepWeights | None = None,
        weights: str | None = None,
        progress: bool = False,
        **settings: Any,
    ) -> Calibration:
        """Fits the model's ``beta`` to labelled images, for probabilities that can be believed.

        Where learned weights are in use it is their own ``beta`` that is fitted.
        Classes that the strategy did not measure take no part; see ``calibration.fit_beta`` for
        images where the label is one of them. ``save_fitted`` keeps the result.

        Args:
            images, latents: as in ``__call__``; best such as the model was not trained on, of
                which it is surer than of others.
            labels: whole numbers [B], rows of the vocabulary.
            strategy, probes, seed, timesteps, weights, settings: as in ``__call__``; weights by
                name. The default measures all classes.

        Returns:
            beta, expected calibration error and likelihood, before and after.

        Raises:
            DiveFastError: labels that do not fit, or bad input as in ``__call__``.
        """
        if not isinstance(weights, str | None):
            raise DiveFastError(
                f"expected weights 'learned' or 'uniform', got {shown(weights)}: set them on the "
                "model to calibrate them."
            )
        chosen = resolve_strategy(strategy, None, settings)
        counts = self.learned_weights(chosen, probes, weights)
        with torch.inference_mode(False):
            x0 = self._latents(images, latents)
        labels = as_labels(labels, len(x0), len(self.names))
        answers = self(
            latents=x0,
            strategy=chosen,
            probes=probes,
            seed=seed,
            timesteps=timesteps,
            weights=weights,
            progress=progress,
        )
        losses = torch.stack([answer.losses for answer in answers])
        found = torch.tensor([answer.index for answer in answers])
        record = calibrate(losses, labels, self._beta(counts), found)
        if counts is None:
            self.model.inverse_temperature = record.beta_after
        else:
            self.model.loss_weights = replace(counts, beta=record.beta_after)
        return record

    def fit_weights(
        self,
        images: Any = None,
        labels: Any = None,
        *,
        latents: torch.Tensor | None = None,
        probes: int = PROBES,
        rivals: int = RIVALS,
        folds: int = FOLDS,
        seed: int = 0,
        progress: bool = False,
    ) -> WeightFit:
        """Learns what losses count at each timestep from labelled images; see docs/weights.md.

        The weights are set on the model, with a beta of their own, if images that were left out of
        the fit are answered better with them (``core.weight_learning.learn``); else the model has
        none afterwards. Answers are by them from then on, unless told ``weights="uniform"``. A
        shortlist belongs to the losses that it was learned from: ``auto`` leaves out one of other
        weights, and a warning says so here. ``save_fitted`` keeps the result.

        Costs probes x (1 + rivals) evaluations an image, and 20 x (C - 1) more where C - 1 classes
        are more than the rivals.

        Args:
            images, latents: as in ``__call__``; best such as will be classified, of which the model
                was not trained on any. At least 20.
            labels: whole numbers [B], rows of the vocabulary.
            probes: evenly spread ones, on which the right class and its rivals are compared.
            rivals: the nearest wrong classes, found on 20 probes.
            folds: parts of the images that are left out in turn, each with noises of its own.
            seed: of the noises and of the parts.
            progress: show a bar.

        Raises:
            DiveFastError: labels that do not fit, a model of one class, too few images or probes,
                or bad input as in ``__call__``.
        """
        rivals, probes, seed = whole("rivals", rivals, 1), check_count(probes), whole_seed(seed)
        folds = whole("folds", folds, 2, 20)
        with torch.inference_mode(False):
            x0 = self._latents(images, latents)
            labels = as_labels(labels, len(x0), len(self.names))
            fitted = learned_weights(self, x0, labels, probes, rivals, folds, seed, progress)
        self.model.loss_weights = fitted.weights
        shortlist = fitted_shortlist(self.model)
        if shortlist is not None and self._shortlist(fitted.weights) is None:
            log.warning(
                "the shortlist of %s was learned from losses of other weights and is left out with "
                "these: fit it again.",
                self.model.name,
            )
        return fitted

    def fit_timesteps(
        self,
        images: Any = None,
        labels: Any = None,
        *,
        latents: torch.Tensor | None = None,
        generate: int | None = None,
        guidance: float = 1.0,
        probes: int = 100,
        rivals: int = 3,
        seed: int = 0,
        progress: bool = False,
    ) -> TimestepWeights:
        """Learns which timesteps part the best class from its rivals, and sets it on the model.

        Strategies then take their probes there, unless told ``timesteps="uniform"``. The expected
        losses stay what they were, so ``beta`` does too. ``save_fitted`` keeps the result.

        Args:
            images, latents: as in ``__call__``.
            labels: whole numbers [B], rows of the vocabulary; the lowest loss on 20 probes if None.
            generate: instead of images, how many the model shall generate itself, its classes in
                turn, by 50 steps of DDIM.
            guidance: of the generation; see ``sampling.sample``.
            probes: evenly spread ones, on which the right class and its rivals are compared.
            rivals: the nearest wrong classes, found on 20 probes.
            seed: of the noises.
            progress: show a bar.

        Raises:
            DiveFastError: labels that do not fit, a model of one class, too few probes, or bad
                input as in ``__call__``.
        """
        rivals, probes, seed = whole("rivals", rivals, 1), check_count(probes), whole_seed(seed)
        if generate is not None:
            generate = whole("generate", generate, 1, MOST_GENERATED)
        n_classes = len(self.names)
        if n_classes < 2:
            raise DiveFastError(f"{self.model.name} has one class: nothing to tell it from.")
        with torch.inference_mode(False):
            if generate is not None:
                if labels is not None:
                    raise DiveFastError("expected images with labels, or generate, got both.")
                labels = _turns(generate, n_classes)
            x0 = self._given_or_generated(images, latents, generate, seed, progress, guidance)
            known = labels is not None
            labels = as_labels(labels, len(x0), n_classes) if known else [None] * len(x0)
            n_timesteps = len(self.model.schedule)
            probe_list = low_discrepancy_probes(probes, n_timesteps, self.model.latent_shape, seed)
            jobs = (
                self._job(
                    i, x, compared_losses(n_classes, None if y is None else int(y), probes, rivals)
                )
                for i, (x, y) in enumerate(zip(x0, labels, strict=True))
            )
            losses = torch.empty(len(x0), 1 + min(rivals, n_classes - 1), probes)
            for finished in self._run(jobs, probe_list, progress=len(x0) if progress else None):
                losses[finished.key] = finished.answer.trace["losses"]
        self.model.timesteps = estimate(losses, probe_list.timesteps, n_timesteps)
        return self.model.timesteps

    def _given_or_generated(
        self,
        images: Any,
        latents: torch.Tensor | None,
        generate: int | None,
        seed: int,
        progress: bool,
        guidance: float = 1.0,
    ) -> torch.Tensor:
        """x0 of the images, or of as many as the model shall make of its classes in turn."""
        if generate is None:
            return self._latents(images, latents)
        generate = whole("generate", generate, 1, MOST_GENERATED)
        if images is not None or latents is not None:
            raise DiveFastError("expected images with labels, or generate, got both.")
        return sample(
            self.model,
            _turns(generate, len(self.names)),
            guidance=guidance,
            seed=seed,
            batch_size=self.batch_size,
            progress=progress,
        )

    def fit_shortlist(
        self,
        images: Any = None,
        *,
        latents: torch.Tensor | None = None,
        generate: int | None = None,
        probes: int = 24,
        seed: int = 0,
        weights: str | LossWeights | None = None,
        progress: bool = False,
    ) -> Shortlist:
        """Learns to rank the classes from one gradient, for ``auto``; see ``core.shortlist``.

        A few dozen images do, labels are not needed. What is learned is tried on every image with
        what the others say of it, against enumeration over 100 probes: ``checks`` of the result,
        and ``auto`` keeps its ``min_agreement`` accordingly. It is not set on the model, and a
        warning says so, if ``auto`` does no better with it. ``save_fitted`` keeps it.

        Costs about probes x (C + 2) + 76 x min(C, 16) evaluations an image, once.

        Args:
            images, latents: as in ``__call__``; best such as will be classified.
            generate: instead, how many the model shall generate itself, its classes in turn. They
                are easier than real images: the promise is then one for such.
            probes: on which every class is measured and the gradient taken, at least 4. The 16
                best classes go on to 100.
            seed: of the noises.
            weights: as in ``__call__``; ``auto`` uses the result with the same ones only.

        Raises:
            DiveFastError: fewer than 2 images, or bad input as in ``__call__``.
        """
        probes, seed = whole("probes", probes, 4, MOST_PROBES), whole_seed(seed)
        with torch.inference_mode(False):
            x0 = self._given_or_generated(images, latents, generate, seed, progress)
            if len(x0) < 2:
                raise DiveFastError(f"a shortlist is learned from 2 images or more, got {len(x0)}.")
            learned, better = surveyed_shortlist(self, x0, probes, seed, progress, weights)
        self.model.shortlist = learned if better else None
        return learned


def _turns(n: int, n_classes: int) -> torch.Tensor:
    """The classes of n generated images, spread over all."""
    return torch.arange(n) * max(n_classes, n) // n % n_classes
