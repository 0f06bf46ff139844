"""What a detector learns from annotated images: how sure it may be of its objects."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from PIL import Image

from dive_fast.data.coco import (
    CocoDataset,
    CocoImage,
    Id,
    class_categories,
    expect_fitting_images,
    mirrored_images,
)
from dive_fast.data.images import to_mode
from dive_fast.errors import DiveFastError, ImageError, shown
from dive_fast.predict.calibration import Calibration, calibrate
from dive_fast.predict.matching import match
from dive_fast.predict.predictor import Predictor
from dive_fast.strategies.layout import LayoutAnswer
from dive_fast.strategies.layout.nothing import Nothing

log = logging.getLogger(__name__)
LAPSE = 0.05  # share of objects at places where the search went astray, whatever their losses


class DetectorFitting(Predictor):
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
        if not isinstance(data, CocoDataset):
            raise DiveFastError(f"expected a CocoDataset to calibrate on, got {shown(data)}.")
        data.expect_objects("to fit beta to")
        categories = class_categories(data, self.names)
        expect_fitting_images(data)
        if (mirrored := mirrored_images(data)) is not None:
            log.warning(mirrored)
        class_of = {number: c for c, number in enumerate(categories) if number is not None}
        renamed = torch.tensor([class_of.get(number, -1) for number in data.category_ids])
        images = {image.id: image for image in data.images}
        losses, labels, answers, empty = [], [], [], {}
        total = len(images) if progress else None
        for finished, size in self._search(readable(data.images), progress=total, **search):
            answer: LayoutAnswer = finished.answer
            found = _labels(answer, self.boxes(answer, size), images[finished.key], renamed)
            known = found >= 0
            if (nothing := answer.trace.get("nothing")) is not None:
                empty[finished.key] = nothing
            losses.append(answer.losses[known])
            labels.append(found[known])
            answers.append(torch.tensor([i.class_id for i in answer.items]).long()[known])
        if not any(map(len, labels)):
            raise DiveFastError(
                f"beta needs objects that the detector found, got none in {data.source}"
                f"{_best_reason(empty)}."
            )
        beta = self.model.inverse_temperature
        record = calibrate(torch.cat(losses), torch.cat(labels), beta, torch.cat(answers), LAPSE)
        self.model.inverse_temperature = record.beta_after
        return dataclasses.replace(record, counted="objects")


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


def readable(images: Iterable[CocoImage]) -> Iterator[tuple[Id, Image.Image]]:
    """Ids and pictures in RGB; what cannot be read is left out with a warning."""
    for image in images:
        try:
            yield image.id, to_mode(image.read(), 3)
        except ImageError as error:
            log.warning(error)
