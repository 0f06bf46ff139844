"""The UNets of the family "layout-to-image", and of all that attend to an encoded layout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import ModelMixin, UNet2DConditionModel

from dive_fast.core.layouts import LayoutFormat
from dive_fast.errors import ModelError
from dive_fast.models.base import check_sizes
from dive_fast.models.layout_to_image.base import (
    EncodedLayout,
    LayoutModel,
    build_encoder,
)
from dive_fast.models.layout_to_image.encoder import LayoutEncoder
from dive_fast.models.unet.staged import StagedUNet
from dive_fast.models.unet.support import check_supported

HEAD_CHANNELS = 32


class LayoutUNet(StagedUNet, EncodedLayout):
    """A UNet that cross-attends to an encoded layout, which is encoded once per condition."""

    def arguments(self, condition: torch.Tensor) -> dict[str, Any]:
        """The encoded layout in the place of a text."""
        return {"encoder_hidden_states": self.encode_layout(condition)}


class LayoutToImageModel(LayoutUNet, LayoutModel):
    """A UNet that was trained with its layout encoder; see ``LayoutModel`` for the arguments."""

    folder = "unet"

    def _check(self, denoiser: ModelMixin, encoder: LayoutEncoder) -> None:
        check_unet(denoiser, encoder)


def build_layout_model(
    layout: LayoutFormat,
    *,
    sample_size: int,
    in_channels: int,
    channels: Sequence[int],
    width: int,
    encoder_layers: int,
    heads: int,
    layers_per_block: int = 2,
    attention: Sequence[bool] | None = None,
    transformer_depth: int = 1,
    head_channels: int = HEAD_CHANNELS,
    norm_groups: int = 32,
    space_to_depth: int = 1,
) -> tuple[UNet2DConditionModel, LayoutEncoder]:
    """A UNet and a layout encoder with random weights, to be trained.

    The forward of a training step is
    ``unet(x_t, t, encoder_hidden_states=encoder(encoder.token_embedding(tokens))).sample``, with
    ``x_t`` made of ``F.pixel_unshuffle(images, space_to_depth)``.

    Args:
        layout: what the tokens mean.
        sample_size, in_channels: of the latents, or of the images where there is no VAE, before
            ``space_to_depth``.
        channels: of the UNet's levels, from the highest resolution to the lowest.
        width: D, of the layout encoder and of the cross-attentions.
        encoder_layers: of the layout encoder.
        heads: of the layout encoder, width / heads channels each.
        layers_per_block: resnets of a level on the way down (one more on the way up).
        attention: which levels have self- and cross-attention; all but the first unless said.
        transformer_depth: transformer blocks of each attention.
        head_channels: of the UNet's attention heads.
        norm_groups: of the UNet's group norms; must divide the channels.

    Raises:
        ModelError: sizes that do not fit together.
    """
    if attention is None:
        attention = [level > 0 or len(channels) == 1 for level in range(len(channels))]
    if len(attention) != len(channels) or not any(attention):
        raise ModelError(
            f"expected attention in at least one of {len(channels)} levels, got {list(attention)}."
        )
    if wrong := [c for c in channels if c % head_channels or c % norm_groups]:
        raise ModelError(
            f"expected channels that heads of {head_channels} and {norm_groups} groups divide, "
            f"got {wrong[0]}."
        )
    if sample_size % space_to_depth:
        raise ModelError(
            f"expected a sample_size that {space_to_depth} divides, got {sample_size}."
        )
    down = tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attention)
    up = tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention))
    unet = UNet2DConditionModel(
        sample_size=sample_size // space_to_depth,
        in_channels=in_channels * space_to_depth**2,
        out_channels=in_channels * space_to_depth**2,
        block_out_channels=tuple(channels),
        layers_per_block=layers_per_block,
        down_block_types=down,
        up_block_types=up,
        transformer_layers_per_block=transformer_depth,
        # diffusers takes the number of heads under this name.
        attention_head_dim=tuple(c // head_channels for c in channels),
        cross_attention_dim=width,
        norm_num_groups=norm_groups,
    )
    return unet, build_encoder(layout, width, encoder_layers, heads)


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
    check_sizes(unet, "denoiser")
