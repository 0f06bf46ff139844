"""The twelve COCO numbers of boxes, computed by pycocotools."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dive_fast.core.numbers import is_number
from dive_fast.data.coco import CocoDataset, Id, as_id
from dive_fast.data.coco.ids import in_order
from dive_fast.errors import DataError, DiveFastError

# In pycocotools' order.
NAMES = (
    "AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large",
    "AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large",
)  # fmt: skip
_RESULT_KEYS = ("image_id", "category_id", "bbox", "score")


@dataclass(frozen=True)
class BoxScores:
    """Scores of one set of results; None stands for what no annotated box supports.

    Attributes:
        numbers: AP (the mean over IoU 0.50, 0.55 ... 0.95), AP50, AP75, AP by size, AR with 1, 10
            and 100 detections an image, AR by size; in [0, 1].
        classes: AP of each class by name.
    """

    numbers: dict[str, float | None]
    classes: dict[str, float | None]


def score(dataset: CocoDataset, results: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """The twelve COCO numbers as a dictionary, ``"AP"`` first; see ``score_boxes``."""
    return score_boxes(dataset, results).numbers


def score_boxes(
    dataset: CocoDataset,
    results: Sequence[Mapping[str, Any]],
    image_ids: Iterable[Id] | None = None,
) -> BoxScores:
    """Scores COCO results by pycocotools' ``COCOeval``, whose printing is held back.

    Images and categories are numbered for it in the order of their ids, because it sorts ids in a
    numpy array, where numbers beside texts become texts and large ones lose digits.

    Args:
        dataset: the annotated boxes, with the areas and crowds of their file.
        results: ``[{"image_id", "category_id", "bbox", "score"}, ...]``, as of
            ``Detections.to_coco``; may be empty. Categories that the data set does not have are
            not looked at.
        image_ids: score these images only; by default all of the data set.

    Raises:
        DataError: a result that is none, or a result or an id of an image that the data set does
            not have.
        DiveFastError: pycocotools is not installed.
    """
    coco_class, eval_class = pycocotools()
    images = _numbered(image.id for image in dataset.images)
    categories = _numbered(dataset.category_ids)
    chosen = set(images.values())
    if image_ids is not None:
        chosen = {images[_known_image(image_id, images)] for image_id in image_ids}
    results = [_renamed(_checked(result, images), images, categories) for result in results]
    results = [result for result in results if result["category_id"] is not None]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = coco_class()
        truth.dataset = _numbered_truth(dataset, images, categories)
        truth.createIndex()
        if results:
            found = truth.loadRes(results)
        else:  # loadRes looks at the first result to know its kind
            found = coco_class()
            found.dataset = {**truth.dataset, "annotations": []}
            found.createIndex()
        run = eval_class(truth, found, "bbox")
        run.params.imgIds = sorted(chosen)
        run.evaluate()
        run.accumulate()
        run.summarize()
    # [IoU threshold, recall, class, area, detections]: all areas, up to 100 detections
    precision = run.eval["precision"][:, :, :, 0, -1]
    per_class = {number: _mean(precision[:, :, k]) for k, number in enumerate(run.params.catIds)}
    return BoxScores(
        numbers={name: _measured(x) for name, x in zip(NAMES, run.stats.tolist(), strict=True)},
        classes={
            name: per_class[categories[number]]
            for name, number in zip(dataset.names, dataset.category_ids, strict=True)
        },
    )


def pycocotools() -> tuple[type, type]:
    """The classes COCO and COCOeval.

    Raises:
        DiveFastError: pycocotools is not installed.
    """
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError as error:
        raise DiveFastError(
            "the COCO numbers come from pycocotools, which is not installed: "
            "pip install 'dive_fast[detect]'."
        ) from error
    return COCO, COCOeval


def _numbered(ids: Iterable[Id]) -> dict[Id, int]:
    """A number for each id, from 1."""
    return {value: number for number, value in enumerate(in_order(ids), start=1)}


def _numbered_truth(
    dataset: CocoDataset, images: Mapping[Id, int], categories: Mapping[Id, int]
) -> dict[str, Any]:
    content = dataset.to_coco()
    return {
        "images": [{**each, "id": images[each["id"]]} for each in content["images"]],
        "annotations": [_renamed(each, images, categories) for each in content["annotations"]],
        "categories": [{**each, "id": categories[each["id"]]} for each in content["categories"]],
    }


def _renamed(
    entry: Mapping[str, Any], images: Mapping[Id, int], categories: Mapping[Id, int]
) -> dict[str, Any]:
    """A copy with the numbers of its image and category, None for a category that is not there."""
    return {
        **entry,
        "image_id": images[as_id(entry["image_id"])],
        "category_id": categories.get(as_id(entry["category_id"])),
    }


def _known_image(value: object, images: Mapping[Id, int]) -> Id:
    number = as_id(value)
    if number not in images:
        raise DataError(f"expected results of the annotated images, got one of image {value!r}.")
    return number


def _checked(result: Mapping[str, Any], images: Mapping[Id, int]) -> dict[str, Any]:
    if not isinstance(result, Mapping) or any(key not in result for key in _RESULT_KEYS):
        raise DataError(f"expected results with {', '.join(_RESULT_KEYS)}, got {result!r}.")
    if not _is_box(result["bbox"]) or not is_number(result["score"]):
        raise DataError(
            "expected results with a bbox of four finite numbers and a finite score, got "
            f"{result!r}."
        )
    _known_image(result["image_id"], images)
    return {key: result[key] for key in _RESULT_KEYS}


def _is_box(value: object) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 4 and all(map(is_number, value))


def _mean(precision: np.ndarray) -> float | None:
    measured = precision[precision > -1]
    return float(measured.mean()) if measured.size else None


def _measured(number: float) -> float | None:
    return None if number == -1 else number
