"""The family "geodiffusion": Stable Diffusion whose prompts hold location tokens (2306.04607).

A model directory of ``StableDiffusionPipeline`` is of this family if its tokenizer knows location
tokens; see ``prompts`` for how layouts are written and ``encoder`` for how they are relaxed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from dive_fast.core.layouts import Layout
from dive_fast.core.projection import SLOTS_PER_OBJECT
from dive_fast.core.schedule import Schedule
from dive_fast.core.vocabulary import Vocabulary
from dive_fast.errors import ModelError
from dive_fast.models.autoencoder import Autoencoder, image_shape
from dive_fast.models.files.checkpoint import fingerprint
from dive_fast.models.geodiffusion.encoder import LocationPromptEncoder
from dive_fast.models.geodiffusion.prompts import location_token, read_prompts, read_size
from dive_fast.models.layout_to_image.unet import LayoutUNet
from dive_fast.models.pipeline import Pipeline
from dive_fast.models.stable_diffusion import TEXT_ENCODERS, check_unet, parts
from dive_fast.models.unet.support import check_supported


class GeoDiffusion(LayoutUNet):
    """A GeoDiffusion checkpoint as layout-to-image model; see ``models.protocol.Model``.

    Args:
        unet: float32, frozen.
        vae: encodes images to latents.
        schedule: of the training.
        encoder: makes text embeddings of layouts.
        image_size: side of the images; that of the UNet's configuration if None.

    Attributes:
        layout_format: what the tokens mean.
        vocabulary: of the tokens: table [V, D] and what each one means. A condition is S rows.

    Raises:
        ModelError: the UNet does not come in parts, or the VAE does not divide the size.
    """

    family = "geodiffusion"

    def __init__(
        self,
        unet: UNet2DConditionModel,
        vae: Autoencoder,
        schedule: Schedule,
        encoder: LocationPromptEncoder,
        *,
        image_size: int | None = None,
        name: str | None = None,
    ) -> None:
        check_supported(unet)
        shape = None
        if image_size is not None:
            side = _latent_side(vae, image_size)
            shape = (unet.config.in_channels, side, side)
        super().__init__(unet, vae, schedule, name=name, latent_shape=shape)
        self.layout_encoder = encoder
        self.layout_format = encoder.layout_format
        self.vocabulary = Vocabulary(encoder.table, self.layout_format.token_names())

    def prompt(self, layout: Layout) -> str:
        """What the pipeline would be given for a layout.

        Raises:
            DiveFastError: the layout cannot be written, see ``LayoutFormat.encode``.
        """
        form = self.layout_format
        triples = form.encode(layout).view(-1, SLOTS_PER_OBJECT)[: len(layout)]
        first = torch.tensor([form.class_start, *(form.coordinate_start,) * 2])
        return self.layout_encoder.prompts.write([tuple(x) for x in (triples - first).tolist()])

    def facts(self) -> dict[str, Any]:
        prompts = self.layout_encoder.prompts
        return {
            **super().facts(),
            "phrases": list(prompts.phrases),
            "template": prompts.template,
            "image_size": self.image_shape[1],
            "text_weights": fingerprint(self.layout_encoder.text_encoder),
        }


def load(
    directory: Path,
    *,
    timestep_embedding: str = "auto",
    average: str | None = None,
    **asked: Any,
) -> GeoDiffusion:
    """Reads what GeoDiffusion's training saves: a ``StableDiffusionPipeline`` and its tokens.

    Classes and templates are read by ``geodiffusion.prompts.read_prompts``.

    Args:
        timestep_embedding, average: refused.
        asked: see ``Pipeline``.

    Raises:
        ModelError: a part is missing, broken or unsupported, or there are no classes.
    """
    for option, value in (("timestep_embedding", timestep_embedding), ("average", average)):
        if value not in (None, "auto"):
            raise ModelError(f"{option} is not for models with location tokens, got {value!r}.")
    pipeline = Pipeline(directory, **asked)
    encoders = TEXT_ENCODERS[pipeline.index["_class_name"]]
    if len(encoders) > 1:
        raise ModelError(
            f"{directory} has location tokens and {len(encoders)} text encoders; expected one, as "
            f"in Stable Diffusion 1.x and 2.x."
        )
    pipeline.check_parts(parts(encoders))
    schedule, text = pipeline.discrete_schedule(), pipeline.text(encoders)
    (tower,) = text.towers
    known = tower.tokenizer.get_vocab()
    n_tokens = next(i for i in range(len(known) + 1) if location_token(i) not in known)
    prompts = read_prompts(directory, n_tokens, pipeline.classes, pipeline.templates)
    encoder = LocationPromptEncoder(tower, prompts)
    unet = pipeline.network(UNet2DConditionModel, "unet")
    check_unet(unet, text, directory)
    vae = pipeline.vae(unet.config.in_channels)
    size = read_size(directory)
    return GeoDiffusion(unet, vae, schedule, encoder, image_size=size, name=pipeline.name)


def _latent_side(vae: Autoencoder, image_size: int) -> int:
    factor = image_shape((1, 1, 1), vae)[1]
    if image_size % factor:
        raise ModelError(
            f"expected images of a multiple of {factor} pixels for this VAE, got {image_size}."
        )
    return image_size // factor
