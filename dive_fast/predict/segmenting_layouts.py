"""Segmentation by layouts: part of ``LayoutDetector``. docs/segmentation.md has the formulas.

    e_i(p) = E_{y without i}(p) - E_y(p)
    q_i(p) = softmax over the background and the objects whose boxes hold p of gamma (G * e_i)(p), b
    P(c | p) = sum_i q_i(p) p(c | i)

E_y is the error map of the layout y that was found: where an object's ink is, the layout without it
expects the background and errs; beside its ink both expect that.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL import Image

from dive_fast.core.numbers import whole, whole_seed
from dive_fast.core.probes import ProbeList
from dive_fast.core.requests import ErrorMaps
from dive_fast.core.segmentation import SegmentationRule
from dive_fast.core.timesteps import TimestepWeights
from dive_fast.data.images import as_image, as_whole_images, squashed_tensor, to_mode
from dive_fast.engine import Finished, Job
from dive_fast.errors import DiveFastError, ModelError, shown
from dive_fast.models.protocol import optional
from dive_fast.predict.arguments import as_pairs, as_progress
from dive_fast.predict.detections import Detections
from dive_fast.predict.fitting_segmentation import Annotated, SegmentationFit, fit_rule, on_map
from dive_fast.predict.predictor import Predictor
from dive_fast.predict.segmentation import BACKGROUND, Segmentation, enlarged
from dive_fast.strategies.layout import (
    Board,
    Box,
    Item,
    LayoutAnswer,
    LayoutStrategy,
    resolve_layout_strategy,
)
from dive_fast.strategies.layout.board import Items, Steps, without

SIGMA = 1 / 64  # of a map's sides: a box gathers evidence already
# Log-odds of the background at a place of a box that says nothing; chosen on training scenes, where
# the best of 0 to 4 lay between 1 and 1.5.
EMPTY = 1.0
MAP_PROBES = 8  # on scenes 32 gave masks that were hardly better


class LayoutSegmenting(Predictor):
    """The part of ``LayoutDetector`` that says which places an object covers."""

    def segment(
        self,
        images: Any,
        *,
        detections: Sequence[Detections] | None = None,
        rule: SegmentationRule | None = None,
        map_probes: int = MAP_PROBES,
        strategy: str | LayoutStrategy | None = None,
        probes: int | ProbeList | None = None,
        seed: int = 0,
        timesteps: str | TimestepWeights | None = None,
        progress: bool = False,
        **settings: Any,
    ) -> list[Segmentation]:
        """Which class, or the background, each place of each picture shows.

        Args:
            images: as in ``__call__``.
            detections: the objects of each image, in its pixels, where they are known; else they
                are searched for first, as ``__call__`` does.
            rule: how evidence counts; the model's fitted one, else ``SegmentationRule.for_model``
                with a Gaussian of 1/64 of the sides and log-odds of 1 for the background.
            map_probes: of the maps, the first so many of the search's; they cost one evaluation
                each for the layout and for every object.
            strategy, probes, seed, timesteps, settings: of the search and its list of probes.
            progress: show a bar.

        Returns:
            One ``Segmentation`` per image, of the image's own size; the background is the last row.

        Raises:
            DiveFastError: bad input, or as ``__call__``.
        """
        with torch.inference_mode(False):
            pictures = as_whole_images(images, self.model.image_shape[0])
            known = _by_image(detections, len(pictures))
            stream = self.segment_stream(
                enumerate(pictures),
                detections=known,
                rule=rule,
                map_probes=map_probes,
                strategy=strategy,
                probes=probes,
                seed=seed,
                timesteps=timesteps,
                progress=len(pictures) if progress else None,
                **settings,
            )
            found = dict(stream)
        return [found[i] for i in range(len(pictures))]

    def segment_stream(
        self,
        images: Iterable[tuple[Any, Any]],
        *,
        detections: Mapping[Any, Detections] | None = None,
        rule: SegmentationRule | None = None,
        map_probes: int = MAP_PROBES,
        progress: int | None = None,
        **search: Any,
    ) -> Iterator[tuple[Any, Segmentation]]:
        """Segments images as they come; yields (key, answer). Arguments as ``segment``.

        Args:
            images: pairs of a key and an image; read lazily.
            detections: by the same keys.
            progress: the number of images if a bar shall be shown.
        """
        rule = self._segmentation_rule(rule)
        stream = self._object_maps(images, detections, map_probes, progress, **search)
        for done, picture in stream:
            yield done.key, self._segmentation(done, picture, rule)

    def fit_segmentation(
        self,
        images: Any,
        masks: Sequence[Any],
        *,
        detections: Sequence[Detections] | None = None,
        map_probes: int = MAP_PROBES,
        progress: bool = False,
        **search: Any,
    ) -> SegmentationFit:
        """Fits gamma, sigma and the background's log-odds to masks, and sets them on the model.

        Args:
            images, detections, map_probes, progress, search: as in ``segment``. Annotated boxes as
                ``detections`` make a fit that costs few evaluations.
            masks: of each image whole numbers [h, w] of its size: rows of ``names``, their number
                for the background, -1 where nothing is known. Places of a class that no box around
                them has take no part.

        Raises:
            DiveFastError: masks that are none, or as ``segment``.
        """
        with torch.inference_mode(False):
            pictures = as_whole_images(images, self.model.image_shape[0])
            if not hasattr(masks, "__len__") or len(masks) != len(pictures):
                got = len(masks) if hasattr(masks, "__len__") else shown(masks)
                raise DiveFastError(f"expected {len(pictures)} masks, one per image, got {got}.")
            size, n = tuple(self.model.latent_shape[1:]), len(self.names)
            truths = [
                on_map(mask, picture.size[::-1], size, n + 1)
                for mask, picture in zip(masks, pictures, strict=True)
            ]
            known = _by_image(detections, len(pictures))
            total = len(pictures) if progress else None
            annotated = []
            stream = self._object_maps(enumerate(pictures), known, map_probes, total, **search)
            for done, _ in stream:
                answer, truth = done.answer, truths[done.key]
                classes = torch.tensor([*(item.class_id for item in answer.items), n])
                right = classes[:, None, None] == truth
                evidence = _evidence(answer.trace["maps"])
                annotated.append(Annotated(evidence, self._possible(answer.items), right))
        fit = fit_rule(annotated, self._segmentation_rule(None), background=True)
        self.model.segmentation = fit.rule
        return fit

    def _object_maps(
        self,
        images: Iterable[tuple[Any, Any]],
        detections: Mapping[Any, Detections] | None,
        map_probes: int,
        progress: int | None,
        *,
        strategy: str | LayoutStrategy | None = None,
        probes: int | ProbeList | None = None,
        seed: int = 0,
        timesteps: str | TimestepWeights | None = None,
        **settings: Any,
    ) -> Iterator[tuple[Finished, Image.Image]]:
        """Answers whose trace has the error maps of the layout and of it without each object."""
        progress, map_probes = as_progress(progress), whole("map_probes", map_probes, 1)
        chosen = resolve_layout_strategy(strategy, settings)
        probe_list = self.probe_list(chosen, probes, seed, timesteps)
        every = torch.arange(min(map_probes, len(probe_list)))
        model, penalty = self.model, self._penalty(whole_seed(seed))
        board = Board(model.vocabulary.table, model.layout_format, probe_list, seed, penalty)
        pictures: dict[Any, Image.Image] = {}

        def jobs() -> Iterator[Job]:
            channels, side, _ = model.image_shape
            for key, given in as_pairs("images", images):
                if key in pictures:
                    raise DiveFastError(f"expected a key for each image, got {key!r} twice.")
                picture = pictures[key] = to_mode(as_image(given), channels)
                if detections is None:
                    search = chosen.search(board)
                else:
                    search = _given(self._answer_of(detections[key], picture.size))
                x0 = self.encode_pixels(squashed_tensor(picture, side, channels)[None])[0]
                yield self._job(key, x0, _with_maps(board, search, every))

        for done in self._run(jobs(), probe_list, chosen.loss, progress):
            maps = done.answer.trace["maps"]
            if detections is None:
                self._check_answer(done.answer)
            if not bool(maps.isfinite().all()):
                raise ModelError(
                    f"expected finite losses from {model.name} in {model.dtype}, got NaN or "
                    "infinity: its weights, its schedule or this precision cannot be right."
                )
            yield done, pictures.pop(done.key)

    def _answer_of(self, found: Detections, size: tuple[int, int]) -> LayoutAnswer:
        """Given objects on the model's grid, with their class probabilities in the trace."""
        form = self.model.layout_format
        if not isinstance(found, Detections):
            raise DiveFastError(f"expected Detections of each image, got {shown(found)}.")
        if tuple(found.names) != tuple(self.names):
            raise DiveFastError("expected detections with the model's own classes, got others.")
        if len(found) > form.max_objects:
            raise DiveFastError(
                f"expected at most {form.max_objects} objects, got {len(found)} detections."
            )
        steps = form.grid - 1
        sides = (found.xyxy / torch.tensor([*size, *size]) * steps).round().long().clamp(0, steps)
        # A box narrower than a step becomes one of a step.
        low = sides[:, :2].clamp(max=steps - 1)
        high = torch.maximum(sides[:, 2:], low + 1)
        boxes = torch.cat([low, high], dim=1).tolist()
        classes = found.class_id.tolist()
        items = tuple(Item(c, Box(*box)) for c, box in zip(classes, boxes, strict=True))
        table = found.class_probabilities
        if table is None:
            table = torch.nn.functional.one_hot(found.class_id, len(self.names)).float()
        return LayoutAnswer(items, torch.empty(0), 0.0, {"classes": table})

    def _segmentation(
        self, done: Finished, picture: Image.Image, rule: SegmentationRule
    ) -> Segmentation:
        answer: LayoutAnswer = done.answer
        scores = rule.scores(_evidence(answer.trace["maps"]), background=True)
        q = scores.masked_fill(~self._possible(answer.items), -torch.inf).softmax(dim=0)
        table = answer.trace.get("classes")
        table = (self._class_probabilities(answer) if table is None else table).double()
        # What an object's classes lack to 1 is "not there".
        table = torch.cat([table, (1 - table.sum(dim=1, keepdim=True)).clamp_min(0)], dim=1)
        nothing = torch.zeros(1, table.shape[1], dtype=torch.float64)
        nothing[0, -1] = 1
        posterior = torch.einsum("nhw,nc->chw", q, torch.cat([table, nothing]))
        posterior = (posterior / posterior.sum(dim=0)).float()
        names, background = (*self.names, BACKGROUND), len(self.names)
        found = enlarged(posterior, list(picture.size[::-1]))
        return Segmentation(found, names, background, done.evaluations, done.seconds, picture)

    def _possible(self, items: Items) -> torch.Tensor:
        """bool [n + 1, h, w]: whose boxes hold a place's centre; the background is everywhere."""
        _, h, w = self.model.latent_shape
        steps = self.model.layout_format.grid - 1
        x, y = ((torch.arange(side) + 0.5) / side * steps for side in (w, h))
        found = torch.ones(len(items) + 1, h, w, dtype=torch.bool)
        for i, item in enumerate(items):
            box = item.box
            down, across = (y > box.top) & (y < box.bottom), (x > box.left) & (x < box.right)
            found[i] = down[:, None] & across
        return found

    def _segmentation_rule(self, rule: SegmentationRule | None) -> SegmentationRule:
        """The given one, the model's fitted one, or what holds without a fit."""
        if not isinstance(rule, SegmentationRule | None):
            raise DiveFastError(f"rule must be a SegmentationRule or None, got {shown(rule)}.")
        rule = optional(self.model, "segmentation") if rule is None else rule
        if rule is not None:
            return rule
        shape = tuple(self.model.latent_shape[1:])
        return SegmentationRule.for_model(self.model.inverse_temperature, shape, SIGMA, EMPTY)


def _evidence(maps: torch.Tensor) -> torch.Tensor:
    """e [n + 1, h, w] of the maps of the layout and of it without each of n objects; 0 is last."""
    return torch.cat([maps[1:] - maps[:1], torch.zeros_like(maps[:1])])


def _with_maps(board: Board, search: Steps, probe_ids: torch.Tensor) -> Steps:
    """A search, and then the error maps of its layout and of it without each object."""
    answer = yield from search
    layouts = [answer.items, *(without(answer.items, i) for i in range(len(answer.items)))]
    maps = yield ErrorMaps(board.conditions(layouts).flatten(1), probe_ids)
    return replace(answer, trace={**answer.trace, "maps": maps})


def _given(answer: LayoutAnswer) -> Steps:
    """A search that knows its answer."""
    return answer
    yield


def _by_image(detections: Any, n: int) -> dict[int, Detections] | None:
    if detections is None:
        return None
    if not isinstance(detections, list | tuple) or len(detections) != n:
        got = len(detections) if isinstance(detections, list | tuple) else shown(detections)
        raise DiveFastError(f"expected detections of each of {n} images, got {got}.")
    return dict(enumerate(detections))
