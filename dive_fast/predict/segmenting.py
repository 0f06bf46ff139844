"""Segmentation by classes: part of ``DiffusionClassifier``. docs/segmentation.md has the formulas.

    s_c(p) = -gamma (G_sigma * E_c)(p),    P(c | p) = softmax_c s_c(p)

E_c is the error map of class c, the loss before its mean over the places.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from PIL import Image

from dive_fast.core.loss_weights import LossWeights
from dive_fast.core.probes import ProbeList
from dive_fast.core.requests import Answer, ErrorMaps, Search
from dive_fast.core.segmentation import SegmentationRule
from dive_fast.core.timesteps import TimestepWeights
from dive_fast.engine import Finished
from dive_fast.errors import DiveFastError, ModelError, shown
from dive_fast.models.protocol import optional
from dive_fast.predict.arguments import as_pairs, as_progress
from dive_fast.predict.explaining import ClassName, check_classes, class_row
from dive_fast.predict.fitting_segmentation import Annotated, SegmentationFit, fit_rule, on_map
from dive_fast.predict.predictor import Predictor
from dive_fast.predict.segmentation import BACKGROUND, Segmentation, enlarged
from dive_fast.strategies import resolve_strategy

SIGMA = 1 / 16  # of a map's sides, as maps of classes are drawn
PROBES = 64


class Segmenting(Predictor):
    """The part of ``DiffusionClassifier`` that says which class each place shows."""

    def segment(
        self,
        images: Any = None,
        classes: Sequence[ClassName] | None = None,
        *,
        latents: torch.Tensor | None = None,
        background: bool = False,
        rule: SegmentationRule | None = None,
        probes: int | ProbeList | None = PROBES,
        seed: int = 0,
        timesteps: str | TimestepWeights | None = None,
        weights: str | LossWeights | None = None,
        progress: bool = False,
    ) -> list[Segmentation]:
        """Which of the classes each place of each picture shows.

        Args:
            images, latents: as in ``__call__``; a map of latents has their size.
            classes: names or rows, two at least; all if None.
            background: the condition "no class" competes, too.
            rule: how evidence counts; the model's fitted one, else ``SegmentationRule.for_model``
                with a Gaussian of 1/16 of the sides.
            probes: how many, or a list of your own; a picture costs one evaluation for each and
                each class.
            seed: of the probes' noise.
            timesteps, weights: as in ``__call__``.
            progress: show a bar.

        Returns:
            One ``Segmentation`` per image, of the model's own picture size.

        Raises:
            DiveFastError: bad input, an unknown class, fewer than two, or one twice.
            ModelError: a layout-to-image model, or "no class" asked of a model without it.
        """
        with torch.inference_mode(False):
            check_classes(self.model)
            x0, pictures = self._with_pictures(images, latents)
            items = ((i, x, pictures[i]) for i, x in enumerate(x0))
            settings = (classes, background, rule, probes, seed, timesteps, weights)
            found = dict(self._segment(items, *settings, len(x0) if progress else None))
        return [found[i] for i in range(len(x0))]

    def segment_stream(
        self,
        images: Iterable[tuple[Any, Any]],
        classes: Sequence[ClassName] | None = None,
        *,
        background: bool = False,
        rule: SegmentationRule | None = None,
        probes: int | ProbeList | None = PROBES,
        seed: int = 0,
        timesteps: str | TimestepWeights | None = None,
        weights: str | LossWeights | None = None,
        progress: int | None = None,
    ) -> Iterator[tuple[Any, Segmentation]]:
        """Segments images as they come; yields (key, answer). Arguments as ``segment``.

        Args:
            images: pairs of a key and an image; read lazily.
            progress: the number of images if a bar shall be shown.
        """
        check_classes(self.model)
        progress = as_progress(progress)

        def items() -> Iterator[tuple[Any, torch.Tensor, Image.Image]]:
            for key, given in as_pairs("images", images):
                x0, (picture,) = self._with_pictures(given, None)
                yield key, x0[0], picture

        settings = (classes, background, rule, probes, seed, timesteps, weights)
        yield from self._segment(items(), *settings, progress)

    def fit_segmentation(
        self,
        images: Any,
        masks: Sequence[Any],
        classes: Sequence[ClassName] | None = None,
        *,
        latents: torch.Tensor | None = None,
        background: bool = False,
        probes: int | ProbeList | None = PROBES,
        seed: int = 0,
        timesteps: str | TimestepWeights | None = None,
        weights: str | LossWeights | None = None,
        progress: bool = False,
    ) -> SegmentationFit:
        """Fits gamma, sigma and the background's log-odds to masks, and sets them on the model.

        Args:
            images, latents: as in ``__call__``.
            masks: of each image whole numbers [h, w] in the model's own picture size (of latents in
                theirs): places in ``classes``, their number for the background, -1 where nothing is
                known.
            classes, background, probes, seed, timesteps, weights, progress: as in ``segment``.

        Raises:
            DiveFastError: masks that are none, or as ``segment``.
        """
        with torch.inference_mode(False):
            check_classes(self.model)
            x0, _ = self._with_pictures(images, latents)
            rows, names, null = self._asked(classes, background)
            size = tuple(self.model.latent_shape[1:])
            expected = size if images is None else tuple(self.model.image_shape[1:])
            if not isinstance(masks, Sequence | torch.Tensor) and not hasattr(masks, "shape"):
                raise DiveFastError(f"expected a mask for each image, got {shown(masks)}.")
            if len(masks) != len(x0):
                raise DiveFastError(f"expected {len(x0)} masks, one per image, got {len(masks)}.")
            truths = [on_map(mask, expected, size, len(names)) for mask in masks]
            maps: list[Any] = [None] * len(x0)
            loss, probe_list, beta = self._probes_of_maps(probes, seed, timesteps, weights)
            jobs = ((i, x) for i, x in enumerate(x0))
            total = len(x0) if progress else None
            for done in self._maps(jobs, rows, null, probe_list, loss, total):
                maps[done.key] = -done.answer.trace["maps"]
        annotated = [
            Annotated.of(evidence, truth) for evidence, truth in zip(maps, truths, strict=True)
        ]
        fit = fit_rule(annotated, self._rule(None, beta), background)
        self.model.segmentation = fit.rule
        return fit

    def _segment(
        self,
        items: Iterable[tuple[Any, torch.Tensor, Image.Image | None]],
        classes: Sequence[ClassName] | None,
        background: bool,
        rule: SegmentationRule | None,
        probes: int | ProbeList | None,
        seed: int,
        timesteps: str | TimestepWeights | None,
        weights: str | LossWeights | None,
        progress: int | None,
    ) -> Iterator[tuple[Any, Segmentation]]:
        rows, names, null = self._asked(classes, background)
        loss, probe_list, beta = self._probes_of_maps(probes, seed, timesteps, weights)
        rule = self._rule(rule, beta)
        pictures: dict[Any, Image.Image | None] = {}

        def jobs() -> Iterator[tuple[Any, torch.Tensor]]:
            for key, x0, picture in items:
                if key in pictures:
                    raise DiveFastError(f"expected a key for each image, got {key!r} twice.")
                pictures[key] = picture
                yield key, x0

        for done in self._maps(jobs(), rows, null, probe_list, loss, progress):
            scores = rule.scores(-done.answer.trace["maps"], background)
            if not bool(scores.isfinite().all()):
                raise ModelError(
                    f"expected finite losses from {self.model.name} in {self.model.dtype}, got NaN "
                    f"or infinity: its weights, its schedule or this precision cannot be right."
                )
            picture, posterior = pictures.pop(done.key), scores.softmax(dim=0).float()
            if picture is not None:
                posterior = enlarged(posterior, list(picture.size[::-1]))
            last = len(names) - 1 if background else None
            cost = done.evaluations, done.seconds
            yield done.key, Segmentation(posterior, names, last, *cost, picture)

    def _maps(
        self,
        items: Iterable[tuple[Any, torch.Tensor]],
        rows: torch.Tensor,
        null: torch.Tensor | None,
        probes: ProbeList,
        loss: str,
        progress: int | None,
    ) -> Iterator[Finished]:
        """Error maps of classes, and last of "no class": ``answer.trace["maps"]`` [C, h, w]."""
        every = torch.arange(len(probes))
        jobs = (self._job(key, x0, _measured(rows, null, every)) for key, x0 in items)
        yield from self._run(jobs, probes, loss, progress)

    def _probes_of_maps(
        self, probes: int | ProbeList | None, seed: int, timesteps: Any, weights: Any
    ) -> tuple[str, ProbeList, float]:
        """The loss, the list of probes, and the beta that goes with their weights."""
        chosen = resolve_strategy(None, None, {})
        probe_list = self.probe_list(chosen, probes, seed, timesteps, weights)
        return chosen.loss, probe_list, self._beta(self.learned_weights(chosen, probes, weights))

    def _rule(self, rule: SegmentationRule | None, beta: float) -> SegmentationRule:
        """The given one, the model's fitted one, or what holds without a fit at this beta."""
        if not isinstance(rule, SegmentationRule | None):
            raise DiveFastError(f"rule must be a SegmentationRule or None, got {shown(rule)}.")
        rule = optional(self.model, "segmentation") if rule is None else rule
        if rule is not None:
            return rule
        shape = tuple(self.model.latent_shape[1:])
        return SegmentationRule.for_model(beta, shape, SIGMA)

    def _asked(
        self, classes: Sequence[ClassName] | None, background: bool
    ) -> tuple[torch.Tensor, tuple[str, ...], torch.Tensor | None]:
        """Rows and names of the classes, with the background last, and its condition."""
        vocabulary = self.model.vocabulary
        if not isinstance(background, bool):
            raise DiveFastError(f"background must be True or False, got {shown(background)}.")
        if classes is None:
            rows = list(range(len(vocabulary)))
        elif isinstance(classes, list | tuple):
            rows = [class_row(value, vocabulary.names) for value in classes]
        else:
            raise DiveFastError(f"expected a list of classes, got {shown(classes)}.")
        names = tuple(vocabulary.names[row] for row in rows)
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise DiveFastError(f"expected every class once, got {twice[0]!r} more than once.")
        if len(rows) + background < 2:
            what = f"{names[0]!r} alone" if names else "none"
            raise DiveFastError(f"expected two classes at least to tell apart, got {what}.")
        null = None
        if background:
            if vocabulary.unconditional is None:
                raise ModelError(
                    f"{self.model.name} has not learned a condition that means no class, which a "
                    "background needs."
                )
            null, names = vocabulary.unconditional, (*names, BACKGROUND)
        return torch.tensor(rows, dtype=torch.int64), names, null


def _measured(rows: torch.Tensor, null: torch.Tensor | None, every: torch.Tensor) -> Search:
    maps = yield ErrorMaps(rows, every)
    if null is not None:
        maps = torch.cat([maps, (yield ErrorMaps(null.reshape(1, -1), every))])
    nothing = torch.empty(0)
    return Answer(0, nothing, nothing, {"maps": maps})
