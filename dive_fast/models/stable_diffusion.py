"""The family "stable-diffusion": SD 1.x (arXiv 2112.10752), SD 2.x and SDXL (arXiv 2307.01952).

Classes are prompts; a condition is the prompt's embeddings, flattened, for SDXL followed by the
pooled embedding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from dive_fast.errors import ModelError
from dive_fast.models.autoencoder import KL_OR_TINY
from dive_fast.models.base import check_sizes
from dive_fast.models.pipeline import Pipeline
from dive_fast.models.text.encoders import import_transformers, quiet_transformers
from dive_fast.models.text.prompted import PromptedModel
from dive_fast.models.text.towers import SUFFIXES, PromptEncoder
from dive_fast.models.unet import stages
from dive_fast.models.unet.staged import StagedUNet, WholeUNet
from dive_fast.models.unet.support import has_cross_attention

TEXT_ENCODERS = {
    "StableDiffusionPipeline": ("CLIPTextModel",),
    "StableDiffusionImg2ImgPipeline": ("CLIPTextModel",),
    "StableDiffusionXLPipeline": ("CLIPTextModel", "CLIPTextModelWithProjection"),
    "StableDiffusionXLImg2ImgPipeline": ("CLIPTextModel", "CLIPTextModelWithProjection"),
}


class StableDiffusion(WholeUNet, PromptedModel):
    """A Stable Diffusion UNet as classifier; see ``PromptedModel`` for the arguments.

    The network runs whole; ``StagedStableDiffusion`` also offers it in parts.
    """

    family = "stable-diffusion"

    def arguments(self, condition: torch.Tensor) -> dict[str, Any]:
        """A flat condition as the UNet takes it: [M, L, width], and what SDXL adds."""
        condition = condition.to(self.dtype)
        sequence = condition[:, : math.prod(self.text.shape)].unflatten(1, self.text.shape)
        if not self.text.pooled:
            return {"encoder_hidden_states": sequence}
        pooled = condition[:, math.prod(self.text.shape) :]
        _, height, width = self.image_shape
        # Original size, corner of the crop, target size: a whole image of the model's own size.
        ids = torch.tensor([height, width, 0, 0, height, width], device=condition.device)
        added = {"text_embeds": pooled, "time_ids": ids.expand(len(condition), -1)}
        return {"encoder_hidden_states": sequence, "added_cond_kwargs": added}


class StagedStableDiffusion(StagedUNet, StableDiffusion):
    """One whose network can be cut."""


def load(directory: Path, **asked: Any) -> StableDiffusion:
    """Reads what ``StableDiffusionPipeline.save_pretrained`` (or SDXL's) writes.

    The model comes in parts (``StagedStableDiffusion``) where its UNet can be cut.

    Args:
        asked: see ``Pipeline``.

    Raises:
        ModelError: a part is missing, broken or unsupported, or there are no classes.
    """
    pipeline = Pipeline(directory, **asked)
    encoders = TEXT_ENCODERS[pipeline.index["_class_name"]]
    pipeline.check_parts(parts(encoders))
    prompts, schedule = pipeline.prompts(), pipeline.discrete_schedule()
    text = pipeline.text(encoders)
    unet = pipeline.network(UNet2DConditionModel, "unet")
    vae = pipeline.vae(unet.config.in_channels)
    check_unet(unet, text, directory)
    if pipeline.lora is not None:
        pipeline.with_lora(_as_diffusers(unet, text))
    family = StagedStableDiffusion if stages.can_be_cut(unet) else StableDiffusion
    return family(
        unet,
        vae,
        schedule,
        text,
        prompts,
        name=pipeline.name,
        device=pipeline.device,
        zero_unconditional=pipeline.stated.flag("force_zeros_for_empty_prompt", False),
    )


def _as_diffusers(unet: UNet2DConditionModel, text: PromptEncoder) -> Any:
    """The pipeline of these parts, without what a LoRA has nothing to do with."""
    with quiet_transformers(import_transformers()):  # the pipelines' imports warn
        from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    own: dict[str, Any] = {
        f"{part}{suffix}": value
        for suffix, tower in zip(SUFFIXES, text.towers, strict=False)
        for part, value in (("tokenizer", tower.tokenizer), ("text_encoder", tower.encoder))
    }
    if text.pooled:
        kind, own["add_watermarker"] = StableDiffusionXLPipeline, False
    else:
        kind, own["requires_safety_checker"] = StableDiffusionPipeline, False
        own |= {"safety_checker": None, "feature_extractor": None}
    # Of an old UNet the constructor would change the configuration.
    pipeline = kind(vae=None, unet=None, scheduler=None, **own)
    pipeline.register_modules(unet=unet)
    return pipeline


def parts(encoders: Sequence[str]) -> dict[str, str | Sequence[str]]:
    """The classes of a pipeline's parts."""
    text = {f"text_encoder{suffix}": name for suffix, name in zip(SUFFIXES, encoders, strict=False)}
    return {"unet": "UNet2DConditionModel", "vae": KL_OR_TINY, **text}


def check_unet(unet: UNet2DConditionModel, text: PromptEncoder, directory: Path) -> None:
    """That the network takes what the text encoders give, and nothing that is not given.

    Raises:
        ModelError: it does not.
    """
    config = unet.config
    if unet.class_embedding is not None:
        raise ModelError(
            f"the unet in {directory} takes class labels beside the prompt, which is not supported."
        )
    if config.encoder_hid_dim_type not in (None, "text_proj"):
        raise ModelError(
            f"the unet in {directory} takes images beside the prompt "
            f"(encoder_hid_dim_type {config.encoder_hid_dim_type!r}), which is not supported."
        )
    if not any(map(has_cross_attention, (*unet.down_blocks, unet.mid_block, *unet.up_blocks))):
        raise ModelError(f"the unet in {directory} has no cross-attention to read a prompt with.")
    if config.conv_in_kernel % 2 == 0 or config.conv_out_kernel % 2 == 0:
        raise ModelError(
            f"expected odd kernels in the unet in {directory}, which keep the size, got "
            f"{config.conv_in_kernel} (conv_in) and {config.conv_out_kernel} (conv_out)."
        )
    check_sizes(unet, f"unet in {directory}")
    # Where a projection stands before the network, it is what takes the text.
    projected = config.encoder_hid_dim is not None
    widths = config.encoder_hid_dim if projected else config.cross_attention_dim
    widths = {widths} if isinstance(widths, int) else set(_flat(widths))
    if widths != {text.shape[1]}:
        raise ModelError(
            f"the unet in {directory} takes embeddings of {', '.join(map(str, sorted(widths)))}, "
            f"but its text encoder gives {text.shape[1]}."
        )
    if config.time_cond_proj_dim is not None:
        raise ModelError(
            f"the unet in {directory} is conditioned on a guidance scale (time_cond_proj_dim), "
            f"which is not supported."
        )
    kind = "text_time" if text.pooled else None
    if config.addition_embed_type != kind:
        raise ModelError(
            f"expected addition_embed_type of the unet in {directory} to be {kind!r}, "
            f"got {config.addition_embed_type!r}."
        )
    if kind is not None:
        # Six numbers: original size, corner of the crop, target size.
        given = 6 * config.addition_time_embed_dim + text.pooled
        if config.projection_class_embeddings_input_dim != given:
            raise ModelError(
                f"the unet in {directory} takes {config.projection_class_embeddings_input_dim} "
                f"added values, but six sizes and the pooled text give {given}."
            )


def _flat(values: Any) -> list[int]:
    if isinstance(values, int):
        return [values]
    return [inner for value in values for inner in _flat(value)]
