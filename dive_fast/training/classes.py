"""Makes a class-conditional model of photographs of one's own, and a classifier that works of it.

    x_t = a_t x0 + s_t eps
    loss = || target - network(x_t, t, y) ||^2,  target = eps (ddpm) or eps - x0 (flow)

x0 are pixels, or latents of an autoencoder. For a share of every batch y is the class "none", so
that the model also knows pictures of any class.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler
from safetensors import SafetensorError
from torch import Tensor

from dive_fast.core.convention import Convention
from dive_fast.data.images import from_bytes
from dive_fast.errors import DiveFastError, ModelError, RunError, shown
from dive_fast.logs import LogTo, check_log_to
from dive_fast.models.autoencoder import Autoencoder, encode_latents, latent_channels
from dive_fast.models.files.checkpoint import fingerprint
from dive_fast.training.augmentation import Augmentation
from dive_fast.training.classes_data import (
    Parts,
    Pictures,
    divided,
    open_classes,
    read_pictures,
)
from dive_fast.training.classes_fitting import Expected, fit_and_measure
from dive_fast.training.classes_latents import CPU, encode_copies, latent_side, load_autoencoder
from dive_fast.training.classes_samples import draw_samples
from dive_fast.training.dit import TransformerConfig, build_transformer, write_model
from dive_fast.training.loop import (
    Keep,
    check_unfinished,
    checkpoint_folder,
    doubling_steps,
    prepare_directory,
    train,
)

SCHEDULERS = {
    "ddpm": lambda: DDPMScheduler(beta_schedule="linear"),
    "flow": FlowMatchEulerDiscreteScheduler,
}
LOG_EVERY = 100
MOST_HELD_OUT = 512  # pictures whose loss is logged

# x0 float32 [B, C, h, w] of the pictures at rows int64 [B].
Draw = Callable[[Tensor, torch.Generator], Tensor]


@dataclass(frozen=True, kw_only=True)
class ClassTrainingConfig(TransformerConfig):
    """What a model of one's own photographs is made of and how long it learns.

    ``sample_size``, ``num_classes`` and ``in_channels`` follow from the data.

    Attributes:
        image_size: side of the pictures, in pixels.
        grey: one channel of pictures instead of three.
        objective: "ddpm" or "flow".
        label_dropout: share of the pictures whose class is "none".
        copies: augmented ones of every picture, where latents are learned.
        samples_every: steps from one drawing of samples to the next.
    """

    sample_size: int = 0
    num_classes: int = 0
    in_channels: int = 0
    image_size: int = 32
    grey: bool = False
    patch_size: int = 8
    width: int = 192
    heads: int = 4
    layers: int = 6
    objective: str = "flow"
    label_dropout: float = 0.1
    augmentation: Augmentation = field(
        default_factory=lambda: Augmentation(flip=True, crop=0.3, colour=0.3)
    )
    copies: int = 7
    steps: int = 4000
    batch_size: int = 64
    warmup_steps: int = 100
    samples_every: int = 500


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
    readers: int | None = None,
    checkpoints: int = 0,
    log_to: LogTo | None = None,
    progress: bool = True,
    tell: Callable[[str], object] = print,
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
        readers: processes that read pictures; None decides by itself.
        checkpoints: how many model directories it leaves in ``out``, as for
            ``zoo.train_zoo_model``; an autoencoder lies in each of them.
        log_to: where the losses go while it learns, as for ``evaluation.evaluate``.
        tell: takes one sentence on pictures that were left out.

    Raises:
        DataError: the data cannot be used, have one class only or fewer than 3 pictures of one.
        ModelError: the autoencoder cannot be used, or does not fit the size of the pictures.
        DiveFastError: sizes that do not fit each other, or another argument out of range.
        RunError: ``out`` holds a finished model or another training run, or cannot be written.
    """
    check_log_to(log_to)
    out, config = Path(out), config or ClassTrainingConfig()
    dataset, names = open_classes(data, classes)
    autoencoder = None if vae is None else load_autoencoder(vae)
    config = completed(config, len(names), autoencoder, held_out)
    check_unfinished(out)
    channels = config.in_channels if autoencoder is None else autoencoder.config.in_channels
    pictures = read_pictures(dataset, names, config.image_size, channels, readers, tell)
    parts = divided(pictures.labels, held_out, config.seed)
    prepare_directory(out)
    identity = {
        "data": pictures.dataset.identity(),
        "names": list(names),
        "held_out_share": held_out,
        "vae": None if autoencoder is None else fingerprint(autoencoder),
    }
    learner = _learner(pictures, parts, config, autoencoder, progress)

    def write(directory: Path) -> None:
        scheduler = SCHEDULERS[config.objective]()
        try:
            write_model(directory, learner.transformer, names, scheduler, autoencoder)
        except (OSError, SafetensorError) as error:
            raise RunError(f"{directory} cannot be written ({error}).") from error

    finished = train(
        learner.transformer,
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
    expected = fit_and_measure(out, pictures, parts, budget, facts, config.seed, progress)
    sizes = tuple(map(len, parts))
    return TrainedClasses(finished.held_out, expected, len(names), sizes, finished.seconds)


def completed(
    config: ClassTrainingConfig, n_classes: int, vae: Autoencoder | None, held_out: float
) -> ClassTrainingConfig:
    """The configuration with what follows from data and autoencoder; every part fits the others.

    Raises:
        DiveFastError: they do not, or a share is out of range.
    """
    for name in ("image_size", "patch_size", "width", "heads", "layers", "copies"):
        if getattr(config, name) < (name != "copies"):
            raise DiveFastError(f"expected {name} of 1 or more, got {getattr(config, name)}.")
    if not 0 < config.learning_rate < math.inf:
        raise DiveFastError(f"expected a learning_rate above 0, got {config.learning_rate}.")
    if config.objective not in SCHEDULERS:
        raise DiveFastError(
            f"expected an objective of {', '.join(SCHEDULERS)}, got {shown(config.objective)}."
        )
    augmentation = config.augmentation
    for name in ("crop", "colour"):
        if not 0 <= getattr(augmentation, name) < 1:
            raise DiveFastError(
                f"expected {name} from 0 to below 1, got {getattr(augmentation, name)}."
            )
    for name, share in (("held_out", held_out), ("label_dropout", config.label_dropout)):
        if not 0 < share < 1:
            raise DiveFastError(f"expected a share above 0 and below 1 as {name}, got {share}.")
    if config.width % config.heads:
        raise DiveFastError(
            f"expected a width that {config.heads} heads divide, got {config.width}."
        )
    side, channels = config.image_size, 1 if config.grey else 3
    if vae is not None:
        if config.grey != (vae.config.in_channels == 1):
            raise ModelError(
                f"the autoencoder takes pictures of {vae.config.in_channels} channels, but they "
                f"have {channels}."
            )
        side, channels = latent_side(vae, side), latent_channels(vae)
    if side % config.patch_size:
        what = "pixels" if vae is None else "latents"
        raise DiveFastError(
            f"expected a side that the patches of {config.patch_size} divide, got {side} {what}."
        )
    return dataclasses.replace(
        config, sample_size=side, in_channels=channels, num_classes=n_classes
    )


def _learner(
    pictures: Pictures,
    parts: Parts,
    config: ClassTrainingConfig,
    vae: Autoencoder | None,
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
    transformer = build_transformer(config)
    return Learner(
        transformer, draw, labels, held_out, pictures.labels[away], pictures.names, vae, config
    )


class Learner:
    """A network, what it learns, and how it is doing.

    Args:
        draw: x0 of training pictures by their rows.
        labels: of the training pictures.
        held_out, held_out_labels: x0 and classes of pictures that are never trained on.
    """

    def __init__(
        self,
        transformer: DiTTransformer2DModel,
        draw: Draw,
        labels: Tensor,
        held_out: Tensor,
        held_out_labels: Tensor,
        names: tuple[str, ...],
        vae: Autoencoder | None,
        config: ClassTrainingConfig,
    ) -> None:
        self.transformer, self.draw, self.labels = transformer, draw, labels
        self.held_out, self.held_out_labels = held_out, held_out_labels
        self.names, self.vae, self.config = names, vae, config
        scheduler = SCHEDULERS[config.objective]()
        stated: dict[str, Any] = {"_class_name": type(scheduler).__name__, **scheduler.config}
        self.convention = Convention.from_config(stated)
        self.done = 0

    def loss_of(self, step: int, generator: torch.Generator) -> Tensor:
        """The loss of one batch, its classes left out at random."""
        config = self.config
        rows = torch.randint(len(self.labels), (config.batch_size,), generator=generator)
        x0, y = self.draw(rows, generator), self.labels[rows]
        none = torch.rand(len(y), generator=generator) < config.label_dropout
        y = torch.where(none, config.num_classes, y)
        t = spread_timesteps(len(y), len(self.convention.schedule), generator)
        self.done = step + 1
        return self.loss(x0, y, t, torch.randn(x0.shape, generator=generator))

    def loss(self, x0: Tensor, y: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Mean of || target - prediction ||^2 / dim."""
        schedule = self.convention.schedule
        a, s = schedule.a[t][:, None, None, None], schedule.s[t][:, None, None, None]
        target = eps - x0 if schedule.target == "flow" else eps
        with self.config.autocast(x0.device):
            found = self.transformer(a * x0 + s * eps, self.convention.told(t), y).sample
        return F.mse_loss(found.float(), target)

    def measured(self, out: Path) -> dict[str, float]:
        """The loss of held-out pictures with their class and with none; sometimes draws samples."""
        if self.done % self.config.samples_every == 0 or self.done == self.config.steps:
            draw_samples(self.transformer, self.convention, self.names, self.vae, out, self.done)
        generator = torch.Generator().manual_seed(self.config.seed)
        t = spread_timesteps(len(self.held_out), len(self.convention.schedule), generator)
        eps = torch.randn(self.held_out.shape, generator=generator)
        none = torch.full_like(self.held_out_labels, self.config.num_classes)
        labels = {"held_out": self.held_out_labels, "none": none}
        return {name: self._mean_loss(y, t, eps) for name, y in labels.items()}

    def _mean_loss(self, y: Tensor, t: Tensor, eps: Tensor) -> float:
        split = (x.split(self.config.batch_size) for x in (self.held_out, y, t, eps))
        parts = zip(*split, strict=True)
        return sum(self.loss(*part).item() * len(part[1]) for part in parts) / len(y)


def spread_timesteps(n: int, n_timesteps: int, generator: torch.Generator) -> Tensor:
    """int64 [n], each uniform over the schedule, all of them evenly spread, in a random order."""
    u = (torch.randperm(n, generator=generator) + torch.rand(1, generator=generator)) / n
    return (u * n_timesteps).long().clamp(max=n_timesteps - 1)
