"""What a detector learns from annotated images: how sure it may be of its objects."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import torch

from dive_fast.core.detection import DetectionRule, Size
from dive_fast.data.coco import (
    CocoDataset,
    CocoImage,
    Id,
    class_categories,
    expect_fitting_images,
    mirrored_images,
)
from dive_fast.data.coco.readable import readable
from dive_fast.errors import DiveFastError, shown
from dive_fast.predict.arguments import as_probes
from dive_fast.predict.calibration import Calibration, calibrate
from dive_fast.predict.fitting_layout_timesteps import LayoutTimestepFitting
from dive_fast.predict.fitting_search import (
    LEAST_MARGIN,
    Observed,
    SearchFit,
    choose_margin,
    choose_weight,
    f1,
    judge_margin,
    searches,
    usual_sizes,
)
from dive_fast.predict.matching import match
from dive_fast.priors import LayoutPenalty
from dive_fast.strategies.layout import Board, Items, LayoutAnswer
from dive_fast.strategies.layout.board import with_class, without
from dive_fast.strategies.layout.nothing import Nothing
from dive_fast.strategies.layout.scan import scanned

log = logging.getLogger(__name__)
LAPSE = 0.05  # share of objects at places where the search went astray, whatever their losses


class DetectorFitting(LayoutTimestepFitting):
    """The part of ``LayoutDetector`` that fits values to the frozen model."""

    def calibrate(self, data: CocoDataset, *, progress: bool = False, **search: Any) -> Calibration:
        """Fits the model's ``beta`` to annotated images, for confidences that can be believed.

        Every object that the search found is labelled with the class of the annotated one that it
        finds (intersection over union at least 0.5, each annotated one once), or with "not there";
        beta gives these labels the highest likelihood under

            p(c | rest, x0) = softmax over classes and "not there" of -beta L

        but for one in twenty that the losses need not explain (``fit_beta_with_lapses``).

        Objects that find a crowd, or an object of a class that the model lacks, take no part. Beta
        is set on the model; ``save_fitted`` keeps it. It suits the search that it was fitted with.
        That search goes without the prior, whose weight depends on beta.

        Args:
            data: images and annotated boxes; classes are matched by name. Images that cannot be
                read are left out, with a warning on the logger ``dive_fast``.
            progress: show a bar.
            **search: strategy, probes, seed, timesteps and settings, as for the detector.

        Returns:
            beta, expected calibration error and likelihood, before and after.

        Raises:
            DataError: the detector knows none of the classes, nothing is annotated, or all images
                have another size than annotated.
            DiveFastError: no objects were found, or bad input as in ``LayoutDetector``.
        """
        observed = self._observed(data, progress, search, None)
        beta = self.model.inverse_temperature
        record = calibrate(observed.losses, observed.labels, beta, observed.answers, LAPSE)
        self.model.inverse_temperature = record.beta_after
        return dataclasses.replace(record, counted="objects")

    def fit_search(self, data: CocoDataset, *, progress: bool = False, **search: Any) -> SearchFit:
        """Fits what counts as found to annotated images: beta, the margin and the prior's weight.

        One search with a margin of 0.002 and without the prior finds more than there is, others
        have larger margins, with and without a scan of windows; which of what they find is right
        decides all of it (``predict.fitting_search``). They are set on the model, ``save_fitted``
        keeps them. A search that is given no margin or sizes takes the fitted ones, and as many
        probes as the fit had.

        Args, Raises: as ``calibrate``.
        """
        strategy = self.layout_strategy(search.pop("strategy", None), settings_of(search))
        probes = self._count(as_probes(search.get("probes")), strategy)
        fits: list[SearchFit] = []
        errors: list[DiveFastError] = []
        for each in searches(strategy, self._usual_sizes(data)):
            try:
                fits.append(self._fit_of_search(data, progress, {**search, "strategy": each}))
            except DiveFastError as error:  # the other may have found what a fit can be made of
                errors.append(error)
        if not fits:
            raise errors[0]
        fit = max(fits, key=lambda found: f1(found.precision, found.recall))
        self.model.inverse_temperature = fit.calibration.beta_after
        count = probes if isinstance(probes, int) else None
        self.model.detection = DetectionRule(
            fit.margin, fit.prior_weight, count, fit.sizes or None, fit.final_margin
        )
        return fit

    def _usual_sizes(self, data: Any) -> tuple[Size, ...]:
        """Those of annotated objects of known classes that are not too small for a scan."""
        known = enumerate(class_categories(_dataset(data), self.names))
        sizes = usual_sizes(data, {number: c for c, number in known if number is not None})
        return scanned(sizes, self.model.layout_format.grid)

    def _fit_of_search(
        self, data: CocoDataset, progress: bool, search: dict[str, Any]
    ) -> SearchFit:
        """What one search says; the margin of one that was not generous stays."""
        penalty = self._nats_of_prior() if self.prior is not None else None
        observed = self._observed(data, progress, search, penalty)
        beta = self.model.inverse_temperature
        record = calibrate(observed.losses, observed.labels, beta, observed.answers, LAPSE)
        beta, weight = record.beta_after, choose_weight(observed, record.beta_after, LAPSE)
        margin, final = getattr(search["strategy"], "margin", LEAST_MARGIN), None
        sizes = getattr(search["strategy"], "sizes", None) or ()
        if margin == LEAST_MARGIN:
            margin, precision, recall = choose_margin(observed, beta, weight)
        elif sizes:
            line, precision, recall = choose_margin(observed, beta, weight)
            final = max(margin, line)
        else:
            precision, recall = judge_margin(observed, beta, weight, margin)
        record = dataclasses.replace(record, counted="objects")
        counts = observed.annotated, observed.images
        return SearchFit(record, margin, weight, sizes, final, precision, recall, *counts)

    def _observed(
        self,
        data: CocoDataset,
        progress: bool,
        search: dict[str, Any],
        penalty: LayoutPenalty | None,
    ) -> Observed:
        """What a search without a prior finds in annotated images, and what it is.

        Args:
            penalty: -log p of layouts in nats, to be asked of what was found; None for no prices.
        """
        _dataset(data).expect_objects("to fit beta to")
        categories = class_categories(data, self.names)
        expect_fitting_images(data)
        if (mirrored := mirrored_images(data)) is not None:
            log.warning(mirrored)
        class_of = {number: c for c, number in enumerate(categories) if number is not None}
        renamed = torch.tensor([class_of.get(number, -1) for number in data.category_ids])
        images = {image.id: image for image in data.images}
        table, form = self.model.vocabulary.table, self.model.layout_format
        priced = None if penalty is None else Board(table, form, None, 0, penalty)
        losses, labels, answers, costs, annotated, searched = [], [], [], [], 0, 0
        empty: dict[Id, Nothing] = {}
        total = len(images) if progress else None
        for finished, size in self._search(readable(data.images), progress=total, **search):
            answer: LayoutAnswer = finished.answer
            image = images[finished.key]
            found = _labels(answer, self.boxes(answer, size), image, renamed)
            known = found >= 0
            if (nothing := answer.trace.get("nothing")) is not None:
                empty[finished.key] = nothing
            losses.append(answer.losses[known])
            labels.append(found[known])
            answers.append(torch.tensor([i.class_id for i in answer.items]).long()[known])
            if priced is not None:
                costs.append(_prices(priced, answer.items)[known])
            annotated += int(((renamed[image.class_ids] >= 0) & ~image.crowd).sum())
            searched += 1
        if not any(map(len, labels)):
            raise DiveFastError(
                f"beta needs objects that the detector found, got none in {data.source}"
                f"{_best_reason(empty)}."
            )
        return Observed(
            torch.cat(losses),
            torch.cat(labels),
            torch.cat(answers),
            torch.cat(costs) if costs else None,
            annotated,
            searched,
        )

    def _nats_of_prior(self) -> LayoutPenalty:
        """-log p of layouts, in nats."""
        return LayoutPenalty(self.prior, 1.0, self.prior_probes, self.model.layout_format)


def _dataset(data: Any) -> CocoDataset:
    """The data set that was given.

    Raises:
        DiveFastError: it is none.
    """
    if not isinstance(data, CocoDataset):
        raise DiveFastError(f"expected a CocoDataset to calibrate on, got {shown(data)}.")
    return data


def settings_of(search: dict[str, Any]) -> dict[str, Any]:
    """Takes the settings of the strategy out of what was given for the search."""
    names = [name for name in search if name not in ("probes", "timesteps", "seed")]
    return {name: search.pop(name) for name in names}


def _prices(board: Board, items: Items) -> torch.Tensor:
    """What a layout costs with every class for object i, and last without it: [n, C + 1]."""
    n = len(board.layout_format.names)
    layouts = [
        layout
        for i in range(len(items))
        for layout in (*(with_class(items, i, c) for c in range(n)), without(items, i))
    ]
    return board.price(layouts).view(-1, n + 1) if layouts else torch.empty(0, n + 1)


def _best_reason(empty: dict[Id, Nothing]) -> str:
    """What stood against an object in the image where least did; nothing where none is known."""
    if not empty:
        return ""
    key = max(empty, key=lambda key: empty[key].share)
    return f": in image {key}, which was nearest to one, {empty[key]}"


def _labels(
    answer: LayoutAnswer, boxes: torch.Tensor, image: CocoImage, renamed: torch.Tensor
) -> torch.Tensor:
    """The class of the annotated object that each object finds, C for none, -1 for no label."""
    nothing = answer.losses.shape[1] - 1
    # What a removed object costs orders objects as their confidence does, at every beta.
    worth = answer.losses[:, -1] - answer.losses[:, :-1].min(dim=1).values
    found = match(boxes, worth, image.boxes)
    of_truth = torch.where(image.crowd, -1, renamed[image.class_ids])
    return torch.cat([of_truth, torch.tensor([nothing])])[found]  # -1 is the last one
