"""What a classifier learns from labelled images: part of ``DiffusionClassifier``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dive_fast.calibration import Calibration, as_labels, calibrate
from dive_fast.errors import ModelError
from dive_fast.models.fitted import Fitted, read_fitted, write_fitted
from dive_fast.models.protocol import Model
from dive_fast.strategies import Strategy


class Fitting:
    """Mixin of ``DiffusionClassifier``: fits values to the frozen model, stores and reads them.

    Attributes:
        model: what they are fitted to.
        directory: where ``save_fitted`` writes unless told; None for models of zoo and hub.
    """

    model: Model
    directory: Path | None

    def calibrate(
        self,
        images: Any = None,
        labels: Any = None,
        *,
        latents: torch.Tensor | None = None,
        strategy: str | Strategy = "enumerate",
        probes: int | None = None,
        seed: int = 0,
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
            strategy, probes, seed, settings: as in ``__call__``. The default measures all classes.

        Returns:
            beta, expected calibration error and likelihood, before and after.

        Raises:
            DiveFastError: labels that do not fit, or bad input as in ``__call__``.
        """
        with torch.inference_mode(False):
            x0 = self._latents(images, latents)
        labels = as_labels(labels, len(x0), len(self.names))
        answers = self(
            latents=x0, strategy=strategy, probes=probes, seed=seed, progress=progress, **settings
        )
        losses = torch.stack([answer.losses for answer in answers])
        found = torch.tensor([answer.index for answer in answers])
        record = calibrate(losses, labels, self.model.beta, found)
        self.model.beta = record.beta_after
        return record

    def save_fitted(self, directory: str | Path | None = None) -> Path:
        """Writes ``beta`` into ``dive_fast.json``, keeping its other entries.

        Args:
            directory: the model's own if None, which it must have been loaded from. For models of
                the zoo or the hub name another, and read it again with ``load_fitted``.

        Returns:
            The file's path.

        Raises:
            ModelError: no directory, or one that cannot be written.
        """
        target = self.directory if directory is None else Path(directory)
        if target is None:
            raise ModelError(
                f"{self.model.name} has no model directory of yours to write to: give one."
            )
        return write_fitted(target, Fitted(self.model.beta))

    def load_fitted(self, directory: str | Path) -> None:
        """Takes over what ``save_fitted`` wrote.

        Raises:
            ModelError: there is no ``dive_fast.json``, or it is damaged.
        """
        fitted = read_fitted(Path(directory), required=True)
        if fitted.beta is not None:
            self.model.beta = fitted.beta
