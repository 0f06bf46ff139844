"""The family "layout-to-image": a UNet, or a transformer, that attends to an encoded layout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import diffusers
from diffusers import (
    ModelMixin,
    SchedulerMixin,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)

from dive_fast.core.layouts import LayoutFormat
from dive_fast.core.schedule import Schedule
from dive_fast.errors import ModelError
from dive_fast.models.autoencoder import AUTOENCODERS, load_vae
from dive_fast.models.files.checkpoint import load_component, read_json
from dive_fast.models.layout_to_image.base import LayoutModel, build_encoder
from dive_fast.models.layout_to_image.encoder import LayoutEncoder
from dive_fast.models.layout_to_image.stages import LayoutStages
from dive_fast.models.layout_to_image.support import check_unet
from dive_fast.models.layout_to_image.transformer import LayoutTransformerModel

HEAD_CHANNELS = 32


class LayoutToImageModel(LayoutStages, LayoutModel):
    """A UNet that cross-attends to an encoded layout; see ``LayoutModel`` for the arguments."""

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
        sample_size, in_channels: of the latents, or of the pictures where there is no VAE, before
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


def load(
    directory: Path, *, name: str, allow_pickle: bool = False, timestep_embedding: str = "auto"
) -> LayoutModel:
    """Reads what ``LayoutModel.save_pretrained`` writes.

    Raises:
        ModelError: a part is missing, broken or unsupported.
    """
    if timestep_embedding != "auto":
        raise ModelError(
            f"timestep_embedding is for models of the family dit, got {timestep_embedding!r} "
            f"for {name}."
        )
    index = read_json(directory / "model_index.json")
    scheduler = _load_scheduler(directory)
    family, part = LayoutToImageModel, UNet2DConditionModel
    if LayoutTransformerModel.folder in index:
        family, part = LayoutTransformerModel, SD3Transformer2DModel
    denoiser = load_component(part, directory / family.folder, allow_pickle)
    encoder = load_component(LayoutEncoder, directory / "layout_encoder", allow_pickle)
    vae, entry = None, index.get("vae")
    if entry is not None:
        class_name = entry[-1] if isinstance(entry, list) and entry else entry
        if class_name not in AUTOENCODERS:
            raise ModelError(
                f"expected vae in {directory / 'model_index.json'} to be a "
                f"{' or '.join(AUTOENCODERS)}, got {class_name!r}."
            )
        vae = load_vae(directory, denoiser.config.in_channels, allow_pickle, class_name)
    r = index.get("space_to_depth", 1)
    return family(denoiser, encoder, scheduler, vae, space_to_depth=r, name=name)


def _load_scheduler(directory: Path) -> SchedulerMixin:
    config = read_json(directory / "scheduler" / "scheduler_config.json")
    Schedule.from_config(config)  # says what is wrong with it
    scheduler_class = getattr(diffusers, str(config.get("_class_name")), None)
    if not (isinstance(scheduler_class, type) and issubclass(scheduler_class, SchedulerMixin)):
        raise ModelError(
            f"expected the _class_name of a diffusers scheduler in {directory / 'scheduler'}, "
            f"got {config.get('_class_name')!r}."
        )
    return scheduler_class.from_config(config)
