"""A text-conditional UNet that the caller already holds, with the conditions to choose among."""

from __future__ import annotations

import math
from typing import Any

import torch

from dive_fast.core.schedule import Schedule
from dive_fast.core.vocabulary import Vocabulary
from dive_fast.errors import ModelError
from dive_fast.models.unet import stages
from dive_fast.models.unet.staged import StagedUNet, WholeUNet


class GivenUNet(WholeUNet):
    """A ``UNet2DConditionModel``, or anything called like one, behind ``models.protocol.Model``.

    It stays where it is and computes in its own precision. There is no VAE: x0 are latents.

    Args:
        unet: called as ``unet(x_t, t, encoder_hidden_states=...)``, answers with ``.sample``.
        text_embeds: float [C, L, D], one sequence per answer.
        schedule: the noise schedule, and what the prediction is compared to.
        latent_shape: (C, h, w) of x0.

    Raises:
        ModelError: conditions of another width than the network's, latents of another number of
            channels, or a network that needs more than text (SDXL).
    """

    name = "the given unet"

    def __init__(
        self,
        unet: Any,
        text_embeds: torch.Tensor,
        schedule: Schedule,
        latent_shape: tuple[int, int, int],
    ) -> None:
        _check(unet, text_embeds, latent_shape)
        self._unet = unet
        self.schedule = schedule
        self.latent_shape = self.image_shape = tuple(latent_shape)
        # diffusers' own properties walk all modules at every call.
        self.device = getattr(unet, "device", text_embeds.device)
        self.dtype = getattr(unet, "dtype", text_embeds.dtype)
        self.text_shape = tuple(text_embeds.shape[1:])
        names = [f"prompt {i}" for i in range(len(text_embeds))]
        # Cloned: what was computed in inference mode cannot take part in a backward.
        self.vocabulary = Vocabulary(text_embeds.detach().float().flatten(1).clone(), names)
        self.inverse_temperature = math.prod(latent_shape) / 2

    def identity(self) -> dict[str, Any]:
        return {
            "family": "given",
            "dtype": str(self.dtype).removeprefix("torch."),
            "schedule": self.schedule.identity(),
        }

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        raise ModelError("a given unet has no VAE: expected latents, got images.")

    @property
    def unet(self) -> Any:
        """It need not be a ``torch.nn.Module``, as ``network`` says."""
        return self._unet

    def arguments(self, condition: torch.Tensor) -> dict[str, Any]:
        """[N, L * D] to [N, L, D]."""
        text = condition.to(self.dtype).unflatten(1, self.text_shape)
        return {"encoder_hidden_states": text}


class StagedGivenUNet(StagedUNet, GivenUNet):
    """One that also offers its network in parts."""


def wrap_unet(
    unet: Any,
    text_embeds: torch.Tensor,
    schedule: Schedule,
    latent_shape: tuple[int, int, int],
) -> GivenUNet:
    """The network behind ``Model``, in parts where it can be cut; arguments of ``GivenUNet``."""
    family = StagedGivenUNet if stages.can_be_cut(unet) else GivenUNet
    return family(unet, text_embeds, schedule, latent_shape)


def _check(unet: Any, text_embeds: torch.Tensor, latent_shape: tuple[int, int, int]) -> None:
    if not callable(unet):
        raise ModelError(f"expected a unet that can be called, got {type(unet).__name__}.")
    config = getattr(unet, "config", None)
    width = getattr(config, "cross_attention_dim", None)
    if isinstance(width, int) and getattr(config, "encoder_hid_dim", None) is None:
        if text_embeds.shape[2] != width:
            raise ModelError(
                f"text_embeds must have shape [C, L, {width}] for this unet, "
                f"got {list(text_embeds.shape)}."
            )
    channels = getattr(config, "in_channels", latent_shape[0])
    if channels != latent_shape[0]:
        raise ModelError(
            f"latent must have shape [1, {channels}, h, w] for this unet, got {[1, *latent_shape]}."
        )
    added = getattr(config, "addition_embed_type", None)
    if added not in (None, "text"):
        raise ModelError(
            f"expected a unet conditioned on text_embeds alone, got one that also needs {added!r} "
            f"(as SDXL does)."
        )
