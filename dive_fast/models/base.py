"""What all model families share: a frozen network over latents, and the layouts that some take.

A family is its differences. It states

    family        what ``identity`` calls it
    predict       x_t, t and a condition to the prediction (``unet.staged`` has that of all UNets)
    vocabulary    the embeddings of its answers, set after ``super().__init__``

and what else it has of its own: ``moved`` if more than the network computes, ``facts`` for what
tells two of its models apart beside their weights, the stages of ``protocol.StagedModel`` if the
network can be cut, and a function ``load`` that reads a ``Pipeline``. ``text.prompted`` is the base
of those whose answers are prompts.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import nn

from dive_fast.core.layouts import LayoutFormat
from dive_fast.core.loss_weights import LossWeights
from dive_fast.core.schedule import Schedule
from dive_fast.core.timesteps import TimestepWeights
from dive_fast.core.vocabulary import Vocabulary
from dive_fast.errors import ModelError
from dive_fast.models.autoencoder import Autoencoder, encode_latents, image_shape
from dive_fast.models.failing import naming
from dive_fast.models.files.checkpoint import fingerprint
from dive_fast.models.files.lora import Lora


class LatentModel(ABC):
    """A model family; see ``models.protocol.Model`` for the attributes.

    Args:
        network: float32, frozen.
        vae: encodes images to latents; None where x0 are the images.
        schedule: of the training.
        name: what the user called it; the family's if None.
        latent_shape: (C, h, w) of x0; what the network's configuration says if None.

    Attributes:
        timesteps: where strategies take their probes if nobody says; evenly if None.
        loss_weights: what a classifier's losses count there; alike if None.
        lora: the LoRA that was fused into the weights; None without.
    """

    family: ClassVar[str]
    vocabulary: Vocabulary
    timesteps: TimestepWeights | None = None
    loss_weights: LossWeights | None = None
    lora: Lora | None = None

    def __init__(
        self,
        network: nn.Module,
        vae: Autoencoder | None,
        schedule: Schedule,
        *,
        name: str | None = None,
        latent_shape: tuple[int, int, int] | None = None,
    ) -> None:
        self.name = self.family if name is None else name
        self.network = network
        self.vae = vae
        self.schedule = schedule
        # diffusers' own properties walk all modules at every call.
        self.device, self.dtype = network.device, network.dtype
        if latent_shape is None:
            side = sample_side(network)
            latent_shape = (network.config.in_channels, side, side)
        self.latent_shape = latent_shape
        self.image_shape = image_shape(latent_shape, vae)
        # Unfitted, beta L is half the squared error summed over the latent: unit variance.
        self.inverse_temperature = math.prod(latent_shape) / 2

    def to(self, device: torch.device, dtype: torch.dtype) -> LatentModel:
        """Moves the network; the VAE stays in float32, as it runs once per image."""
        for module in self.moved():
            # ModelMixin.to() warns about modules to keep in float32 even where there are none.
            nn.Module.to(module, device, dtype)
        if self.vae is not None:
            self.vae.to(device)
        self.device, self.dtype = torch.device(device), dtype
        return self

    def moved(self) -> Iterable[nn.Module]:
        """What ``predict`` runs."""
        return (self.network,)

    def identity(self) -> dict[str, Any]:
        """Precision, conventions and fingerprints of the weights; not where the model lies."""
        return {
            "family": self.family,
            "dtype": str(self.dtype).removeprefix("torch."),
            **self.facts(),
            **({} if self.lora is None else self.lora.facts()),
            "weights": fingerprint(self.network),
            "vae_weights": None if self.vae is None else fingerprint(self.vae),
            "schedule": self.schedule.identity(),
        }

    def facts(self) -> dict[str, Any]:
        """The family's own entries of ``identity``, for JSON."""
        return {}

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """x0 as ``autoencoder`` has it; the images themselves without a VAE."""
        if self.vae is None:
            return images.float().to(self.device)
        with naming(self.name):
            return encode_latents(self.vae, images, self.device)

    @abstractmethod
    def predict(self, x_t: torch.Tensor, t: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """See ``models.protocol.Model.predict``."""


class LayoutConditioned(LatentModel):
    """A family that takes layouts: a condition is the embeddings of S tokens end to end, [N, S D].

    Attributes:
        layout_format: what the tokens mean.
        vocabulary: of the tokens: table [V, D] and what each one means.
    """

    layout_format: LayoutFormat

    def facts(self) -> dict[str, Any]:
        return {**super().facts(), "layout": self.layout_format.to_dict()}

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens int64 [N, S] to conditions, float32 [N, S D] on the CPU.

        Raises:
            ModelError: another shape or dtype, or tokens outside the vocabulary.
        """
        slots, size = self.layout_format.n_slots, self.layout_format.vocabulary_size
        if tokens.dtype != torch.int64 or tokens.dim() != 2 or tokens.shape[1] != slots:
            raise ModelError(
                f"expected tokens int64 of shape [N, {slots}], "
                f"got {tokens.dtype} {list(tokens.shape)}."
            )
        if ((tokens < 0) | (tokens >= size)).any():
            raise ModelError(
                f"expected tokens in [0, {size}), got {int(tokens.min())} to {int(tokens.max())}."
            )
        return self.vocabulary.table[tokens.cpu()].flatten(1)

    def slots(self, condition: torch.Tensor) -> torch.Tensor:
        """[N, S D] to [N, S, D].

        Raises:
            ModelError: another shape.
        """
        shape = (self.layout_format.n_slots, self.vocabulary.dim)
        if condition.dim() != 2 or condition.shape[1] != math.prod(shape):
            raise ModelError(
                f"the condition of the layout-to-image model {self.name} is the embeddings of "
                f"{shape[0]} tokens, expected [N, {math.prod(shape)}], got {list(condition.shape)}."
            )
        return condition.unflatten(1, shape)


def sample_side(network: nn.Module) -> int | None:
    """The side of the latents, None where the configuration does not state a square."""
    size = network.config.sample_size
    if isinstance(size, list | tuple) and len(set(size)) == 1:
        size = size[0]
    return size if isinstance(size, int) else None


def check_sizes(network: nn.Module, what: str, channels: int | None = None) -> None:
    """That latents are square, in whole patches, and the output has their channels, or twice.

    Args:
        channels: of the latents; all that the network takes if None.

    Raises:
        ModelError: they are not, or it has not.
    """
    config = network.config
    if sample_side(network) is None:
        raise ModelError(
            f"expected the {what} to state one sample_size for both sides, "
            f"got {config.sample_size!r}."
        )
    patch = getattr(config, "patch_size", None) or 1
    if sample_side(network) % patch:
        raise ModelError(
            f"expected a sample_size of the {what} that its patch_size {patch} divides, "
            f"got {config.sample_size}."
        )
    channels = config.in_channels if channels is None else channels
    if config.out_channels not in (None, channels, 2 * channels):
        raise ModelError(
            f"expected {channels} or {2 * channels} output channels of the {what}, got "
            f"{config.out_channels}."
        )
