"""What all layout-to-image models share: the layout, the images, the directory.

A condition is the token embeddings of a layout end to end, [M, S D]; the layout encoder turns them
into what the denoiser attends to, [M, S, D].
"""

from __future__ import annotations

import json
from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import torch
import torch.nn.functional as F
from diffusers import ModelMixin, SchedulerMixin
from torch import nn

from dive_fast.core.config import LARGEST
from dive_fast.core.layouts import LayoutFormat
from dive_fast.core.numbers import is_whole
from dive_fast.core.schedule import Schedule
from dive_fast.core.vocabulary import Vocabulary
from dive_fast.errors import DiveFastError, ModelError, shown
from dive_fast.models.autoencoder import Autoencoder, latent_channels, normalisation
from dive_fast.models.base import LayoutConditioned, sample_side
from dive_fast.models.files.checkpoint import fingerprint
from dive_fast.models.layout_to_image.encoder import LayoutEncoder

PIPELINE = "LayoutToImagePipeline"


class EncodedLayout(LayoutConditioned):
    """A model whose network attends to an encoded layout.

    Attributes:
        layout_encoder: token embeddings [N, S, D] to what the denoiser attends to, [N, L, W].
    """

    layout_encoder: nn.Module

    def moved(self) -> tuple[nn.Module, ...]:
        return self.network, self.layout_encoder

    def encode_layout(self, condition: torch.Tensor) -> torch.Tensor:
        """[N, S D] to what the denoiser attends to, [N, L, W]; differentiable.

        Raises:
            ModelError: another shape.
        """
        return self.layout_encoder(self.slots(condition.to(self.dtype)))


class LayoutModel(EncodedLayout):
    """A layout-to-image model; see ``models.protocol.Model`` for the attributes.

    Subclasses name the folder of their denoiser, check it in ``_check`` and call it in ``predict``.

    Args:
        denoiser: float32, frozen; attends to what the encoder gives.
        encoder: float32, frozen; its configuration holds the layout's format.
        scheduler: a diffusers scheduler, or the schedule alone; then the model cannot be saved.
        vae: encodes images to latents; None where x0 are the images.
        space_to_depth: r, without a VAE: x0 is the image with every r x r pixels in one place,
            an exact rearrangement to r r times the channels.

    Raises:
        ModelError: the parts do not fit together.
    """

    family = "layout-to-image"
    folder: ClassVar[str]

    def __init__(
        self,
        denoiser: ModelMixin,
        encoder: LayoutEncoder,
        scheduler: SchedulerMixin | Schedule,
        vae: Autoencoder | None = None,
        *,
        space_to_depth: int = 1,
        name: str | None = None,
    ) -> None:
        self.layout_format = read_format(encoder)
        self._check(denoiser, encoder)
        channels = self._channels(denoiser)
        check_images(channels, vae, space_to_depth)
        schedule, self.scheduler = scheduler, None
        if not isinstance(scheduler, Schedule):
            self.scheduler = scheduler
            config = {"_class_name": type(scheduler).__name__, **scheduler.config}
            schedule = Schedule.from_config(config)
        side = sample_side(denoiser)
        super().__init__(denoiser, vae, schedule, name=name, latent_shape=(channels, side, side))
        self.layout_encoder = encoder
        self.space_to_depth = r = space_to_depth
        channels, *sides = self.image_shape
        self.image_shape = (channels // r**2, *(r * side for side in sides))
        # Cloned: the vocabulary stays in float32 on the CPU and as it is.
        table = encoder.token_embedding.weight.detach().float().cpu().clone()
        self.vocabulary = Vocabulary(table, self.layout_format.token_names())

    def facts(self) -> dict[str, Any]:
        return {
            **super().facts(),
            "space_to_depth": self.space_to_depth,
            "layout_weights": fingerprint(self.layout_encoder),
        }

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """See ``models.protocol.Model.encode``: latents, or the images rearranged."""
        return F.pixel_unshuffle(super().encode(images), self.space_to_depth)

    def _channels(self, denoiser: ModelMixin) -> int:
        """C, of x_t."""
        return denoiser.config.in_channels

    @abstractmethod
    def _check(self, denoiser: ModelMixin, encoder: LayoutEncoder) -> None:
        """That the denoiser takes what the encoder gives, and nothing that is not given."""

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes a diffusers model directory that ``load_model`` reads.

        Raises:
            ModelError: the model has no scheduler, or the directory cannot be written.
        """
        directory = Path(directory)
        if self.scheduler is None:
            raise ModelError("a model that was made of a schedule alone cannot be saved.")
        parts = {
            self.folder: ("diffusers", self.network),
            "layout_encoder": (LayoutEncoder.__module__, self.layout_encoder),
            "scheduler": ("diffusers", self.scheduler),
        }
        if self.vae is not None:
            parts["vae"] = ("diffusers", self.vae)
        index = {
            "_class_name": PIPELINE,
            "_diffusers_version": diffusers.__version__,
            **{part: [library, type(module).__name__] for part, (library, module) in parts.items()},
            "space_to_depth": self.space_to_depth,
        }
        try:
            directory.mkdir(parents=True, exist_ok=True)
            for part, (_, module) in parts.items():
                module.save_pretrained(directory / part)
            text = json.dumps(index, indent=2) + "\n"
            (directory / "model_index.json").write_text(text, encoding="utf-8")
        except OSError as error:
            raise ModelError(
                f"{directory} cannot be written: {error.strerror or error}."
            ) from error


def build_encoder(layout: LayoutFormat, width: int, layers: int, heads: int) -> LayoutEncoder:
    """A layout encoder with random weights.

    Raises:
        ModelError: sizes that do not fit together.
    """
    if width % heads:
        raise ModelError(f"expected a width that {heads} heads divide, got {width}.")
    # By keyword: diffusers takes positional arguments for defaults in from_config.
    return LayoutEncoder(
        vocabulary_size=layout.vocabulary_size,
        n_slots=layout.n_slots,
        width=width,
        layers=layers,
        heads=heads,
        head_dim=width // heads,
        layout=layout.to_dict(),
    )


def read_format(encoder: LayoutEncoder) -> LayoutFormat:
    """What the tokens of a layout encoder mean.

    Raises:
        ModelError: its configuration does not say, or says something else of its sizes.
    """
    config = encoder.config
    if config.layout is None:
        raise ModelError("expected the layout's format in the layout encoder's config, found none.")
    try:
        layout = LayoutFormat.from_dict(config.layout)
    except DiveFastError as error:
        raise ModelError(f"the layout encoder's config cannot be used: {error}") from error
    given = (config.vocabulary_size, config.n_slots)
    if given != (layout.vocabulary_size, layout.n_slots):
        raise ModelError(
            f"expected a layout encoder of {layout.vocabulary_size} tokens and {layout.n_slots} "
            f"slots for its layout, got {given[0]} and {given[1]}."
        )
    return layout


def check_images(channels: int, vae: Autoencoder | None, space_to_depth: Any) -> None:
    """That a denoiser of so many channels takes what images become.

    Raises:
        ModelError: it does not.
    """
    if not is_whole(space_to_depth, 1) or space_to_depth > LARGEST:
        raise ModelError(
            f"space_to_depth must be a number of at least 1, got {shown(space_to_depth)}."
        )
    if channels % space_to_depth**2:
        raise ModelError(
            f"space_to_depth {space_to_depth} needs a multiple of {space_to_depth**2} channels, "
            f"got a denoiser of {channels}."
        )
    if vae is None:
        return
    normalisation(vae)
    if space_to_depth > 1:
        raise ModelError(f"expected a VAE or space_to_depth, got both ({space_to_depth}).")
    if latent_channels(vae) != channels:
        raise ModelError(
            f"the denoiser takes {channels} channels, but its VAE gives {latent_channels(vae)}."
        )
