"""Makes a class-conditional model of photographs of one's own, and a classifier that works of it.

    x_t = a_t x0 + s_t eps
    loss = || target - network(x_t, t, y) ||^2 + lambda CE

x0 are pixels, or latents of an autoencoder. For a share of every batch y is the class "none", so
that the model also knows pictures of any class. ``classes_learner`` has the loss.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor

from dive_fast.data.images import from_bytes
from dive_fast.errors import RunError
from dive_fast.logs import LogTo, check_log_to
from dive_fast.models import usable_device
from dive_fast.models.autoencoder import Autoencoder, encode_latents
from dive_fast.models.files.checkpoint import fingerprint
from dive_fast.training.classes_config import SCHEDULERS, ClassTrainingConfig, completed
from dive_fast.training.classes_data import Pictures, open_classes, read_pictures
from dive_fast.training.classes_fitting import Expected, fit_and_measure
from dive_fast.training.classes_latents import CPU, encode_copies, load_autoencoder
from dive_fast.training.classes_learner import Learner
from dive_fast.training.classes_parts import Parts, divided, divided_by_group, groups_of
from dive_fast.training.dit import build_transformer, write_model
from dive_fast.training.loop import (
    Keep,
    check_unfinished,
    checkpoint_folder,
    doubling_steps,
    prepare_directory,
    train,
)

LOG_EVERY = 100
CLASS_STD = 0.5  # far apart from the first step on: a course is short
MOST_HELD_OUT = 512  # pictures whose loss is logged


class TrainedClasses(NamedTuple):
    """What came out.

    Attributes:
        losses: of held-out pictures, with their class ("held_out") and with none ("none").
        expected: of the classifier, on pictures that were neither trained on nor fitted to.
        n_classes: of the model.
        parts: how many pictures were learned from, fitted to, and measured on.
        seconds: of the training alone, all sittings together.
    """

    losses: dict[str, float]
    expected: Expected
    n_classes: int
    parts: tuple[int, int, int]
    seconds: float


def train_classes(
    data: str | Path,
    out: str | Path,
    *,
    config: ClassTrainingConfig | None = None,
    vae: str | Path | None = None,
    classes: Sequence[str] | None = None,
    held_out: float = 0.15,
    group_by: str | None = None,
    readers: int | None = None,
    checkpoints: int = 0,
    log_to: LogTo | None = None,
    progress: bool = True,
    tell: Callable[[str], object] = print,
    device: torch.device | str | None = None,
) -> TrainedClasses:
    """Trains a classifier into ``out``, a diffusers model directory, and fits what it needs.

    A share of every class is held out. On half of it timesteps, shortlist and beta are fitted
    after the training, and with those the other half is classified: see ``Expected``.

    Args:
        data: labelled pictures, as ``data.open_dataset`` takes them; of a file in parts the
            training part.
        config: sizes and course; ``ClassTrainingConfig()`` if None.
        vae: an autoencoder in whose latents it is trained: a directory or hub id, see
            ``classes_latents.load_autoencoder``. None: in pixels.
        classes: the names of the classes; those of the data if None.
        held_out: share of every class, at least 2 pictures.
        group_by: a regular expression; pictures in whose file names it finds the same (its first
            group, if it has any) are held out together or not at all. None: each by itself.
        readers: processes that read pictures; None decides by itself.
        checkpoints: how many model directories it leaves in ``out``, as for
            ``zoo.train_zoo_model``; an autoencoder lies in each of them.
        log_to: where the losses go while it learns, as for ``evaluation.evaluate``.
        tell: takes one sentence on pictures that were left out.
        device: where it is trained; cuda where there is one if None.

    Raises:
        DataError: the data cannot be used, have one class only or fewer than 3 pictures or
            groups of one.
        ModelError: the autoencoder cannot be used, or does not fit the size of the pictures.
        DiveFastError: sizes that do not fit each other, or another argument out of range.
        RunError: ``out`` holds a finished model or another training run, or cannot be written.
    """
    check_log_to(log_to)
    place = usable_device(device)
    out, config = Path(out), config or ClassTrainingConfig()
    dataset, names = open_classes(data, classes)
    autoencoder = None if vae is None else load_autoencoder(vae)
    config = completed(config, len(names), autoencoder, held_out)
    check_unfinished(out)
    channels = config.in_channels if autoencoder is None else autoencoder.config.in_channels
    pictures = read_pictures(dataset, names, config.image_size, channels, readers, tell)
    if group_by is None:
        parts = divided(pictures.labels, held_out, config.seed)
    else:
        groups = groups_of(pictures.dataset.ids, group_by, tell)
        parts = divided_by_group(pictures.labels, groups, names, held_out, config.seed)
    prepare_directory(out)
    identity = {
        "data": pictures.dataset.identity(),
        "names": list(names),
        "held_out_share": held_out,
        "vae": None if autoencoder is None else fingerprint(autoencoder),
        **({} if group_by is None else {"group_by": group_by}),
    }
    learner = _learner(pictures, parts, config, autoencoder, place, progress)

    def write(directory: Path) -> None:
        scheduler = SCHEDULERS[config.objective]()
        try:
            write_model(directory, learner.transformer, names, scheduler, autoencoder)
        except (OSError, SafetensorError) as error:
            raise RunError(f"{directory} cannot be written ({error}).") from error

    finished = train(
        learner.trained,
        learner.loss_of,
        config,
        out,
        identity=identity,
        held_out=lambda: learner.measured(out),
        keep=Keep(
            doubling_steps(checkpoints, config.steps),
            lambda step: write(checkpoint_folder(out, step)),
        ),
        log_to=log_to,
        log_every=LOG_EVERY,
        progress=progress,
    )
    write(out)
    facts = {
        "timestep_embedding": "diffusers",
        "command": "dive-fast train-classes",
        "config": dataclasses.asdict(config),
        "data": identity["data"],
        "losses": finished.held_out,
        "seconds": round(finished.seconds, 1),
        "cpu_seconds": round(finished.cpu_seconds, 1),
    }
    budget = config.steps * config.batch_size
    expected = fit_and_measure(out, pictures, parts, budget, facts, config.seed, place, progress)
    sizes = tuple(map(len, parts))
    return TrainedClasses(finished.held_out, expected, len(names), sizes, finished.seconds)


def _learner(
    pictures: Pictures,
    parts: Parts,
    config: ClassTrainingConfig,
    vae: Autoencoder | None,
    device: torch.device,
    progress: bool,
) -> Learner:
    labels = pictures.labels[parts.train]
    pixels = pictures.pixels[parts.train]
    away = torch.cat([parts.fit, parts.test])
    # In a random order, of which the first are measured often.
    generator = torch.Generator().manual_seed(config.seed)
    away = away[torch.randperm(len(away), generator=generator)[:MOST_HELD_OUT]]
    if vae is None:
        held_out = from_bytes(pictures.pixels[away])

        def draw(rows: Tensor, generator: torch.Generator) -> Tensor:
            return config.augmentation(from_bytes(pixels[rows]), generator)

    else:
        copies = encode_copies(
            vae, pixels, config.augmentation, config.copies, config.seed, progress
        )
        held_out = encode_latents(vae, from_bytes(pictures.pixels[away]), CPU)

        def draw(rows: Tensor, generator: torch.Generator) -> Tensor:
            copy = torch.randint(len(copies), (len(rows),), generator=generator)
            return copies[copy, rows].float()

    torch.manual_seed(config.seed)
    transformer = build_transformer(config, CLASS_STD, config.self_condition).to(device)
    return Learner(
        transformer, draw, labels, held_out, pictures.labels[away], pictures.names, vae, config
    )
