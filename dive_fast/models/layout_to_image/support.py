"""Whether the parts of a layout-to-image model fit together, and tokens to conditions."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ModelMixin, UNet2DConditionModel

from dive_fast.core.layouts import LayoutFormat
from dive_fast.core.numbers import is_whole
from dive_fast.errors import DiveFastError, ModelError
from dive_fast.models.autoencoder import Autoencoder, latent_channels
from dive_fast.models.layout_to_image.encoder import LayoutEncoder
from dive_fast.models.unet.support import check_supported, sample_side


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


def check_unet(unet: UNet2DConditionModel, encoder: LayoutEncoder) -> None:
    """That the UNet takes what the encoder gives, and nothing that is not given.

    Raises:
        ModelError: it does not.
    """
    check_supported(unet)
    config = unet.config
    if config.cross_attention_dim != encoder.config.width:
        raise ModelError(
            f"the unet takes embeddings of {config.cross_attention_dim}, but its layout encoder "
            f"gives {encoder.config.width}."
        )
    if config.addition_embed_type is not None:
        raise ModelError(
            f"expected a unet that is conditioned on the layout alone, got one with "
            f"addition_embed_type {config.addition_embed_type!r}."
        )
    check_sizes(unet)


def check_sizes(denoiser: ModelMixin) -> None:
    """That the latents are square and the noise has their channels, or twice as many.

    Raises:
        ModelError: they are not, or it has not.
    """
    config = denoiser.config
    if sample_side(denoiser) is None:
        raise ModelError(
            f"expected the denoiser to state one sample_size for both sides, "
            f"got {config.sample_size!r}."
        )
    if config.out_channels not in (config.in_channels, 2 * config.in_channels):
        raise ModelError(
            f"expected {config.in_channels} or {2 * config.in_channels} output channels of the "
            f"denoiser, got {config.out_channels}."
        )


def check_pictures(channels: int, vae: Autoencoder | None, space_to_depth: Any) -> None:
    """That a denoiser of so many channels takes what pictures become.

    Raises:
        ModelError: it does not.
    """
    if not is_whole(space_to_depth, 1):
        raise ModelError(f"space_to_depth must be a number of at least 1, got {space_to_depth!r}.")
    if channels % space_to_depth**2:
        raise ModelError(
            f"space_to_depth {space_to_depth} needs a multiple of {space_to_depth**2} channels, "
            f"got a denoiser of {channels}."
        )
    if vae is None:
        return
    if space_to_depth > 1:
        raise ModelError(f"expected a VAE or space_to_depth, got both ({space_to_depth}).")
    if latent_channels(vae) != channels:
        raise ModelError(
            f"the denoiser takes {channels} channels, but its VAE gives {latent_channels(vae)}."
        )


def embed_tokens(layout: LayoutFormat, table: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Tokens int64 [N, S] to conditions [N, S D]: their rows of the table [V, D] end to end.

    Raises:
        ModelError: another shape or dtype, or tokens outside the vocabulary.
    """
    slots, size = layout.n_slots, layout.vocabulary_size
    if tokens.dtype != torch.int64 or tokens.dim() != 2 or tokens.shape[1] != slots:
        raise ModelError(
            f"expected tokens int64 of shape [N, {slots}], got {tokens.dtype} {list(tokens.shape)}."
        )
    if ((tokens < 0) | (tokens >= size)).any():
        raise ModelError(
            f"expected tokens in [0, {size}), got {int(tokens.min())} to {int(tokens.max())}."
        )
    return table[tokens.cpu()].flatten(1)
