"""What a class-conditional model of photographs is made of, and that its parts fit each other."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field

from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from dive_fast.errors import DiveFastError, ModelError, shown
from dive_fast.models.autoencoder import Autoencoder, latent_channels
from dive_fast.training.augmentation import Augmentation
from dive_fast.training.classes_latents import latent_side
from dive_fast.training.dit import TransformerConfig

SCHEDULERS = {
    "ddpm": lambda: DDPMScheduler(beta_schedule="linear"),
    "flow": FlowMatchEulerDiscreteScheduler,
    "x0": lambda: DDPMScheduler(beta_schedule="linear", prediction_type="sample"),
}


@dataclass(frozen=True, kw_only=True)
class ClassTrainingConfig(TransformerConfig):
    """What a model of one's own photographs is made of and how long it learns.

    ``sample_size``, ``num_classes`` and ``in_channels`` follow from the data.

    Attributes:
        image_size: side of the pictures, in pixels.
        grey: one channel of pictures instead of three.
        self_condition: features of the network's middle condition its later blocks, see
            ``models.dit.self_conditioned``.
        objective: "ddpm", "flow" or "x0": what is predicted, eps, eps - x0 or x0.
        contrast: lambda of loss + lambda CE, see ``classes_rivals``; 0 for denoising alone.
        rivals: k, other classes that the right one is told from.
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
    width: int = 128
    heads: int = 4
    layers: int = 4
    self_condition: bool = False
    objective: str = "x0"
    contrast: float = 0.1
    rivals: int = 3
    label_dropout: float = 0.1
    augmentation: Augmentation = field(
        default_factory=lambda: Augmentation(flip=True, crop=0.3, colour=0.3)
    )
    copies: int = 7
    steps: int = 2000
    batch_size: int = 32
    warmup_steps: int = 100
    samples_every: int = 500


def completed(
    config: ClassTrainingConfig, n_classes: int, vae: Autoencoder | None, held_out: float
) -> ClassTrainingConfig:
    """The configuration with what follows from data and autoencoder; every part fits the others.

    Raises:
        DiveFastError: they do not, or a share is out of range.
    """
    for name in ("image_size", "patch_size", "width", "heads", "layers", "copies", "rivals"):
        if getattr(config, name) < (name != "copies"):
            raise DiveFastError(f"expected {name} of 1 or more, got {getattr(config, name)}.")
    if not 0 < config.learning_rate < math.inf:
        raise DiveFastError(f"expected a learning_rate above 0, got {config.learning_rate}.")
    if not 0 <= config.contrast < math.inf:
        raise DiveFastError(f"expected a contrast of 0 or more, got {config.contrast}.")
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
