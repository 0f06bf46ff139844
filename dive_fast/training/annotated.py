"""Makes a layout-to-image model of annotated images: any data set in COCO's form."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dive_fast.core.layouts import LayoutFormat
from dive_fast.core.projection import SLOTS_PER_OBJECT
from dive_fast.data.coco import CocoDataset, held_out_split, mirrored_images, read_coco
from dive_fast.data.coco.problems import Problem, tell_all
from dive_fast.errors import DataError, ImageError
from dive_fast.logs import LogTo, check_log_to
from dive_fast.models import usable_device
from dive_fast.models.files.sidecar import Fitted, fitted_entries
from dive_fast.models.layout_to_image.transformer import LayoutTransformerModel
from dive_fast.models.protocol import optional
from dive_fast.predict.detector import LayoutDetector
from dive_fast.priors.tokens import fitting_layouts
from dive_fast.training.layout import Batch, Draw, train_into
from dive_fast.training.layout_fitting import ExpectedDetector, fitted_or_told
from dive_fast.training.layout_losses import LayoutTrainingConfig
from dive_fast.training.loop import check_unfinished, prepare_directory
from dive_fast.training.state import Course

MOST_HELD_OUT = 256
PIXELS_PER_STEP = 2
MOST_OFTEN = 4.0  # images with the rarest class, times those with the most frequent one
UP_DOWN, LEFT_RIGHT = 2, 3  # axes of images [N, c, h, w]

ANNOTATED = LayoutTrainingConfig(
    in_channels=3,
    t_range=(0.1, 0.75),
    max_weight=50.0,
    predicts="sample",
    contrast=0.005,
    raster=True,
    nameless=0.2,
)
FITTING = 0.25  # of the evaluations of the training, for the fit and the figure after it
BACKWARD = 3  # evaluations that a row of the training costs
AT_SIZE = 32  # the side of images that these timesteps and this weight are for


def config_of_size(size: int) -> LayoutTrainingConfig:
    """``ANNOTATED`` for images of another size, at timesteps that hide as much of them.

    An object of k times the side covers k^2 times the pixels, whose noises average out, so it is as
    visible at a k^2 times lower SNR (Hoogeboom et al. 2023, arXiv 2301.11093):

        SNR(t') = SNR(t) / k^2,  max_weight' = k^2 max_weight,  k = size / 32
    """
    area = (size / AT_SIZE) ** 2
    alpha_bar = ANNOTATED.scheduler().alphas_cumprod
    log_snr = (alpha_bar / (1 - alpha_bar)).log()
    low, high = (
        int((log_snr > log_snr[int(share * len(log_snr))] - math.log(area)).sum()) / len(log_snr)
        for share in ANNOTATED.t_range
    )
    weight = ANNOTATED.max_weight * area
    return dataclasses.replace(ANNOTATED, sample_size=size, t_range=(low, high), max_weight=weight)


class TrainedModel(NamedTuple):
    """What came out: the losses of held-out images, what was learned from, and what to expect."""

    expected: dict[str, float]
    n_train: int
    n_held_out: int
    detector: ExpectedDetector | None  # None where nothing could be fitted


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
    device: torch.device | str | None = None,
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
        device: where it is trained; cuda where there is one if None.

    Raises:
        DataError: the annotations cannot be used or hold no objects, fewer than two images fit and
            can be read, or ``config`` has images of an odd side.
        RunError: ``out`` holds a finished model or another training run, or cannot be written.
    """
    check_log_to(log_to)
    place = usable_device(device)
    out = Path(out)
    if config.sample_size % PIXELS_PER_STEP:
        raise DataError(f"expected an even number of pixels as size, got {config.sample_size}.")
    dataset = read_coco(annotations, images)
    present = tuple(image for image in dataset.images if image.path is not None)
    dataset = dataclasses.replace(dataset, images=present)
    layout = LayoutFormat.compact(
        dataset.names, max_objects, config.sample_size // PIXELS_PER_STEP + 1
    )
    config = dataclasses.replace(config, width=wide_enough(config, len(dataset.names)))
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
    rows = config.batch_size * (1 + config.rivals if config.contrast else 1)
    budget = int(FITTING * BACKWARD * config.steps * rows)
    left = dataclasses.replace(learned, images=tuple(learned.images[i] for i in held_out.tolist()))
    measured: list[ExpectedDetector] = []

    def finish(model: LayoutTransformerModel) -> dict[str, Any]:
        found = fitted_or_told(LayoutDetector(model), left, budget, config.seed, progress, tell)
        beta = None if found is None else found.beta
        rule = optional(model, "detection")
        facts = {
            "held_out": [image.id for image in left.images],
            **fitted_entries(Fitted(beta, model.timesteps, detection=rule)),
        }
        if found is not None:
            measured.append(found)
            facts["detector"] = dataclasses.asdict(found)
        return {key: value for key, value in facts.items() if value is not None}

    expected = train_into(
        out, layout, config, draw, shown, command, progress, data, log_to, finish, place
    )
    return TrainedModel(expected, len(train), len(held_out), measured[0] if measured else None)


def wide_enough(config: LayoutTrainingConfig, n_classes: int) -> int:
    """The width of the layout encoder; to be drawn, rows of classes must be independent."""
    unit = 2 * config.encoder_heads
    return max(config.width, -(-(n_classes + 2) // unit) * unit) if config.raster else config.width


def draw_flipped(
    images: Tensor, tokens: Tensor, among: Tensor, layout: LayoutFormat, config: Course
) -> Draw:
    """Random ones ``among`` the images with their layouts, flipped at random.

    Images with a rare class come more often (``chances``).
    """
    often = chances(tokens[among], layout).numpy()

    def draw(step: int) -> Batch:
        rng = np.random.default_rng((config.seed, step))
        rows = among[torch.from_numpy(rng.choice(len(among), config.batch_size, p=often))]
        batch, found = images[rows], tokens[rows]
        for axis in (UP_DOWN, LEFT_RIGHT):
            flipped = torch.from_numpy(rng.random(len(rows)) < 0.5)
            batch[flipped] = batch[flipped].flip(axis)
            found[flipped] = flip(found[flipped], layout, axis)
        return batch, found

    return draw


def chances(tokens: Tensor, layout: LayoutFormat) -> Tensor:
    """How often each image is drawn, float64 [N] with a sum of 1.

        r_i = max over the classes c of image i of sqrt(f_max / f_c), at most 4; 1 without objects

    f_c is the share of images that hold class c: the repeat factors of Gupta et al. 2019 (LVIS,
    arXiv 1908.03195) with the most frequent class as the threshold, which suits small data sets.
    What is learned is p(x0 | layout), which does not depend on how often a layout comes.

    Args:
        tokens: int64 [N, S].
    """
    classes = tokens[:, ::SLOTS_PER_OBJECT]
    start, stop = layout.class_range
    holds = torch.stack([(classes == c).any(dim=1) for c in range(start, stop)], dim=1)
    shares = holds.double().mean(dim=0)
    factors = (shares.max() / shares).sqrt().clamp(max=MOST_OFTEN)  # none of a class: never used
    repeats = torch.where(holds, factors, 1.0).amax(dim=1)
    return repeats / repeats.sum()


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
