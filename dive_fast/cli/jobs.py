"""The two jobs of ``evaluate`` and ``fit``: the data say whether a classifier or a detector."""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Iterator
from typing import TYPE_CHECKING

from dive_fast.cli.options import CLASSIFIER, DETECTOR

if TYPE_CHECKING:  # torch is not loaded for the help
    from dive_fast.data.coco import CocoDataset

SCENES = "scenes"  # the zoo's annotated images
OF_CLASSIFIERS = (
    *("preset", "timesteps", "timestep_embedding", "average", "generate", "unlabelled", "head"),
    *("lora", "lora_scale", "prediction_type", "weights", "corruption"),
)
# Their names may end as an annotation file's does.
SCHEMES_OF_CLASSIFIERS = ("hf:", "wds:")
OF_DETECTORS = ("images", "prior", "prior_weight")


def is_detection(options: argparse.Namespace) -> bool:
    """Whether the data are annotated with boxes; chooses the model, and refuses what is not for it.

    Raises:
        DataError: an option of the other job, or annotations without their images.
    """
    from dive_fast.errors import DataError

    data = options.data or ""
    detection = data == SCENES or data.lower().endswith(".json")
    detection = detection and not data.startswith(SCHEMES_OF_CLASSIFIERS)
    mine, other = ("detectors", "classifiers") if detection else ("classifiers", "detectors")
    for name in OF_CLASSIFIERS if detection else OF_DETECTORS:
        if getattr(options, name, None) is not None:
            option, subject = name.replace("_", "-"), data or f"{options.command} without --data"
            raise DataError(f"--{option} is for {other}; {subject} is for {mine}.")
    if data == SCENES and options.images is not None:
        raise DataError("--images is for annotation files; the scenes bring their own images.")
    if detection and data != SCENES and options.images is None:
        raise DataError(f"expected --images DIR, the images of {data}, got none.")
    options.model = options.model or (DETECTOR if detection else CLASSIFIER)
    return detection


@contextlib.contextmanager
def annotated_images(
    options: argparse.Namespace, part: str, n_scenes: int | None = None
) -> Iterator[CocoDataset]:
    """The annotated images that ``--data``, ``--images`` and ``--limit`` name.

    The scenes' files are there as long as the context is entered.

    Args:
        part: of the scenes, "train" or "test".
        n_scenes: how many without ``--limit``; None for all that there are for tests.
    """
    from dive_fast.data.coco import read_coco
    from dive_fast.data.scenes import N_TEST, write_scenes

    if options.data != SCENES:
        yield read_coco(options.data, options.images).select(options.limit, options.seed)
        return
    with tempfile.TemporaryDirectory(prefix="scenes-") as folder:
        yield write_scenes(folder, part, min(options.limit or n_scenes or N_TEST, N_TEST))
