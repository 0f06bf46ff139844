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
from diffusers import AutoencoderKL, UNet2DConditionModel

from dive_fast.core.schedule import Schedule
from dive_fast.core.vocabulary import Vocabulary
from dive_fast.errors import ModelError
from dive_fast.models.autoencoder import encode_latents, image_shape, load_vae
from dive_fast.models.files.checkpoint import (
    fingerprint,
    load_component,
    read_json,
)
from dive_fast.models.protocol import State
from dive_fast.models.text.prompts import Classes, ClassPrompts, choose_prompts
from dive_fast.models.text.towers import PromptEncoder, load_tower
from dive_fast.models.unet import stages
from dive_fast.models.unet.support import has_cross_attention, sample_side

TEXT_ENCODERS = {
    "StableDiffusionPipeline": ("CLIPTextModel",),
    "StableDiffusionImg2ImgPipeline": ("CLIPTextModel",),
    "StableDiffusionXLPipeline": ("CLIPTextModel", "CLIPTextModelWithProjection"),
    "StableDiffusionXLImg2ImgPipeline": ("CLIPTextModel", "CLIPTextModelWithProjection"),
}
SUFFIXES = ("", "_2")


class StableDiffusion:
    """A Stable Diffusion UNet as classifier; see ``models.protocol.Model`` for the attributes.

    The network runs whole; ``StagedStableDiffusion`` also offers it in parts.

    Args:
        unet: float32, frozen.
        vae: encodes pictures to latents.
        schedule: of the training.
        text: encodes prompts to conditions.
        classes: the answers.
        device: where the prompts are encoded; ``to`` moves the network itself.
        zero_unconditional: "no condition" is zeros, not the empty prompt (SDXL's
            ``force_zeros_for_empty_prompt``).
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        vae: AutoencoderKL,
        schedule: Schedule,
        text: PromptEncoder,
        classes: ClassPrompts,
        *,
        name: str = "stable-diffusion",
        device: torch.device | str = "cpu",
        zero_unconditional: bool = False,
        beta: float | None = None,
    ) -> None:
        self.name = name
        self.unet = self.network = unet
        self.vae = vae
        self.schedule = schedule
        self.text = text
        self.zero_unconditional = zero_unconditional
        self.device, self.dtype = unet.device, unet.dtype
        size = sample_side(unet)
        self.latent_shape = (unet.config.in_channels, size, size)
        self.image_shape = image_shape(self.latent_shape, vae)
        # Unfitted, beta L is half the squared error summed over the latent: unit variance.
        self.beta = math.prod(self.latent_shape) / 2 if beta is None else beta
        self._set(classes, torch.device(device))

    def set_classes(
        self,
        classes: Classes,
        templates: Sequence[str] | None = None,
        average: str | None = None,
    ) -> None:
        """Asks about other classes from now on; the arguments are those of ``load_model``.

        Raises:
            ModelError: see ``ClassPrompts.make``.
        """
        self._set(ClassPrompts.make(classes, templates, average), self.device)

    def _set(self, classes: ClassPrompts, device: torch.device) -> None:
        self.text.check(classes)
        table = self.text.table(classes, device)
        unconditional = torch.zeros(self.text.dim)
        if not self.zero_unconditional:
            unconditional = self.text.encode([""], device)[0]
        # The pooled embedding of SDXL is no further token: its rows stay flat.
        shape = (self.text.dim,) if self.text.pooled else self.text.shape
        if classes.parts > 1:
            shape = (classes.parts, *shape)
        self.classes = classes
        self.vocabulary = Vocabulary(
            table,
            classes.names,
            unconditional.repeat(classes.parts),
            shape=shape,
            parts=classes.parts,
        )

    def to(self, device: torch.device, dtype: torch.dtype) -> StableDiffusion:
        """Moves the network; the VAE stays in float32, the text encoders on the CPU."""
        # ModelMixin.to() warns about modules to keep in float32 even where there are none.
        torch.nn.Module.to(self.unet, device, dtype)
        self.vae.to(device)
        self.device, self.dtype = torch.device(device), dtype
        return self

    def identity(self) -> dict[str, Any]:
        """Precision, prompts and fingerprints of the weights; not where the model lies."""
        return {
            "family": "stable-diffusion",
            "dtype": str(self.dtype).removeprefix("torch."),
            **self.classes.to_dict(),
            "weights": fingerprint(self.unet),
            "text_weights": [fingerprint(tower.encoder) for tower in self.text.towers],
            "vae_weights": fingerprint(self.vae),
            "schedule": self.schedule.identity(),
        }

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """x0 = (posterior mean - shift) x scaling factor."""
        return encode_latents(self.vae, images, self.device)

    def predict(self, x_t: torch.Tensor, t: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """See ``models.protocol.Model.predict``."""
        text, added = self._split(condition.to(self.dtype))
        return self.unet(
            x_t.to(self.dtype), t, encoder_hidden_states=text, added_cond_kwargs=added
        ).sample

    def _split(
        self, condition: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor] | None]:
        """A flat condition as the UNet takes it: [M, L, width], and what SDXL adds."""
        sequence = condition[:, : math.prod(self.text.shape)].unflatten(1, self.text.shape)
        if not self.text.pooled:
            return sequence, None
        pooled = condition[:, math.prod(self.text.shape) :]
        _, height, width = self.image_shape
        # Original size, corner of the crop, target size: a whole picture of the model's own size.
        ids = torch.tensor([height, width, 0, 0, height, width], device=condition.device)
        return sequence, {"text_embeds": pooled, "time_ids": ids.expand(len(condition), -1)}


class StagedStableDiffusion(StableDiffusion):
    """One whose network can be cut: ``models.protocol.StagedModel`` by ``models.unet``."""

    def prefix(self, x_t: torch.Tensor, t: torch.Tensor) -> State:
        """See ``models.unet.prefix``."""
        return stages.prefix(self.unet, x_t.to(self.dtype), t)

    def project(self, condition: torch.Tensor) -> State:
        """Keys and values of all cross-attentions; for SDXL also what joins the time embedding."""
        return stages.project(self.unet, *self._split(condition.to(self.dtype)))

    def encoder(self, prefix: State, projected: State) -> State:
        """The rest of the down blocks."""
        return stages.encoder(self.unet, prefix, projected)

    def decoder(self, encoded: State, projected: State) -> torch.Tensor:
        """Mid block, up blocks and output."""
        return stages.decoder(self.unet, encoded, projected)


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
) -> StableDiffusion:
    """Reads what ``StableDiffusionPipeline.save_pretrained`` (or SDXL's) writes.

    The model comes in parts (``StagedStableDiffusion``) where its UNet can be cut.

    ``classes``, ``templates`` and ``average`` are read by ``prompts.choose_prompts``; ``device`` is
    where the prompts are encoded.

    Raises:
        ModelError: a part is missing, broken or unsupported, or there are no classes.
    """
    if timestep_embedding != "auto":
        raise ModelError(
            f"timestep_embedding is for models of the family dit, got {timestep_embedding!r} "
            f"for {name}."
        )
    index = read_json(directory / "model_index.json")
    encoders = TEXT_ENCODERS[index["_class_name"]]
    check_parts(directory, index, encoders)
    prompts = choose_prompts(directory, classes, templates, average)
    schedule = Schedule.from_config(read_json(directory / "scheduler" / "scheduler_config.json"))
    towers = [
        load_tower(directory, suffix, class_name, allow_pickle)
        for suffix, class_name in zip(SUFFIXES, encoders, strict=False)
    ]
    if len({tower.length for tower in towers}) > 1:
        raise ModelError(
            f"expected text encoders of one length in {directory}, got "
            f"{' and '.join(str(tower.length) for tower in towers)} tokens."
        )
    text = PromptEncoder(towers)
    unet = load_component(UNet2DConditionModel, directory / "unet", allow_pickle)
    vae = load_vae(directory, unet.config.in_channels, allow_pickle)
    check_unet(unet, text, directory)
    family = StagedStableDiffusion if stages.can_be_cut(unet) else StableDiffusion
    return family(
        unet,
        vae,
        schedule,
        text,
        prompts,
        name=name,
        device=device,
        zero_unconditional=bool(index.get("force_zeros_for_empty_prompt", False)),
    )


def check_parts(directory: Path, index: dict[str, Any], encoders: Sequence[str]) -> None:
    """That the pipeline is made of the classes that are read here.

    Raises:
        ModelError: a part is missing or of another class.
    """
    expected = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}
    for suffix, class_name in zip(SUFFIXES, encoders, strict=False):
        expected[f"text_encoder{suffix}"] = class_name
    for part, class_name in expected.items():
        entry = index.get(part)
        found = entry[1] if isinstance(entry, list) and len(entry) == 2 else entry
        if found != class_name:
            raise ModelError(
                f"expected {part} in {directory / 'model_index.json'} to be a {class_name}, "
                f"got {found!r}."
            )


def check_unet(unet: UNet2DConditionModel, text: PromptEncoder, directory: Path) -> None:
    """That the network takes what the text encoders give, and nothing that is not given.

    Raises:
        ModelError: it does not.
    """
    config = unet.config
    if unet.class_embedding is not None:
        raise ModelError(f"the unet in {directory} takes class labels beside the prompt.")
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
    if sample_side(unet) is None:
        raise ModelError(
            f"expected the unet in {directory} to state one sample_size for both sides, "
            f"got {config.sample_size!r}."
        )
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
    if config.out_channels not in (config.in_channels, 2 * config.in_channels):
        raise ModelError(
            f"expected {config.in_channels} or {2 * config.in_channels} output channels of the "
            f"unet in {directory}, got {config.out_channels}."
        )


def _flat(values: Any) -> list[int]:
    if isinstance(values, int):
        return [values]
    return [inner for value in values for inner in _flat(value)]
