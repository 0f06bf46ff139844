"""Makes the zoo's models: trains, fits the temperature, measures, and writes a model directory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import nn

from dive_fast.data import digits
from dive_fast.data.mnist import load_mnist
from dive_fast.data.npz import LabelledImages
from dive_fast.data.omniglot import load_omniglot
from dive_fast.errors import DataError, RunError
from dive_fast.logs import LogTo, check_log_to
from dive_fast.models.files.sidecar import write_extra
from dive_fast.predict.classifier import DiffusionClassifier
from dive_fast.predict.fitting_shortlist import FINALISTS
from dive_fast.training.dit import (
    DIGITS,
    MNIST,
    OMNIGLOT,
    TrainingConfig,
    augment_images,
    train_transformer,
    write_model,
)
from dive_fast.training.loop import checkpoint_folder, doubling_steps, prepare_directory

PROBES = 100
N_FIT = 300
MAX_FIT_EVALUATIONS = 300_000
SHORTLIST_PROBES = 24
SHORTLIST_IMAGES = 150


@dataclass(frozen=True)
class Recipe:
    """How a zoo model is made.

    Attributes:
        config: of the training.
        load: reads the part "train" or "test"; takes the file of the data and the part.
        needs_data: whether the user has to name that file.
        strategy: answers the test part for the expected accuracy.
        n_test: images of the test part that are answered, the first ones.
    """

    config: TrainingConfig
    load: Callable[[str | Path | None, str], LabelledImages]
    needs_data: bool
    strategy: str
    n_test: int


RECIPES = {
    "digits": Recipe(
        DIGITS,
        lambda _, part: LabelledImages(*digits.load_digits(part), digits.NAMES),
        needs_data=False,
        strategy="enumerate",
        n_test=397,
    ),
    "mnist": Recipe(MNIST, load_mnist, needs_data=True, strategy="auto", n_test=2000),
    "omniglot": Recipe(OMNIGLOT, load_omniglot, needs_data=True, strategy="auto", n_test=1210),
}


def train_zoo_model(
    model: str,
    out: str | Path,
    *,
    data: str | Path | None = None,
    steps: int | None = None,
    seed: int = 0,
    bf16: bool = False,
    checkpoints: int = 0,
    log_to: LogTo | None = None,
    progress: bool = True,
) -> dict:
    """Trains a model of the zoo into ``out``, a diffusers model directory.

    Args:
        model: "digits", "mnist" or "omniglot".
        data: the ``.npz`` of MNIST or Omniglot; the digits come with scikit-learn.
        steps: fewer than the zoo's, for a try.
        bf16: the network computes in bfloat16; its weights stay float32.
        checkpoints: how many model directories ``out/checkpoints/checkpoint-STEP`` it leaves, with
            averaged weights, each after about twice the steps of the one before, the last at the
            end.
        log_to: where the losses go while it learns, as for ``evaluation.evaluate``.

    Returns:
        What is expected of it: strategy, probes, accuracy on the test part, and on how many.

    Raises:
        DataError: the data are missing or of another form.
        RunError: ``out`` holds a finished model or another training run, or cannot be written.
    """
    check_log_to(log_to)
    recipe, out = RECIPES[model], Path(out)
    if recipe.needs_data == (data is None):
        raise DataError(
            f"{model} is trained from a file: expected --data FILE.npz, got none."
            if recipe.needs_data
            else f"the {model} come with scikit-learn: expected no --data, got {data}."
        )
    train, held_out = (recipe.load(data, part) for part in ("train", "test"))
    prepare_directory(out)
    config = dataclasses.replace(
        recipe.config, steps=steps or recipe.config.steps, seed=seed, bf16=bf16
    )
    transformer = train_transformer(
        train.images,
        train.labels,
        config,
        out,
        progress,
        log_to,
        doubling_steps(checkpoints, config.steps),
        lambda step, model: _write(checkpoint_folder(out, step), model, train.names),
    )
    _write(out, transformer, train.names)

    classifier = DiffusionClassifier.from_pretrained(out)
    fit_zoo_model(classifier, train, config, progress)
    answers = classifier(
        list(held_out.images[: recipe.n_test]),
        strategy=recipe.strategy,
        probes=PROBES,
        progress=progress,
    )
    right = [a.index == y for a, y in zip(answers, held_out.labels.tolist(), strict=False)]
    expected = {
        "strategy": recipe.strategy,
        "probes": PROBES,
        "accuracy": round(sum(right) / len(right), 4),
        "n": len(right),
    }
    facts = {
        "timestep_embedding": "diffusers",
        "command": f"dive-fast train {model}{' --data FILE' * recipe.needs_data} --out DIR",
        "config": dataclasses.asdict(config),
        "expected": expected,
    }
    write_extra(out, facts)
    classifier.save_fitted(out)
    return expected


def _write(out: Path, transformer: nn.Module, names: tuple[str, ...]) -> None:
    try:
        write_model(out, transformer, names)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{out} cannot be written ({error}).") from error


def fit_zoo_model(
    classifier: DiffusionClassifier, train: LabelledImages, config: TrainingConfig, progress: bool
) -> None:
    """Fits timesteps, shortlist and beta on training images, each moved a little.

    Of the training part, because the held-out images are for the final figure only; moved,
    because on images that it has seen as they are the model is surer than it ought to be.
    """
    generator = torch.Generator().manual_seed(config.seed)
    # In a random order: the first images of a file may all be of a few classes.
    picked = torch.randperm(len(train.images), generator=generator)[:N_FIT]
    x0 = torch.from_numpy(train.images)[picked].float().div(127.5).sub(1).unsqueeze(1)
    x0 = augment_images(x0, dataclasses.replace(config, augment=1.0), generator)
    x0 = F.avg_pool2d(x0, x0.shape[-1] // config.sample_size)
    labels, c = torch.from_numpy(train.labels)[picked], len(train.names)

    def affordable(evaluations: int) -> int:
        return max(2, MAX_FIT_EVALUATIONS // evaluations)

    n = affordable(20 * c + 4 * PROBES)
    classifier.fit_timesteps(latents=x0[:n], labels=labels[:n], progress=progress)
    n = min(affordable(SHORTLIST_PROBES * (c + 2) + PROBES * min(c, FINALISTS)), SHORTLIST_IMAGES)
    classifier.fit_shortlist(latents=x0[:n], probes=SHORTLIST_PROBES, progress=progress)
    classifier.calibrate(latents=x0, labels=labels, strategy="auto", progress=progress)
