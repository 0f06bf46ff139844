"""The family "geodiffusion": Stable Diffusion whose prompts hold location tokens (2306.04607).

A model directory of ``StableDiffusionPipeline`` is of this family if its tokenizer knows location
tokens; see ``location_prompts`` for how layouts are written and ``location_encoder`` for how they
are relaxed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from dive_fast.core.layouts import Layout
from dive_fast.core.projection import SLOTS_PER_OBJECT
from dive_fast.core.schedule import Schedule
from dive_fast.core.vocabulary import Vocabulary
from dive_fast.errors import ModelError
from dive_fast.models.autoencoder import encode_latents, image_shape, load_vae
from dive_fast.models.files.checkpoint import fingerprint, load_component, read_json
from dive_fast.models.geodiffusion.encoder import LocationPromptEncoder
from dive_fast.models.geodiffusion.prompts import location_token, read_prompts, read_size
from dive_fast.models.layout_to_image.stages import LayoutStages
from dive_fast.models.stable_diffusion import TEXT_ENCODERS, check_parts, check_unet
from dive_fast.models.text.prompts import Classes
from dive_fast.models.text.towers import PromptEncoder, load_tower
from dive_fast.models.unet.support import check_supported, sample_side


class GeoDiffusion(LayoutStages):
    """A GeoDiffusion checkpoint as layout-to-image model; see ``models.protocol.Model``.

    Args:
        unet: float32, frozen.
        vae: encodes pictures to latents.
        schedule: of the training.
        encoder: makes text embeddings of layouts.
        image_size: side of the pictures; that of the UNet's configuration if None.

    Attributes:
        layout: what the tokens mean.
        vocabulary: of the tokens: table [V, D] and what each one means. A condition is S rows.

    Raises:
        ModelError: the UNet does not come in parts, or the VAE does not divide the size.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        vae: AutoencoderKL,
        schedule: Schedule,
        encoder: LocationPromptEncoder,
        *,
        image_size: int | None = None,
        name: str = "geodiffusion",
        beta: float | None = None,
    ) -> None:
        check_supported(unet)
        self.name = name
        self.network = unet
        self.vae = vae
        self.schedule = schedule
        self.layout_encoder = encoder
        self.layout = encoder.layout
        self.device, self.dtype = unet.device, unet.dtype
        side = sample_side(unet)
        if image_size is not None:
            side = _latent_side(vae, image_size)
        self.latent_shape = (unet.config.in_channels, side, side)
        self.image_shape = image_shape(self.latent_shape, vae)
        self.vocabulary = Vocabulary(encoder.table, self.layout.token_names())
        # Unfitted, beta L is half the squared error summed over the latent: unit variance.
        self.beta = math.prod(self.latent_shape) / 2 if beta is None else beta

    def prompt(self, layout: Layout) -> str:
        """What the pipeline would be given for a layout.

        Raises:
            DiveFastError: the layout cannot be written, see ``LayoutFormat.encode``.
        """
        form = self.layout
        triples = form.encode(layout).view(-1, SLOTS_PER_OBJECT)[: len(layout)]
        first = torch.tensor([form.class_start, *(form.coordinate_start,) * 2])
        return self.layout_encoder.prompts.write([tuple(x) for x in (triples - first).tolist()])

    def identity(self) -> dict[str, Any]:
        """Precision, prompts and fingerprints of the weights; not where the model lies."""
        prompts = self.layout_encoder.prompts
        return {
            "family": "geodiffusion",
            "dtype": str(self.dtype).removeprefix("torch."),
            "layout": self.layout.to_dict(),
            "phrases": list(prompts.phrases),
            "template": prompts.template,
            "image_size": self.image_shape[1],
            "weights": fingerprint(self.unet),
            "text_weights": fingerprint(self.layout_encoder.text_encoder),
            "vae_weights": fingerprint(self.vae),
            "schedule": self.schedule.identity(),
        }

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """x0 = (posterior mean - shift) x scaling factor."""
        return encode_latents(self.vae, images, self.device)


def load(
    directory: Path,
    *,
    name: str,
    allow_pickle: bool = False,
    timestep_embedding: str = "auto",
    classes: Classes | None = None,
    templates: Sequence[str] | None = None,
    average: str | None = None,
    device: torch.device | str = "cpu",
) -> GeoDiffusion:
    """Reads what GeoDiffusion's training saves: a ``StableDiffusionPipeline`` and its tokens.

    ``classes`` and ``templates`` are read by ``location_prompts.read_prompts``; ``device`` is where
    the model will be.

    Raises:
        ModelError: a part is missing, broken or unsupported, or there are no classes.
    """
    for option, value in (("timestep_embedding", timestep_embedding), ("average", average)):
        if value not in (None, "auto"):
            raise ModelError(f"{option} is not for models with location tokens, got {value!r}.")
    index = read_json(directory / "model_index.json")
    encoders = TEXT_ENCODERS[index["_class_name"]]
    if len(encoders) > 1:
        raise ModelError(
            f"{directory} has location tokens and {len(encoders)} text encoders; expected one, as "
            f"in Stable Diffusion 1.x and 2.x."
        )
    check_parts(directory, index, encoders)
    schedule = Schedule.from_config(read_json(directory / "scheduler" / "scheduler_config.json"))
    tower = load_tower(directory, "", encoders[0], allow_pickle)
    known = tower.tokenizer.get_vocab()
    n_tokens = next(i for i in range(len(known) + 1) if location_token(i) not in known)
    prompts = read_prompts(directory, n_tokens, classes, templates)
    encoder = LocationPromptEncoder(tower, prompts)
    unet = load_component(UNet2DConditionModel, directory / "unet", allow_pickle)
    check_unet(unet, PromptEncoder([tower]), directory)
    vae = load_vae(directory, unet.config.in_channels, allow_pickle)
    size = read_size(directory)
    return GeoDiffusion(unet, vae, schedule, encoder, image_size=size, name=name)


def _latent_side(vae: AutoencoderKL, image_size: int) -> int:
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    if image_size % factor:
        raise ModelError(
            f"expected pictures of a multiple of {factor} pixels for this VAE, got {image_size}."
        )
    return image_size // factor
