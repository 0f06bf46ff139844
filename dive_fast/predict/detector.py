"""The detector that users call: the layout that best explains an image."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from dive_fast.core.numbers import whole, whole_seed
from dive_fast.core.probes import MOST_PROBES, ProbeList
from dive_fast.core.timesteps import TimestepWeights
from dive_fast.data.images import as_image, as_whole_images, squashed_tensor
from dive_fast.engine import EngineOptions, Finished, Job
from dive_fast.errors import DiveFastError, ModelError, shown
from dive_fast.models import Source, check_place, load_model, resolve
from dive_fast.models.protocol import optional
from dive_fast.models.text.prompts import Classes
from dive_fast.predict.arguments import as_pairs, as_progress, is_finite
from dive_fast.predict.detections import Detections
from dive_fast.predict.diagnosing import Diagnosing
from dive_fast.predict.layout_choice import counted
from dive_fast.predict.segmenting_layouts import LayoutSegmenting
from dive_fast.priors import LayoutPenalty, LayoutPrior, fits, load_prior
from dive_fast.strategies.layout import (
    Board,
    LayoutAnswer,
    LayoutStrategy,
)

# The pseudo-likelihood meets what two tokens have to do with each other twice.
PRIOR_WEIGHT = 0.5
PRIOR_PROBES = 8


class LayoutDetector(Diagnosing, LayoutSegmenting):
    """A frozen layout-to-image diffusion model as object detector.

    Args:
        model: of the family "layout-to-image", or anything that follows
            ``dive_fast.models.protocol.Model`` and has a ``layout``.
        prior: over the layouts of this model; None for none.
        prior_weight: w, of the prior's log p(y) beside -beta L; if None 0.5, but 0 as long as the
            model's beta is not fitted: w / beta might then hide every object. With 0 the prior is
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
        if not isinstance(model, type):
            _check_layout(model)
        super().__init__(model, batch_size=batch_size, options=options)
        self.prior = prior
        self._prior_weight = _checked_weight(model, prior, prior_weight)
        self.prior_probes = prior_probes
        if prior is not None:
            prior.to(model.device)
            # Says what is wrong with the number of probes.
            LayoutPenalty(prior, PRIOR_WEIGHT, prior_probes, model.layout_format)
        self.prior_probes = whole("prior_probes", prior_probes, 1, MOST_PROBES)

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
        variant: str | None = None,
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
        check_place(dtype, device)
        source = resolve(source, allow_pickle=allow_pickle, variant=variant)
        model = load_model(
            source,
            dtype=dtype,
            device=device,
            allow_pickle=allow_pickle,
            variant=variant,
            classes=classes,
            templates=templates,
        )
        _check_layout(model)
        if prior == "auto":
            prior = source.prior
        if prior is not None:
            prior = load_prior(prior, model.layout_format, model.vocabulary.table)
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
        return self.model.layout_format.names

    @property
    def prior_weight(self) -> float:
        """w: what was given, else what was fitted, else 0.5; 0 without a prior or a fitted beta."""
        if self._prior_weight is not None:
            return self._prior_weight
        if self.prior is None or not self._beta_is_fitted:
            return 0.0
        rule = optional(self.model, "detection")
        fitted = None if rule is None else rule.prior_weight
        return PRIOR_WEIGHT if fitted is None else fitted

    @property
    def prior_is_left_out(self) -> bool:
        """Whether there is a prior that does not count because beta, its unit, is not fitted."""
        return self.prior is not None and self._prior_weight is None and not self._beta_is_fitted

    @property
    def prior_out_of_proportion(self) -> bool:
        """Whether a prior has a weight by the caller's will though beta is not fitted."""
        return self.prior is not None and self.prior_weight > 0 and not self._beta_is_fitted

    @property
    def _beta_is_fitted(self) -> bool:
        unfitted = math.prod(self.model.latent_shape) / 2  # what models begin with
        return self.model.inverse_temperature != unfitted

    def __call__(
        self,
        images: Any,
        *,
        strategy: str | LayoutStrategy | None = None,
        probes: int | ProbeList | None = None,
        seed: int = 0,
        timesteps: str | TimestepWeights | None = None,
        trace: bool = False,
        progress: bool = False,
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
            timesteps: as for ``DiffusionClassifier``.
            trace: keep on each answer what the strategy saw.
            progress: show a bar.
            settings: of the strategy, by name.

        Returns:
            One ``Detections`` per image, in their order, boxes in pixels of each image.

        Raises:
            DiveFastError: bad input, an unknown strategy or setting.
        """
        with torch.inference_mode(False):
            pictures = as_whole_images(images, self.model.image_shape[0])
            stream = self.stream(
                enumerate(pictures),
                strategy=strategy,
                probes=probes,
                seed=seed,
                timesteps=timesteps,
                trace=trace,
                progress=len(pictures) if progress else None,
                **settings,
            )
            found = dict(stream)
        return [found[i] for i in range(len(pictures))]

    def stream(
        self,
        images: Iterable[tuple[Any, Any]],
        *,
        strategy: str | LayoutStrategy | None = None,
        probes: int | ProbeList | None = None,
        seed: int = 0,
        timesteps: str | TimestepWeights | None = None,
        trace: bool = False,
        progress: int | None = None,
        **settings: Any,
    ) -> Iterator[tuple[Any, Detections]]:
        """Detects in images as they come and yields (key, detections) as soon as they are found.

        Args:
            images: pairs of a key and an image as ``__call__`` takes one; read lazily.
            progress: the number of images if a bar shall be shown.

        The other arguments are those of ``__call__``; boxes are in pixels of each image.
        """
        stream = self._search(
            images,
            strategy=strategy,
            probes=probes,
            seed=seed,
            timesteps=timesteps,
            penalty=self._penalty(whole_seed(seed)),
            progress=progress,
            **settings,
        )
        for finished, size in stream:
            yield finished.key, self._detections(finished, size, trace)

    def _search(
        self,
        images: Iterable[tuple[Any, Any]],
        *,
        strategy: str | LayoutStrategy | None = None,
        probes: int | ProbeList | None = None,
        seed: int = 0,
        timesteps: str | TimestepWeights | None = None,
        penalty: LayoutPenalty | None = None,
        progress: int | None = None,
        **settings: Any,
    ) -> Iterator[tuple[Finished, tuple[int, int]]]:
        """As ``stream``, with the losses of every object.

        Args:
            penalty: the prior's part of the loss, None for none.

        Yields:
            What the engine finished, whose ``answer`` is a ``LayoutAnswer``, and the size of the
            image (width, height).
        """
        progress = as_progress(progress)
        chosen = self.layout_strategy(strategy, settings)
        probe_list = self.probe_list(chosen, probes, seed, timesteps)
        chosen = counted(chosen, probe_list)
        model = self.model
        board = Board(model.vocabulary.table, model.layout_format, probe_list, seed, penalty)
        sizes: dict[Any, tuple[int, int]] = {}

        def jobs() -> Iterator[Job]:
            channels, side, _ = model.image_shape
            for key, given in as_pairs("images", images):
                if key in sizes:
                    raise DiveFastError(f"expected a key for each image, got {key!r} twice.")
                image = as_image(given)
                sizes[key] = image.size
                x0 = self.encode_pixels(squashed_tensor(image, side, channels)[None])[0]
                yield self._job(key, x0, chosen.search(board))

        for finished in self._run(jobs(), probe_list, chosen.loss, progress):
            self._check_answer(finished.answer)
            yield finished, sizes.pop(finished.key)

    def _detections(self, finished: Finished, size: tuple[int, int], trace: bool) -> Detections:
        answer: LayoutAnswer = finished.answer
        classes = torch.tensor([item.class_id for item in answer.items], dtype=torch.int64)
        probabilities = self._class_probabilities(answer)
        return Detections(
            self.boxes(answer, size),
            classes,
            probabilities.gather(1, classes[:, None])[:, 0],
            self.names,
            probabilities,
            finished.evaluations,
            finished.seconds,
            answer.trace if trace else None,
            str(answer.trace["nothing"]) if "nothing" in answer.trace else None,
        )

    def boxes(self, answer: LayoutAnswer, size: tuple[int, int]) -> torch.Tensor:
        """The boxes of an answer in pixels of an image (width, height), float32 xyxy [n, 4]."""
        sides = torch.tensor([item.box for item in answer.items], dtype=torch.float32)
        return sides.view(-1, 4) * (
            torch.tensor([*size, *size]) / (self.model.layout_format.grid - 1)
        )

    def identity(
        self,
        *,
        strategy: str | LayoutStrategy | None = None,
        probes: int | ProbeList | None = None,
        seed: int = 0,
        timesteps: str | TimestepWeights | None = None,
    ) -> dict[str, Any]:
        """What decides the answers, for JSON: model, search, probes, seed and prior."""
        chosen = self.layout_strategy(strategy, {})
        probes = self._count(probes, chosen)
        chosen = counted(chosen, self.probe_list(chosen, probes, seed, timesteps))
        found = self._identity(chosen, probes, seed, timesteps)
        # What is not asked for is not said, so that a new setting leaves old runs what they are.
        found["strategy"] = {k: v for k, v in found["strategy"].items() if v is not None}
        if (penalty := self._penalty(whole_seed(seed))) is not None:
            # Its weight there is w / beta.
            found["prior"] = {**penalty.identity(), "weight": self.prior_weight}
        return found

    def _penalty(self, seed: int) -> LayoutPenalty | None:
        """The prior's part of the loss, where there is a prior that counts."""
        if self.prior is None or self.prior_weight == 0:
            return None
        weight = self.prior_weight / self.model.inverse_temperature
        return LayoutPenalty(self.prior, weight, self.prior_probes, self.model.layout_format, seed)

    def _class_probabilities(self, answer: LayoutAnswer) -> torch.Tensor:
        """Of each object, the posterior of all classes that it could be, float32 [n, C].

        p(c | rest, x0) = softmax over classes and "not there" of -beta L

        "Not there" has no column: it is what a row lacks to 1.
        """
        posterior = (-self.model.inverse_temperature * answer.losses).softmax(dim=1)
        return posterior[:, : len(self.names)].float()

    def _check_answer(self, answer: LayoutAnswer) -> None:
        if answer.losses.isnan().any() or math.isnan(answer.loss):
            raise ModelError(
                f"expected finite losses from {self.model.name} in {self.model.dtype}, got NaN: "
                f"its weights, its schedule or this precision cannot be right."
            )


def _check_layout(model: Any) -> None:
    if optional(model, "layout_format") is None:
        raise ModelError(
            "expected a layout-to-image model, got "
            f"{getattr(model, 'name', type(model).__name__)}, which has no layout."
        )


def _checked_weight(model: Any, prior: LayoutPrior | None, weight: float | None) -> float | None:
    """w as it was given; None for the default."""
    if weight is not None and not (is_finite(weight) and weight >= 0):
        raise ModelError(f"prior_weight must be a number of at least 0, got {shown(weight)}.")
    if not isinstance(prior, LayoutPrior | None):
        raise ModelError(f"expected a LayoutPrior or None as prior, got {shown(prior)}.")
    if prior is None:
        if weight:
            raise ModelError(f"prior_weight is {weight}, but {model.name} has no prior to weigh.")
        return None
    if not fits(prior, model.layout_format, model.vocabulary.table):
        raise ModelError(
            f"expected a prior over the layouts and the token table of {model.name}, got one of "
            "another model."
        )
    return None if weight is None else float(weight)
