"""What all layout-to-image models share: the layout, the pictures, the directory.

A condition is the token embeddings of a layout end to end, [M, S D]; the layout encoder turns them
into what the denoiser attends to, [M, S, D].
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import torch
import torch.nn.functional as F
from diffusers import ModelMixin, SchedulerMixin
from torch import nn

from dive_fast.core.layouts import LayoutFormat
from dive_fast.core.schedule import Schedule
from dive_fast.core.vocabulary import Vocabulary
from dive_fast.errors import ModelError
from dive_fast.models.autoencoder import Autoencoder, encode_latents, image_shape
from dive_fast.models.files.checkpoint import fingerprint
from dive_fast.models.layout_to_image.encoder import LayoutEncoder
from dive_fast.models.layout_to_image.support import check_pictures, embed_tokens, read_format
from dive_fast.models.unet.support import sample_side

PIPELINE = "LayoutToImagePipeline"


class LayoutConditioned:
    """What takes the token embeddings of a layout as condition; subclasses set the attributes.

    Attributes:
        network: the denoiser, frozen.
        layout_encoder: token embeddings [N, S, D] to what the denoiser attends to, [N, L, W].
        vae: encodes pictures to latents, or None.
        layout: what the tokens mean.
        vocabulary: of the tokens: table [V, D] and what each one means.
    """

    name: str
    network: nn.Module
    layout_encoder: nn.Module
    vae: Autoencoder | None
    layout: LayoutFormat
    vocabulary: Vocabulary
    device: torch.device
    dtype: torch.dtype

    def to(self, device: torch.device, dtype: torch.dtype) -> LayoutConditioned:
        """Moves the denoiser and the layout encoder; the VAE stays in float32."""
        # ModelMixin.to() warns about modules to keep in float32 even where there are none.
        torch.nn.Module.to(self.network, device, dtype)
        torch.nn.Module.to(self.layout_encoder, device, dtype)
        if self.vae is not None:
            self.vae.to(device)
        self.device, self.dtype = torch.device(device), dtype
        return self

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens int64 [N, S] to conditions, float32 [N, S D] on the CPU.

        Raises:
            ModelError: another shape or dtype, or tokens outside the vocabulary.
        """
        return embed_tokens(self.layout, self.vocabulary.table, tokens)

    def encode_layout(self, condition: torch.Tensor) -> torch.Tensor:
        """[N, S D] to what the denoiser attends to, [N, L, W]; differentiable.

        Raises:
            ModelError: another shape.
        """
        shape = (self.layout.n_slots, self.vocabulary.dim)
        if condition.dim() != 2 or condition.shape[1] != math.prod(shape):
            raise ModelError(
                f"the condition of the layout-to-image model {self.name} is the embeddings of "
                f"{shape[0]} tokens, expected [N, {math.prod(shape)}], got {list(condition.shape)}."
            )
        return self.layout_encoder(condition.to(self.dtype).unflatten(1, shape))


class LayoutModel(LayoutConditioned, ABC):
    """A layout-to-image model; see ``models.protocol.Model`` for the attributes.

    Subclasses name the folder of their denoiser, check it in ``_check`` and call it in ``predict``.

    Args:
        denoiser: float32, frozen; attends to what the encoder gives.
        encoder: float32, frozen; its configuration holds the layout's format.
        scheduler: a diffusers scheduler, or the schedule alone; then the model cannot be saved.
        vae: encodes pictures to latents; None where x0 are the pictures.
        space_to_depth: r, without a VAE: x0 is the picture with every r x r pixels in one place,
            an exact rearrangement to r r times the channels.

    Attributes:
        layout: what the tokens mean.
        vocabulary: of the tokens: table [V, D] and what each one means. A condition is S rows.

    Raises:
        ModelError: the parts do not fit together.
    """

    folder: ClassVar[str]

    def __init__(
        self,
        denoiser: ModelMixin,
        encoder: LayoutEncoder,
        scheduler: SchedulerMixin | Schedule,
        vae: Autoencoder | None = None,
        *,
        space_to_depth: int = 1,
        name: str = "layout-to-image",
        beta: float | None = None,
    ) -> None:
        self.layout = read_format(encoder)
        self._check(denoiser, encoder)
        channels, side = denoiser.config.in_channels, sample_side(denoiser)
        check_pictures(channels, vae, space_to_depth)
        self.name = name
        self.network = denoiser
        self.layout_encoder = encoder
        self.vae = vae
        self.space_to_depth = space_to_depth
        self.scheduler, self.schedule = None, scheduler
        if not isinstance(scheduler, Schedule):
            self.scheduler = scheduler
            config = {"_class_name": type(scheduler).__name__, **scheduler.config}
            self.schedule = Schedule.from_config(config)
        self.device, self.dtype = denoiser.device, denoiser.dtype
        self.latent_shape = (channels, side, side)
        self.image_shape = image_shape(self.latent_shape, vae)
        if space_to_depth > 1:
            side *= space_to_depth
            self.image_shape = (channels // space_to_depth**2, side, side)
        # Cloned: the vocabulary stays in float32 on the CPU and as it is.
        table = encoder.token_embedding.weight.detach().float().cpu().clone()
        self.vocabulary = Vocabulary(table, self.layout.token_names())
        # Unfitted, beta L is half the squared error summed over the latent: unit variance.
        self.beta = math.prod(self.latent_shape) / 2 if beta is None else beta

    def identity(self) -> dict[str, Any]:
        """Precision, format and fingerprints of the weights; not where the model lies."""
        return {
            "family": "layout-to-image",
            "dtype": str(self.dtype).removeprefix("torch."),
            "layout": self.layout.to_dict(),
            "space_to_depth": self.space_to_depth,
            "weights": fingerprint(self.network),
            "layout_weights": fingerprint(self.layout_encoder),
            "vae_weights": None if self.vae is None else fingerprint(self.vae),
            "schedule": self.schedule.identity(),
        }

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """See ``models.protocol.Model.encode``: latents, or the pictures rearranged."""
        if self.vae is not None:
            return encode_latents(self.vae, images, self.device)
        return F.pixel_unshuffle(images.float().to(self.device), self.space_to_depth)

    @abstractmethod
    def predict(self, x_t: torch.Tensor, t: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """See ``models.protocol.Model.predict``; condition is [M, S D]."""

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
