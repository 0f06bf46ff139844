"""What classifier and detector share: a model, its way through the engine, and what is fitted."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from dive_fast.core.loss_weights import LossWeights, digest_of
from dive_fast.core.probes import ProbeList
from dive_fast.core.requests import Search
from dive_fast.core.shortlist import Shortlist
from dive_fast.core.timesteps import TimestepWeights
from dive_fast.core.vocabulary import Vocabulary
from dive_fast.data.images import as_images
from dive_fast.engine import Engine, EngineOptions, EngineRecord, Finished, Job
from dive_fast.engine.batch_size import rows_per_batch
from dive_fast.engine.model_checks import check_encoded, check_model, told
from dive_fast.engine.objective import Objective
from dive_fast.errors import DiveFastError, ModelError, shown
from dive_fast.models.files.sidecar import (
    Fitted,
    apply_fitted,
    fitted_shortlist,
    read_fitted,
    write_fitted,
)
from dive_fast.models.protocol import Model, optional
from dive_fast.predict.placing import Placing
from dive_fast.strategies.averaged import averaged


class Predictor(Placing):
    """A frozen model that answers by searches: base of ``DiffusionClassifier`` and its siblings.

    Args:
        model: anything that follows ``dive_fast.models.protocol.Model``.
        batch_size: rows per forward of the network at most; if None 256, on the CPU fewer for large
            networks (``engine.batch_size.rows_per_batch``).
        options: how the engine computes; measured defaults if None.

    Raises:
        ModelError: the model lacks something, or is being trained (``engine.model_checks``).
        DiveFastError: another argument is none of its kind.

    Attributes:
        directory: where ``save_fitted`` writes unless told; None for models of zoo and hub.
    """

    def __init__(
        self, model: Model, *, batch_size: int | None = None, options: EngineOptions | None = None
    ) -> None:
        check_model(model)
        if not isinstance(options, EngineOptions | None):
            raise DiveFastError(f"options must be EngineOptions or None, got {shown(options)}.")
        self.model = model
        self.batch_size = rows_per_batch(model, batch_size)
        self.directory: Path | None = None
        self.options = EngineOptions() if options is None else options
        self._engine = Engine(model, self.batch_size, None, self.options)

    @property
    def last_run(self) -> EngineRecord:
        """Batches, rows, evaluations, fill rate and cache of the last call."""
        return self._engine.record

    def _beta(self, weights: LossWeights | None) -> float:
        """The inverse temperature of losses under these weights."""
        return self.model.inverse_temperature if weights is None else weights.beta

    def _shortlist(self, weights: LossWeights | None) -> Shortlist | None:
        """The model's shortlist, if it was learned for its classes and from losses like these."""
        found = fitted_shortlist(self.model)
        return found if found is not None and found.weights == digest_of(weights) else None

    def save_fitted(self, directory: str | Path | None = None) -> Path:
        """Writes what was fitted into ``dive_fast.json``, keeping its other entries.

        Args:
            directory: the model's own if None, which it must have been loaded from. For models of
                the zoo or the hub name another, and read it again with ``load_fitted``.

        Returns:
            The file's path.

        Raises:
            ModelError: no directory, or one that cannot be written.
        """
        target = self.directory if directory is None else _path(directory)
        if target is None:
            raise ModelError(
                f"{self.model.name} has no model directory of yours to write to: give one."
            )
        timesteps = optional(self.model, "timesteps")
        shortlist = fitted_shortlist(self.model)
        weights = optional(self.model, "loss_weights")
        rule = optional(self.model, "segmentation")
        found = optional(self.model, "detection")
        beta = self.model.inverse_temperature
        return write_fitted(target, Fitted(beta, timesteps, shortlist, weights, rule, found))

    def load_fitted(self, directory: str | Path) -> None:
        """Takes over what ``save_fitted`` wrote.

        Raises:
            ModelError: there is no ``dive_fast.json``, or it is damaged.
        """
        fitted = read_fitted(_path(directory), required=True)
        for found in (fitted.timesteps, fitted.loss_weights):
            if found is not None:
                self._check_timesteps(found)
        apply_fitted(self.model, fitted)

    def _identity(
        self,
        strategy: Any,
        probes: int | ProbeList | None,
        seed: int,
        timesteps: str | TimestepWeights | None,
        weights: str | LossWeights | None = None,
    ) -> dict[str, Any]:
        """What decides the answers of a run, for JSON: model, strategy, probes and seed."""
        placed = self._placed(strategy, probes, timesteps, weights)
        learned = self.learned_weights(strategy, probes, weights)
        probe_list = self.probe_list(strategy, probes, seed, timesteps, weights)
        found = {
            "model": self._model_identity(),
            "strategy": {"name": strategy.name, **_settings(strategy)},
            "probes": len(probe_list),
            **({} if learned is None else {"loss_weights": list(learned.weights)}),
            "beta": self._beta(learned),
            "seed": seed,
        }
        if probe_list.unit > 1:
            found["noise"] = "antithetic pairs"
        if placed is not None:
            found["timesteps"] = placed.to_dict()
        # Only what changes answers: a run may go on under another cache, but not another precision.
        if engine := self.options.identity():
            found["engine"] = engine
        return found

    def _model_identity(self) -> dict[str, Any]:
        found = told(self.model, "identity", self.model.identity)
        try:
            if isinstance(found, Mapping) and json.dumps(dict(found), allow_nan=False):
                return dict(found)
        except (TypeError, ValueError, RecursionError):
            pass
        raise ModelError(
            f"expected 'identity' of {self.model.name} to return a dictionary for JSON, got "
            f"{shown(found)}."
        )

    def encode(self, images: Any) -> torch.Tensor:
        """x0 of images in any form that ``__call__`` takes: float32 [B, C, h, w].

        Raises:
            ImageError: an image cannot be read.
            ModelError: the model fails, or makes something else of them.
        """
        channels, size, _ = self.model.image_shape
        return self.encode_pixels(torch.stack(as_images(images, size, channels)))

    def encode_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        """x0 [B, C, h, w] of float32 pixels [B, channels, size, size] in [-1, 1].

        Raises:
            ModelError: the model fails, or makes something else of them.
        """
        found = told(self.model, "encode", self.model.encode, pixels)
        return check_encoded(self.model, found, len(pixels))

    def _job(self, key: Any, x0: torch.Tensor, search: Search) -> Job:
        """One image's way through the engine; x0 float [C, h, w]."""
        # Cloned: a tensor made in inference mode cannot take part in a backward.
        own = x0.detach().float().clone()
        return Job(key, own, averaged(search, self.model.vocabulary.parts))

    def _run(
        self,
        jobs: Iterable[Job],
        probes: ProbeList,
        loss: str = "l2",
        progress: int | None = None,
    ) -> Iterator[Finished]:
        """Every run of the engine: with the user's options, at the batch size that memory allows.

        Args:
            progress: the number of images if a bar shall be shown.
        """
        with Bar(progress) as (bar, on_batch):
            for finished in self._run_part(jobs, probes, loss, on_batch):
                bar.update()
                yield finished

    def _run_part(
        self,
        jobs: Iterable[Job],
        probes: ProbeList,
        loss: str,
        on_batch: Callable[[int], None],
        vocabulary: Vocabulary | None = None,
        record: EngineRecord | None = None,
    ) -> Iterator[Finished]:
        """The same without a bar, for who has one.

        Args:
            vocabulary: whose rows the jobs name; the model's if None.
            record: of the call's earlier parts.
        """
        engine = self._engine = Engine(self.model, self.batch_size, on_batch, self.options)
        try:
            yield from engine.run(jobs, probes, Objective(loss), vocabulary, record)
        finally:
            # Memory that ran out once would run out again.
            self.batch_size = engine.batch_size


def _path(directory: Any) -> Path:
    if not isinstance(directory, str | os.PathLike):
        raise ModelError(f"expected a directory, got {shown(directory)}.")
    return Path(directory)


def _settings(strategy: Any) -> dict[str, Any]:
    """A strategy's settings for JSON; tensors cannot be given on the command line."""
    values = dataclasses.asdict(strategy) if dataclasses.is_dataclass(strategy) else {}
    return {k: v for k, v in values.items() if not isinstance(v, torch.Tensor)}


class Bar:
    """A progress bar over images that also counts evaluations; silent where ``total`` is None."""

    def __init__(self, total: int | None) -> None:
        self.bar = tqdm(total=total, unit="image", disable=total is None)
        self.evaluations = 0
        self.shown = 0.0

    def __enter__(self) -> tuple[tqdm, Callable[[int], None]]:
        return self.bar, self.count

    def __exit__(self, *exc: object) -> None:
        self.bar.close()

    def count(self, evaluations: int) -> None:
        self.evaluations += evaluations
        # One image may take minutes: the bar must move before the first is done, but not per batch.
        due = time.monotonic() - self.shown > 0.5
        self.bar.set_postfix(evaluations=f"{self.evaluations:,}", refresh=due)
        self.shown = time.monotonic() if due else self.shown
