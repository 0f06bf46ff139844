"""The family "layout-to-image": a UNet that cross-attends to an encoded layout.

See ``layout_stages`` for the conditions and the parts of the network.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from diffusers import SchedulerMixin, UNet2DConditionModel

from dive_fast.errors import ModelError
from dive_fast.layouts import LayoutFormat
from dive_fast.models.autoencoder import (
    AUTOENCODERS,
    Autoencoder,
    encode_latents,
    image_shape,
    load_vae,
)
from dive_fast.models.checkpoint import fingerprint, load_component, read_json
from dive_fast.models.layout_encoder import LayoutEncoder
from dive_fast.models.layout_stages import LayoutStages
from dive_fast.models.layout_support import check_pictures, check_unet, read_format
from dive_fast.models.unet_support import sample_side
from dive_fast.schedule import Schedule
from dive_fast.vocabulary import Vocabulary

PIPELINE = "LayoutToImagePipeline"
HEAD_CHANNELS = 32


class LayoutToImageModel(LayoutStages):
    """A layout-to-image model; see ``models.protocol.Model`` for the attributes.

    Args:
        unet: float32, frozen; cross-attends to what the encoder gives.
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

    def __init__(
        self,
        unet: UNet2DConditionModel,
        encoder: LayoutEncoder,
        scheduler: SchedulerMixin | Schedule,
        vae: Autoencoder | None = None,
        *,
        space_to_depth: int = 1,
        name: str = "layout-to-image",
        beta: float | None = None,
    ) -> None:
        self.layout = read_format(encoder)
        check_unet(unet, encoder)
        check_pictures(unet, vae, space_to_depth)
        self.name = name
        self.unet = self.network = unet
        self.layout_encoder = encoder
        self.vae = vae
        self.space_to_depth = space_to_depth
        self.scheduler, self.schedule = None, scheduler
        if not isinstance(scheduler, Schedule):
            self.scheduler = scheduler
            config = {"_class_name": type(scheduler).__name__, **scheduler.config}
            self.schedule = Schedule.from_config(config)
        self.device, self.dtype = unet.device, unet.dtype
        side = sample_side(unet)
        self.latent_shape = (unet.config.in_channels, side, side)
        self.image_shape = image_shape(self.latent_shape, vae)
        if space_to_depth > 1:
            channels = unet.config.in_channels // space_to_depth**2
            self.image_shape = (channels, side * space_to_depth, side * space_to_depth)
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
            "weights": fingerprint(self.unet),
            "layout_weights": fingerprint(self.layout_encoder),
        }

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """See ``models.protocol.Model.encode``: latents, or the pictures rearranged."""
        if self.vae is not None:
            return encode_latents(self.vae, images, self.device)
        return F.pixel_unshuffle(images.float().to(self.device), self.space_to_depth)

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes a diffusers model directory that ``load_model`` reads.

        Raises:
            ModelError: the model has no scheduler, or the directory cannot be written.
        """
        directory = Path(directory)
        if self.scheduler is None:
            raise ModelError("a model that was made of a schedule alone cannot be saved.")
        parts = {
            "unet": ("diffusers", self.unet),
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
    if width % heads or sample_size % space_to_depth:
        raise ModelError(
            f"expected a width that {heads} heads divide and a sample_size that {space_to_depth} "
            f"divides, got {width} and {sample_size}."
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
    # By keyword: diffusers takes positional arguments for defaults in from_config.
    encoder = LayoutEncoder(
        vocabulary_size=layout.vocabulary_size,
        n_slots=layout.n_slots,
        width=width,
        layers=encoder_layers,
        heads=heads,
        head_dim=width // heads,
        layout=layout.to_dict(),
    )
    return unet, encoder


def load(
    directory: Path, *, name: str, allow_pickle: bool = False, timestep_embedding: str = "auto"
) -> LayoutToImageModel:
    """Reads what ``LayoutToImageModel.save_pretrained`` writes.

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
    unet = load_component(UNet2DConditionModel, directory / "unet", allow_pickle)
    encoder = load_component(LayoutEncoder, directory / "layout_encoder", allow_pickle)
    vae, entry = None, index.get("vae")
    if entry is not None:
        class_name = entry[-1] if isinstance(entry, list) and entry else entry
        if class_name not in AUTOENCODERS:
            raise ModelError(
                f"expected vae in {directory / 'model_index.json'} to be a "
                f"{' or '.join(AUTOENCODERS)}, got {class_name!r}."
            )
        vae = load_vae(directory, unet.config.in_channels, allow_pickle, class_name)
    r = index.get("space_to_depth", 1)
    return LayoutToImageModel(unet, encoder, scheduler, vae, space_to_depth=r, name=name)


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
