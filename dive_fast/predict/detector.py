"""The detector that users call: the layout that best explains an image."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from dive_fast.core.probes import ProbeList
from dive_fast.core.timesteps import TimestepWeights
from dive_fast.data.images import as_pictures, squashed_tensor
from dive_fast.engine import Engine, EngineOptions, EngineRecord, Finished, Job
from dive_fast.engine.batch_size import rows_per_batch
from dive_fast.engine.objective import Objective
from dive_fast.errors import DiveFastError, ModelError
from dive_fast.models import Source, load_model, resolve
from dive_fast.models.files.sidecar import Fitted, apply_fitted, read_fitted, write_fitted
from dive_fast.models.protocol import optional
from dive_fast.models.text.prompts import Classes
from dive_fast.predict.detections import Detections
from dive_fast.priors import LayoutPenalty, LayoutPrior, fits, load_prior
from dive_fast.strategies.layout import Board, LayoutAnswer, LayoutStrategy, resolve_layout_strategy
from dive_fast.strategies.layout.board import DEFAULT_PROBES, LayoutProbes

# The pseudo-likelihood meets what two tokens have to do with each other twice.
PRIOR_WEIGHT = 0.5
PRIOR_PROBES = 8


class LayoutDetector:
    """A frozen layout-to-image diffusion model as object detector.

    Args:
        model: of the family "layout-to-image", or anything that follows
            ``dive_fast.models.protocol.Model`` and has a ``layout``.
        prior: over the layouts of this model; None for none.
        prior_weight: w, of the prior's log p(y) beside -beta L; 0.5 if None. With 0 the prior is
            not asked.
        prior_probes: (timestep, noise) pairs of the prior that a relaxed search takes its gradient
            from.
        batch_size: rows per forward of the network at most; the model's default if None.
        options: how the engine computes; measured defaults if None.

    Raises:
        ModelError: the model has no layout, the prior is another model's, a weight or a number of
            probes is out of range, or a weight is given without a prior.
    """

    def __init__(
        self,
        model: Any,
        prior: LayoutPrior | None = None,
        *,
        prior_weight: float | None = None,
        prior_probes: int = PRIOR_PROBES,
        batch_size: int | None = None,
        options: EngineOptions | None = None,
    ) -> None:
        _check_layout(model)
        self.model = model
        self.prior = prior
        self.prior_weight = _checked_weight(model, prior, prior_weight)
        self.prior_probes = prior_probes
        if prior is not None:
            prior.to(model.device)
            self._penalty(seed=0)  # says what is wrong with the number of probes
        self.batch_size = rows_per_batch(model, batch_size)
        self.directory: Path | None = None
        self.options = EngineOptions() if options is None else options
        self._engine = Engine(model, self.batch_size, None, self.options)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path | Source,
        prior: str | Path | None = "auto",
        *,
        prior_weight: float | None = None,
        prior_probes: int = PRIOR_PROBES,
        dtype: torch.dtype | str = torch.float32,
        device: torch.device | str | None = None,
        batch_size: int | None = None,
        allow_pickle: bool = False,
        classes: Classes | None = None,
        templates: Sequence[str] | None = None,
        **engine: Any,
    ) -> LayoutDetector:
        """From a model of the zoo, a model directory, or a hub id.

        Args:
            prior: "auto": the one in the folder ``prior`` of the model, where it has one; a
                directory that ``dive-fast train-prior`` wrote; or None for none.
            prior_weight, prior_probes: as for ``LayoutDetector``.

        The other arguments are those of ``dive_fast.models.load_model`` (``classes`` and
        ``templates`` are for text-conditional models, such as GLIGEN); ``cache``,
        ``cache_bytes``, ``refresh``, ``autocast``, ``compile`` and ``channels_last`` those of
        ``EngineOptions``.

        Raises:
            ModelError: the source is unknown, broken, or no layout-to-image model; a
                text-conditional one without classes, or classes for another one; the prior is
                broken or another model's.
        """
        options = EngineOptions(**engine)
        source = resolve(source, allow_pickle=allow_pickle)
        model = load_model(
            source,
            dtype=dtype,
            device=device,
            allow_pickle=allow_pickle,
            classes=classes,
            templates=templates,
        )
        _check_layout(model)
        if prior == "auto":
            prior = source.prior
        if prior is not None:
            prior = load_prior(prior, model.layout, model.vocabulary.table)
        detector = cls(
            model,
            prior,
            prior_weight=prior_weight,
            prior_probes=prior_probes,
            batch_size=batch_size,
            options=options,
        )
        detector.directory = source.own_directory
        return detector

    @property
    def names(self) -> tuple[str, ...]:
        """The classes' names."""
        return self.model.layout.names

    @property
    def prior_out_of_proportion(self) -> bool:
        """Whether a prior counts though beta, which sets its weight, was not fitted."""
        unfitted = math.prod(self.model.latent_shape) / 2  # what models begin with
        return self.prior is not None and self.prior_weight > 0 and self.model.beta == unfitted

    @property
    def last_run(self) -> EngineRecord:
        """Batches, rows, evaluations, fill rate and cache of the last call."""
        return self._engine.record

    def __call__(
        self,
        images: Any,
        *,
        strategy: str | LayoutStrategy | None = None,
        probes: int | ProbeList | None = None,
        seed: int = 0,
        **settings: Any,
    ) -> list[Detections]:
        """Detects the objects of one image or many.

        Args:
            images: PIL images, paths, arrays or tensors, one or many; see
                ``dive_fast.data.images.as_images``.
            strategy: "guided" or "invert", or a strategy object.
            probes: how many, or a list of your own. Without one they lie where the model's
                ``dive_fast.json`` says ("timesteps"), and else in the middle of the schedule.
            seed: of the probes' noise and of the strategy's draws.
            settings: of the strategy, by name.

        Returns:
            One ``Detections`` per image, in their order, boxes in pixels of each image.

        Raises:
            DiveFastError: bad input, an unknown strategy or setting.
        """
        with torch.inference_mode(False):
            pictures = as_pictures(images, self.model.image_shape[0])
            found: list[Detections | None] = [None] * len(pictures)
            stream = self.stream(
                enumerate(pictures), strategy=strategy, probes=probes, seed=seed, **settings
            )
            for i, detections in stream:
                found[i] = detections
        return found

    def stream(
        self,
        images: Iterable[tuple[Any, Image.Image]],
        *,
        strategy: str | LayoutStrategy | None = None,
        probes: int | ProbeList | None = None,
        seed: int = 0,
        **settings: Any,
    ) -> Iterator[tuple[Any, Detections]]:
        """Detects in pictures as they come and yields (key, detections) as soon as they are found.

        Args:
            images: pairs of a key and a PIL image; read lazily.

        The other arguments are those of ``__call__``; boxes are in pixels of each image.
        """
        stream = self.search_stream(images, strategy=strategy, probes=probes, seed=seed, **settings)
        for finished, size in stream:
            answer: LayoutAnswer = finished.answer
            classes, probabilities = _classes(answer), self._class_probabilities(answer)
            found = Detections(
                self.boxes(answer, size),
                classes,
                probabilities.gather(1, classes[:, None])[:, 0],
                self.names,
                probabilities,
                finished.evaluations,
                finished.seconds,
            )
            yield finished.key, found

    def search_stream(
        self,
        images: Iterable[tuple[Any, Image.Image]],
        *,
        strategy: str | LayoutStrategy | None = None,
        probes: int | ProbeList | None = None,
        seed: int = 0,
        **settings: Any,
    ) -> Iterator[tuple[Finished, tuple[int, int]]]:
        """As ``stream``, with the losses of every object.

        Yields:
            What the engine finished, whose ``answer`` is a ``LayoutAnswer``, and the size of the
            picture (width, height).
        """
        chosen = resolve_layout_strategy(strategy, settings)
        probe_list = self._probe_list(chosen, probes, seed)
        model = self.model
        board = Board(model.vocabulary.table, model.layout, probe_list, seed, self._penalty(seed))
        sizes: dict[Any, tuple[int, int]] = {}

        def jobs() -> Iterator[Job]:
            channels, side, _ = model.image_shape
            for key, image in images:
                if key in sizes:
                    raise DiveFastError(f"expected a key for each image, got {key!r} twice.")
                sizes[key] = image.size
                x0 = model.encode(squashed_tensor(image, side, channels)[None])[0]
                # Cloned: a tensor made in inference mode cannot take part in a backward.
                yield Job(key, x0.detach().float().clone(), chosen.search(board))

        engine = self._engine = Engine(model, self.batch_size, None, self.options)
        for finished in engine.run(jobs(), probe_list, Objective(chosen.loss)):
            self._check_answer(finished.answer)
            yield finished, sizes.pop(finished.key)
        # Memory that ran out once would run out again.
        self.batch_size = engine.batch_size

    def boxes(self, answer: LayoutAnswer, size: tuple[int, int]) -> torch.Tensor:
        """The boxes of an answer in pixels of a picture (width, height), float32 xyxy [n, 4]."""
        boxes = torch.tensor([item.box for item in answer.items], dtype=torch.float32)
        return boxes.view(-1, 4) * (torch.tensor([*size, *size]) / (self.model.layout.grid - 1))

    def identity(
        self,
        *,
        strategy: str | LayoutStrategy | None = None,
        probes: int | ProbeList | None = None,
        seed: int = 0,
    ) -> dict[str, Any]:
        """What decides the answers, for JSON: model, search, probes and seed."""
        chosen = resolve_layout_strategy(strategy, {})
        found = {
            "model": self.model.identity(),
            "strategy": {"name": chosen.name, **dataclasses.asdict(chosen)},
            "probes": len(self._probe_list(chosen, probes, seed)),
            "beta": self.model.beta,
            "seed": seed,
        }
        if (weights := self._timesteps(chosen, probes)) is not None:
            found["timesteps"] = weights.to_dict()
        if (penalty := self._penalty(seed)) is not None:
            # Its weight there is w / beta.
            found["prior"] = {**penalty.identity(), "weight": self.prior_weight}
        # Only what changes answers: a run may go on under another cache.
        if engine := self.options.identity():
            found["engine"] = engine
        return found

    def save_fitted(self, directory: str | Path | None = None) -> Path:
        """Writes the model's beta into ``dive_fast.json``, keeping its other entries.

        Args:
            directory: the model's own if None, which it must have been loaded from.

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
        return write_fitted(target, Fitted(self.model.beta, optional(self.model, "timesteps")))

    def load_fitted(self, directory: str | Path) -> None:
        """Takes over what ``save_fitted`` wrote.

        Raises:
            ModelError: there is no ``dive_fast.json``, or it is damaged.
        """
        apply_fitted(self.model, read_fitted(Path(directory), required=True))

    def _penalty(self, seed: int) -> LayoutPenalty | None:
        """The prior's part of the loss, where there is a prior that counts."""
        if self.prior is None or self.prior_weight == 0:
            return None
        weight = self.prior_weight / self.model.beta
        return LayoutPenalty(self.prior, weight, self.prior_probes, self.model.layout, seed)

    def _probe_list(
        self, strategy: LayoutStrategy, probes: int | ProbeList | None, seed: int
    ) -> ProbeList:
        model = self.model
        if (weights := self._timesteps(strategy, probes)) is not None:
            count = DEFAULT_PROBES if probes is None else probes
            probes = weights.probes(count, model.latent_shape, seed)
        elif not isinstance(probes, ProbeList):
            probes = strategy.probes(probes, len(model.schedule), model.latent_shape, seed)
        probes.check(model.latent_shape, len(model.schedule))
        return probes

    def _timesteps(
        self, strategy: LayoutStrategy, probes: int | ProbeList | None
    ) -> TimestepWeights | None:
        """The model's own timesteps, where the choice of probes is ours."""
        ours = getattr(type(strategy), "probes", None) is LayoutProbes.probes
        if not ours or isinstance(probes, ProbeList):
            return None
        weights = optional(self.model, "timesteps")
        if weights is not None and weights.n_timesteps != len(self.model.schedule):
            raise ModelError(
                f"expected timesteps for {len(self.model.schedule)} steps of the schedule, "
                f"got {weights.n_timesteps}."
            )
        return weights

    def _class_probabilities(self, answer: LayoutAnswer) -> torch.Tensor:
        """Of each object, the posterior of all classes that it could be, float32 [n, C].

        p(c | rest, x0) = softmax over classes and "not there" of -beta L

        "Not there" has no column: it is what a row lacks to 1.
        """
        posterior = (-self.model.beta * answer.losses).softmax(dim=1)
        return posterior[:, : len(self.names)].float()

    def _check_answer(self, answer: LayoutAnswer) -> None:
        if answer.losses.isnan().any() or math.isnan(answer.loss):
            raise ModelError(
                f"expected finite losses from {self.model.name} in {self.model.dtype}, got NaN: "
                f"its weights, its schedule or this precision cannot be right."
            )


def _classes(answer: LayoutAnswer) -> torch.Tensor:
    return torch.tensor([item.class_id for item in answer.items], dtype=torch.int64)


def _check_layout(model: Any) -> None:
    if optional(model, "layout") is None:
        raise ModelError(
            f"expected a layout-to-image model, got {model.name}, which has no layout."
        )


def _checked_weight(model: Any, prior: LayoutPrior | None, weight: float | None) -> float:
    """w; 0 without a prior."""
    if weight is not None and not (math.isfinite(weight) and weight >= 0):
        raise ModelError(f"prior_weight must be a number of at least 0, got {weight}.")
    if prior is None:
        if weight:
            raise ModelError(f"prior_weight is {weight}, but {model.name} has no prior to weigh.")
        return 0.0
    if not fits(prior, model.layout, model.vocabulary.table):
        raise ModelError(
            f"expected a prior over the layouts and the token table of {model.name}, got one of "
            "another model."
        )
    return PRIOR_WEIGHT if weight is None else float(weight)
