"""The family "gligen": Stable Diffusion grounded on boxes with phrases (GLIGEN, arXiv 2301.07093).

A layout is continuous here: ``position_net`` takes the sides of the boxes and the pooled text
embedding of each object's phrase. The tokens of the searches stand for rows of C + 2 coordinates,

    class c        (0 ... 1 ... 0, 0, 0)              one at c
    corner x, y    (0 ... 0, 2x - 1, 2y - 1)
    none           0

and a condition, three such rows per object, is decoded linearly:

    phrase = sum_c w_c phrase_c,    mask = sum_c w_c,    box = (corner + 1) / 2

At rows of the table that is exactly what the pipeline gives to ``position_net``; between them it is
differentiable. Classes are equally far from each other and from "none", and every coordinate is of
the order of 1, so that one learning rate moves classes and corners alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention import GatedSelfAttentionDense

from dive_fast.core.layouts import LayoutFormat
from dive_fast.core.numbers import is_whole
from dive_fast.core.projection import SLOTS_PER_OBJECT
from dive_fast.core.schedule import Schedule
from dive_fast.core.vocabulary import Vocabulary
from dive_fast.errors import ModelError
from dive_fast.models.autoencoder import encode_latents, image_shape, load_vae
from dive_fast.models.files.checkpoint import fingerprint, load_component, read_extra, read_json
from dive_fast.models.gligen_support import check_grounding
from dive_fast.models.layout_to_image.support import embed_tokens
from dive_fast.models.protocol import State
from dive_fast.models.stable_diffusion import check_parts, check_unet
from dive_fast.models.text.prompts import Classes, ClassPrompts, choose_prompts
from dive_fast.models.text.towers import PromptEncoder, load_tower
from dive_fast.models.unet import stages
from dive_fast.models.unet.support import sample_side

MAX_OBJECTS = 30  # grounding tokens in training, absent ones included
GRID = 33
TEMPLATES = ("{}",)


class Gligen:
    """A GLIGEN as layout-to-image model; see ``models.protocol.Model`` for the attributes.

    The network runs whole; ``StagedGligen`` also offers it in parts. The gated attention is always
    on: samplers switch it off after a share of their steps, likelihoods have no such steps.

    Args:
        unet: float32, frozen, with a ``position_net`` for text.
        vae: encodes pictures to latents.
        schedule: of the training.
        text: encodes the phrases and the caption.
        classes: the phrases. Of several for one class the mean of their embeddings is taken.
        caption: of every picture, whatever the layout. Empty unless said, which is what the
            network saw in training for pictures without one.
        grid: G. Boxes are searched with sides on the G lines x, y = i / (G - 1); of 33, lines are
            two latents of a 64 x 64 map apart, and a side is moved by at most 8 of 512 pixels.
        max_objects: at most 30. The network sees 30 grounding tokens whatever is said here.
        device: where the phrases are encoded; ``to`` moves the network itself.

    Attributes:
        layout: what the tokens mean.
        vocabulary: of the tokens: table [V, C + 2] and what each one means. A condition is
            3 max_objects rows.
        phrases: float32 [C, P], the classes' pooled embeddings.

    Raises:
        ModelError: the parts do not fit together.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        vae: AutoencoderKL,
        schedule: Schedule,
        text: PromptEncoder,
        classes: ClassPrompts,
        *,
        caption: str = "",
        grid: int = GRID,
        max_objects: int = MAX_OBJECTS,
        name: str = "gligen",
        device: torch.device | str = "cpu",
        beta: float | None = None,
    ) -> None:
        check_grounding(unet, text, name)
        for module in unet.modules():
            if isinstance(module, GatedSelfAttentionDense):
                module.enabled = True
        self.name = name
        self.unet = self.network = unet
        self.vae = vae
        self.schedule = schedule
        self.text = text
        self.caption = caption
        self.device, self.dtype = unet.device, unet.dtype
        side = sample_side(unet)
        self.latent_shape = (unet.config.in_channels, side, side)
        self.image_shape = image_shape(self.latent_shape, vae)
        # Unfitted, beta L is half the squared error summed over the latent: unit variance.
        self.beta = math.prod(self.latent_shape) / 2 if beta is None else beta
        self._caption = text.encode([caption], torch.device(device)).unflatten(1, text.shape)
        self._set(classes, grid, max_objects, torch.device(device))
        self._place()

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
        if templates is None and not isinstance(classes, Mapping):
            templates = TEMPLATES
        prompts = ClassPrompts.make(classes, templates, average)
        self._set(prompts, self.layout.grid, self.layout.max_objects, self.device)
        self._place()

    def set_layout(self, *, grid: int | None = None, max_objects: int | None = None) -> None:
        """Another grid or number of objects from now on; what is None stays.

        Raises:
            ModelError: a grid below 2, or not 1 to 30 objects.
        """
        grid = self.layout.grid if grid is None else grid
        max_objects = self.layout.max_objects if max_objects is None else max_objects
        self._describe(grid, max_objects)

    def _set(
        self, classes: ClassPrompts, grid: int, max_objects: int, device: torch.device
    ) -> None:
        if classes.average == "loss":
            raise ModelError(
                "expected average='embedding' for a layout-to-image model, got 'loss': the objects "
                "of one layout cannot each have several conditions."
            )
        self.text.check(classes)
        pooled = self.text.pooled_states([p for group in classes.prompts for p in group], device)
        groups = pooled.split([len(group) for group in classes.prompts])
        self.classes = classes
        self.phrases = torch.stack([group.mean(dim=0) for group in groups])
        self._describe(grid, max_objects)

    def _describe(self, grid: int, max_objects: int) -> None:
        """The format and the table that follow from the classes and these numbers."""
        for what, value, least in (("grid", grid, 2), ("max_objects", max_objects, 1)):
            if not is_whole(value, least):
                raise ModelError(f"{what} must be a number of at least {least}, got {value!r}.")
        if max_objects > MAX_OBJECTS:
            raise ModelError(
                f"expected max_objects of at most {MAX_OBJECTS}, with which GLIGEN was trained, "
                f"got {max_objects}."
            )
        n = len(self.classes.names)
        self.layout = LayoutFormat.compact(self.classes.names, max_objects, grid)
        table = torch.zeros(self.layout.vocabulary_size, n + 2)
        table[:n, :n] = torch.eye(n)
        sides = torch.linspace(-1, 1, grid)
        y, x = torch.meshgrid(sides, sides, indexing="ij")
        table[slice(*self.layout.coordinate_range), n:] = torch.stack([x, y], dim=2).flatten(0, 1)
        self.vocabulary = Vocabulary(table, self.layout.token_names())

    def _place(self) -> None:
        """Phrases and caption to where the network is, in its precision."""
        self._placed_phrases = self.phrases.to(self.device)
        self._placed_caption = self._caption.to(self.device, self.dtype)

    def to(self, device: torch.device, dtype: torch.dtype) -> Gligen:
        """Moves the network; the VAE stays in float32, the text encoder on the CPU."""
        # ModelMixin.to() warns about modules to keep in float32 even where there are none.
        torch.nn.Module.to(self.unet, device, dtype)
        self.vae.to(device)
        self.device, self.dtype = torch.device(device), dtype
        self._place()
        return self

    def identity(self) -> dict[str, Any]:
        """Precision, format, prompts and fingerprints of the weights; not where the model lies."""
        return {
            "family": "gligen",
            "dtype": str(self.dtype).removeprefix("torch."),
            "layout": self.layout.to_dict(),
            "caption": self.caption,
            **self.classes.to_dict(),
            "weights": fingerprint(self.unet),
            "text_weights": [fingerprint(tower.encoder) for tower in self.text.towers],
            "vae_weights": fingerprint(self.vae),
            "schedule": self.schedule.identity(),
        }

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """x0 = (posterior mean - shift) x scaling factor."""
        return encode_latents(self.vae, images, self.device)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens int64 [N, S] to conditions, float32 [N, S D] on the CPU.

        Raises:
            ModelError: another shape or dtype, or tokens outside the vocabulary.
        """
        return embed_tokens(self.layout, self.vocabulary.table, tokens)

    def predict(self, x_t: torch.Tensor, t: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """See ``models.protocol.Model.predict``; condition is [M, S D]."""
        return self.unet(
            x_t.to(self.dtype),
            t,
            encoder_hidden_states=self._placed_caption.expand(len(condition), -1, -1),
            cross_attention_kwargs={"gligen": self.grounding(condition)},
        ).sample

    def grounding(self, condition: torch.Tensor) -> dict[str, torch.Tensor]:
        """What ``position_net`` takes for conditions [N, S D], in the network's precision.

        Returns:
            boxes [N, 30, 4] as left, top, right, bottom in the unit interval; masks [N, 30], 1 for
            an object that is there; positive_embeddings [N, 30, P]. Differentiable.
        """
        n, form = len(self.layout.names), self.layout
        shape = (form.max_objects, SLOTS_PER_OBJECT, n + 2)
        if condition.dim() != 2 or condition.shape[1] != math.prod(shape):
            raise ModelError(
                f"the condition of the layout-to-image model {self.name} is the embeddings of "
                f"{form.n_slots} tokens, expected [N, {math.prod(shape)}], "
                f"got {list(condition.shape)}."
            )
        objects = condition.unflatten(1, shape)
        # All 30 are given: absent ones are attended to as well.
        objects = F.pad(objects, (0, 0, 0, 0, 0, MAX_OBJECTS - form.max_objects))
        weights, corners = objects[:, :, 0, :n], objects[:, :, 1:, n:]
        found = {
            "boxes": (corners.flatten(2) + 1) / 2,
            "masks": weights.sum(dim=2),
            "positive_embeddings": weights @ self._placed_phrases.to(weights.dtype),
        }
        return {key: value.to(self.dtype) for key, value in found.items()}


class StagedGligen(Gligen):
    """One whose network can be cut: ``models.protocol.StagedModel`` by ``models.unet``.

    ``position_net`` runs once per condition; the caption's keys and values are computed once.
    """

    def _place(self) -> None:
        super()._place()
        with torch.inference_mode(False), torch.no_grad():
            self._kv = stages.project(self.unet, self._placed_caption.clone())

    def prefix(self, x_t: torch.Tensor, t: torch.Tensor) -> State:
        """See ``models.unet.prefix``."""
        return stages.prefix(self.unet, x_t.to(self.dtype), t)

    def project(self, condition: torch.Tensor) -> State:
        """The grounding tokens, as every block takes them."""
        tokens = self.unet.position_net(**self.grounding(condition))
        return stages.grounding(self.unet, tokens)

    def encoder(self, prefix: State, projected: State) -> State:
        """The rest of the down blocks."""
        return stages.encoder(self.unet, prefix, self._caption_for(projected), projected)

    def decoder(self, encoded: State, projected: State) -> torch.Tensor:
        """Mid block, up blocks and output."""
        return stages.decoder(self.unet, encoded, self._caption_for(projected), projected)

    def _caption_for(self, projected: State) -> State:
        """The caption's keys and values for as many rows."""
        return tuple(x.expand(len(projected[0]), -1, -1) for x in self._kv)


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
) -> Gligen:
    """Reads what ``StableDiffusionGLIGENPipeline.save_pretrained`` writes.

    The model comes in parts (``StagedGligen``) where its UNet can be cut. ``classes``,
    ``templates`` and ``average`` are read by ``prompts.choose_prompts``; names stand as they are
    unless said. ``dive_fast.json`` may state ``caption``, ``grid`` and ``max_objects`` too.

    Raises:
        ModelError: a part is missing, broken or unsupported, or there are no classes.
    """
    if timestep_embedding != "auto":
        raise ModelError(
            f"timestep_embedding is for models of the family dit, got {timestep_embedding!r} "
            f"for {name}."
        )
    index, extra = read_json(directory / "model_index.json"), read_extra(directory)
    check_parts(directory, index, ("CLIPTextModel",))
    prompts = choose_prompts(directory, classes, templates, average, TEMPLATES)
    caption = extra.get("caption", "")
    if not isinstance(caption, str):
        raise ModelError(f"expected a text as caption in {directory}, got {caption!r}.")
    schedule = Schedule.from_config(read_json(directory / "scheduler" / "scheduler_config.json"))
    text = PromptEncoder([load_tower(directory, "", "CLIPTextModel", allow_pickle)])
    unet = load_component(UNet2DConditionModel, directory / "unet", allow_pickle)
    check_grounding(unet, text, directory)
    check_unet(unet, text, directory)
    vae = load_vae(directory, unet.config.in_channels, allow_pickle)
    family = StagedGligen if stages.can_be_cut(unet) else Gligen
    return family(
        unet,
        vae,
        schedule,
        text,
        prompts,
        caption=caption,
        grid=extra.get("grid", GRID),
        max_objects=extra.get("max_objects", MAX_OBJECTS),
        name=name,
        device=device,
    )
