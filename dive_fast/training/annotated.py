"""Makes a layout-to-image model of annotated images: any data set in COCO's form."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dive_fast.core.layouts import LayoutFormat
from dive_fast.core.projection import SLOTS_PER_OBJECT
from dive_fast.data.coco import CocoDataset, held_out_split, mirrored_images, read_coco
from dive_fast.data.coco.problems import Problem, tell_all
from dive_fast.errors import DataError, ImageError
from dive_fast.logs import LogTo, check_log_to
from dive_fast.priors.tokens import fitting_layouts
from dive_fast.training.layout import Batch, Draw, LayoutTrainingConfig, train_into
from dive_fast.training.loop import Course, check_unfinished, prepare_directory

MOST_HELD_OUT = 256
PIXELS_PER_STEP = 2
UP_DOWN, LEFT_RIGHT = 2, 3  # axes of images [N, c, h, w]

ANNOTATED = LayoutTrainingConfig(in_channels=3, t_range=(0.2, 0.75), max_weight=50.0)


class TrainedModel(NamedTuple):
    """What came out: the losses of held-out images, and what was learned from."""

    expected: dict[str, float]
    n_train: int
    n_held_out: int


def train_annotated(
    annotations: str | Path,
    images: str | Path,
    out: str | Path,
    *,
    max_objects: int,
    config: LayoutTrainingConfig = ANNOTATED,
    log_to: LogTo | None = None,
    progress: bool = True,
    tell: Callable[[str], object] = print,
) -> TrainedModel:
    """Trains a layout-to-image model into ``out``, a diffusers model directory.

    Images are squashed to the model's square and flipped at random, left to right and upside
    down. Corners lie on every second pixel. A tenth of the images, always the same, at most 256,
    is held out.

    Args:
        annotations: a COCO annotation file.
        images: the folder of its images.
        max_objects: slots of the model; of an image with more objects the smallest are left out.
        config: sizes and course; ``sample_size`` is the side of the images.
        log_to: where the losses go while it learns, as for ``evaluation.evaluate``.
        tell: takes one sentence on everything that was left out, images that cannot be read too.

    Raises:
        DataError: the annotations cannot be used or hold no objects, fewer than two images fit and
            can be read, or ``config`` has images of an odd side.
        RunError: ``out`` holds a finished model or another training run, or cannot be written.
    """
    check_log_to(log_to)
    out = Path(out)
    if config.sample_size % PIXELS_PER_STEP:
        raise DataError(f"expected an even number of pixels as size, got {config.sample_size}.")
    dataset = read_coco(annotations, images)
    present = tuple(image for image in dataset.images if image.path is not None)
    dataset = dataclasses.replace(dataset, images=present)
    layout = LayoutFormat.compact(
        dataset.names, max_objects, config.sample_size // PIXELS_PER_STEP + 1
    )
    dataset.tell_problems(tell)
    dataset.expect_objects("to learn from")
    fitting = fitting_layouts(dataset, layout)
    for sentence in fitting.left_out:
        tell(sentence)
    check_unfinished(out)
    chosen = tuple(dataset.images[i] for i in fitting.images.tolist())
    dataset = dataclasses.replace(dataset, images=chosen)
    if (mirrored := mirrored_images(dataset)) is not None:
        tell(mirrored)
    pixels, read = _read_images(dataset, config, tell)
    tokens = fitting.tokens[read]
    train, held_out = held_out_split(len(tokens), dataset.source, MOST_HELD_OUT)
    prepare_directory(out)
    draw = draw_flipped(pixels, tokens, train, layout, config)
    shown = (pixels[held_out], tokens[held_out])
    learned = dataclasses.replace(dataset, images=tuple(chosen[i] for i in read.tolist()))
    command, data = "dive-fast train-layout", learned.identity()
    expected = train_into(out, layout, config, draw, shown, command, progress, data, log_to)
    return TrainedModel(expected, len(train), len(held_out))


def draw_flipped(
    images: Tensor, tokens: Tensor, among: Tensor, layout: LayoutFormat, config: Course
) -> Draw:
    """Random ones ``among`` the images with their layouts, flipped at random."""

    def draw(step: int) -> Batch:
        rng = np.random.default_rng((config.seed, step))
        rows = among[torch.from_numpy(rng.integers(len(among), size=config.batch_size))]
        batch, found = images[rows], tokens[rows]
        for axis in (UP_DOWN, LEFT_RIGHT):
            flipped = torch.from_numpy(rng.random(len(rows)) < 0.5)
            batch[flipped] = batch[flipped].flip(axis)
            found[flipped] = flip(found[flipped], layout, axis)
        return batch, found

    return draw


def flip(tokens: Tensor, layout: LayoutFormat, axis: int) -> Tensor:
    """The layouts of flipped images.

    Args:
        tokens: int64 [N, S], without crop.
        axis: of images [N, c, h, w], ``UP_DOWN`` or ``LEFT_RIGHT``.
    """
    last = layout.grid - 1
    objects = tokens.unflatten(1, (-1, SLOTS_PER_OBJECT))
    x, y = layout.corner_place(objects[..., 1:])
    # What was the second corner's side is the first one's now.
    if axis == UP_DOWN:
        y = last - y.flip(-1)
    else:
        x = last - x.flip(-1)
    absent = objects[..., 1:] == layout.none
    turned = torch.where(absent, layout.none, layout.corner_token(x, y))
    return torch.cat([objects[..., :1], turned], dim=2).flatten(1)


def _read_images(
    dataset: CocoDataset, config: LayoutTrainingConfig, tell: Callable[[str], object]
) -> tuple[Tensor, Tensor]:
    """Those that can be read, uint8 [N, c, side, side], and their positions in the data set."""
    size, channels = config.sample_size, config.in_channels
    images, read = [np.empty((0, channels, size, size), dtype=np.uint8)], []
    bad: list[Problem] = []
    for i, image in enumerate(dataset.images):
        try:
            images.append(image.pixels(size, channels)[None])
        except ImageError as error:
            bad.append(Problem("image", f"left out: {error}"))
            continue
        read.append(i)
    tell_all(bad, dataset.source, tell)
    return torch.from_numpy(np.concatenate(images)), torch.tensor(read).long()
