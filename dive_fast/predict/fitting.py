"""What a classifier learns from labelled images: part of ``DiffusionClassifier``."""

from __future__ import annotations

from typing import Any

import torch

from dive_fast.core.numbers import whole, whole_seed
from dive_fast.core.probes import check_count, low_discrepancy_probes
from dive_fast.core.requests import Answer, Gradients, Losses, Search
from dive_fast.core.shortlist import Shortlist, digest, estimate_shortlist
from dive_fast.core.timesteps import TimestepWeights, estimate
from dive_fast.core.vocabulary import Vocabulary
from dive_fast.errors import DiveFastError
from dive_fast.models.protocol import optional
from dive_fast.predict.calibration import Calibration, as_labels, calibrate
from dive_fast.predict.predictor import Predictor
from dive_fast.predict.sampling import sample
from dive_fast.strategies import Strategy

# Rivals of the right class are found on this many probes, where there are more than are wanted.
SCREEN_PROBES = 20
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
        progress: bool = False,
        **settings: Any,
    ) -> Calibration:
        """Fits the model's ``beta`` to labelled images, for probabilities that can be believed.

        Classes that the strategy did not measure take no part; see ``calibration.fit_beta`` for
        images where the label is one of them. ``save_fitted`` keeps the result.

        Args:
            images, latents: as in ``__call__``; best such as the model was not trained on, of
                which it is surer than of others.
            labels: whole numbers [B], rows of the vocabulary.
            strategy, probes, seed, timesteps, settings: as in ``__call__``. The default measures
                all classes.

        Returns:
            beta, expected calibration error and likelihood, before and after.

        Raises:
            DiveFastError: labels that do not fit, or bad input as in ``__call__``.
        """
        with torch.inference_mode(False):
            x0 = self._latents(images, latents)
        labels = as_labels(labels, len(x0), len(self.names))
        answers = self(
            latents=x0,
            strategy=strategy,
            probes=probes,
            seed=seed,
            timesteps=timesteps,
            progress=progress,
            **settings,
        )
        losses = torch.stack([answer.losses for answer in answers])
        found = torch.tensor([answer.index for answer in answers])
        record = calibrate(losses, labels, self.model.inverse_temperature, found)
        self.model.inverse_temperature = record.beta_after
        return record

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
        """Learns which timesteps part the right class from its rivals, and sets it on the model.

        Strategies then take their probes there, unless told ``timesteps="uniform"``. The expected
        losses stay what they were, so ``beta`` does too. ``save_fitted`` keeps the result.

        Args:
            images, latents: as in ``__call__``.
            labels: whole numbers [B], rows of the vocabulary.
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
            labels = as_labels(labels, len(x0), n_classes)
            n_timesteps = len(self.model.schedule)
            probe_list = low_discrepancy_probes(probes, n_timesteps, self.model.latent_shape, seed)
            jobs = (
                self._job(i, x, _compare(n_classes, int(y), probes, rivals))
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
        progress: bool = False,
    ) -> Shortlist:
        """Learns to rank the classes from one gradient, for ``auto``; see ``core.shortlist``.

        Costs probes x (C + 2) evaluations an image, once; a few dozen images do, labels are not
        needed. ``save_fitted`` keeps the result.

        Args:
            images, latents: as in ``__call__``.
            generate: instead, how many the model shall generate itself, its classes in turn.
            probes: on which every class is measured.
            seed: of the noises.

        Raises:
            DiveFastError: fewer than 2 images, or bad input as in ``__call__``.
        """
        probes, seed = check_count(probes), whole_seed(seed)
        with torch.inference_mode(False):
            x0 = self._given_or_generated(images, latents, generate, seed, progress)
            if len(x0) < 2:
                raise DiveFastError(f"a shortlist is learned from 2 images or more, got {len(x0)}.")
            n_timesteps, shape = len(self.model.schedule), self.model.latent_shape
            learned = optional(self.model, "timesteps")
            probe_list = (
                low_discrepancy_probes(probes, n_timesteps, shape, seed)
                if learned is None
                else learned.probes(probes, shape, seed)
            )
            vocabulary = self.model.vocabulary
            jobs = (self._job(i, x, _survey(vocabulary, probes)) for i, x in enumerate(x0))
            found: dict[int, dict[str, torch.Tensor]] = {}
            for finished in self._run(jobs, probe_list, progress=len(x0) if progress else None):
                found[finished.key] = finished.answer.trace
        losses, base, linear = (
            torch.stack([found[i][key] for i in range(len(x0))])
            for key in ("losses", "base", "linear")
        )
        slope, curvature = estimate_shortlist(losses, base, linear)
        learned = Shortlist(slope, tuple(curvature.tolist()), digest(vocabulary.names))
        self.model.shortlist = learned
        return learned


def _turns(n: int, n_classes: int) -> torch.Tensor:
    """The classes of n generated images, spread over all."""
    return torch.arange(n) * max(n_classes, n) // n % n_classes


def _survey(vocabulary: Vocabulary, k: int) -> Search:
    """All classes measured and estimated: ``trace`` has losses [C], base [] and linear [C]."""
    n, v0, probes = len(vocabulary), vocabulary.mean(), torch.arange(k)
    reply = yield Gradients(v0[None], probes)
    losses = yield Losses(torch.arange(n), probes)
    means = losses.mean(dim=1)
    linear = vocabulary.linear(v0, reply.gradients[0])
    trace = {"losses": means, "base": reply.losses.mean(), "linear": linear}
    return Answer(int(means.argmin()), means, torch.full((n,), k), trace)


def _compare(n_classes: int, label: int, k: int, rivals: int) -> Search:
    """Losses of the right class and its nearest rivals: ``trace["losses"]`` [1 + R, k]."""
    others = torch.tensor([c for c in range(n_classes) if c != label])
    if len(others) > rivals:
        losses = yield Losses(others, torch.arange(min(SCREEN_PROBES, k)))
        others = others[losses.mean(dim=1).argsort()[:rivals]]
    compared = torch.cat([torch.tensor([label]), others])
    losses = yield Losses(compared, torch.arange(k))
    means = torch.full((n_classes,), torch.nan)
    means[compared] = losses.mean(dim=1)
    return Answer(label, means, means.isfinite() * k, {"losses": losses})
