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

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention import GatedSelfAttentionDense

from dive_fast.core.layouts import LayoutFormat
from dive_fast.core.numbers import is_whole
from dive_fast.core.projection import SLOTS_PER_OBJECT
from dive_fast.core.schedule import Schedule
from dive_fast.core.vocabulary import Vocabulary
from dive_fast.errors import ModelError, shown
from dive_fast.models.autoencoder import Autoencoder
from dive_fast.models.base import LayoutConditioned
from dive_fast.models.files.checkpoint import read_json
from dive_fast.models.pipeline import Pipeline
from dive_fast.models.protocol import State
from dive_fast.models.stable_diffusion import check_unet, parts
from dive_fast.models.text.prompted import PromptedModel
from dive_fast.models.text.prompts import ClassPrompts
from dive_fast.models.text.towers import PromptEncoder
from dive_fast.models.unet import stages
from dive_fast.models.unet.staged import StagedUNet, WholeUNet

ENCODERS = ("CLIPTextModel",)
MAX_OBJECTS = 30  # grounding tokens in training, absent ones included
GRID = 33
MAX_GRID = 1024  # a token for each of its G x G corners


class Gligen(WholeUNet, LayoutConditioned, PromptedModel):
    """A GLIGEN as layout-to-image model; see ``models.protocol.Model`` for the attributes.

    The network runs whole; ``StagedGligen`` also offers it in parts. The gated attention is always
    on: samplers switch it off after a share of their steps, likelihoods have no such steps.

    Args:
        unet: float32, frozen, with a ``position_net`` for text.
        vae: encodes images to latents.
        schedule: of the training.
        text: encodes the phrases and the caption.
        classes: the phrases. Of several for one class the mean of their embeddings is taken.
        caption: of every image, whatever the layout. Empty unless said, which is what the
            network saw in training for images without one.
        grid: G. Boxes are searched with sides on the G lines x, y = i / (G - 1); of 33, lines are
            two latents of a 64 x 64 map apart, and a side is moved by at most 8 of 512 pixels.
        max_objects: at most 30. The network sees 30 grounding tokens whatever is said here.
        device: where the phrases are encoded; ``to`` moves the network itself.

    Attributes:
        layout_format: what the tokens mean.
        vocabulary: of the tokens: table [V, C + 2] and what each one means. A condition is
            3 max_objects rows.
        phrases: float32 [C, P], the classes' pooled embeddings.

    Raises:
        ModelError: the parts do not fit together.
    """

    family = "gligen"
    templates = ("{}",)

    def __init__(
        self,
        unet: UNet2DConditionModel,
        vae: Autoencoder,
        schedule: Schedule,
        text: PromptEncoder,
        classes: ClassPrompts,
        *,
        caption: str = "",
        grid: int = GRID,
        max_objects: int = MAX_OBJECTS,
        name: str | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        check_grounding(unet, text, name or self.family)
        for module in unet.modules():
            if isinstance(module, GatedSelfAttentionDense):
                module.enabled = True
        self.caption = caption
        self._sizes = (grid, max_objects)
        self._caption = text.encode([caption], torch.device(device)).unflatten(1, text.shape)
        super().__init__(unet, vae, schedule, text, classes, name=name, device=device)

    def set_layout(self, *, grid: int | None = None, max_objects: int | None = None) -> None:
        """Another grid or number of objects from now on; what is None stays.

        Raises:
            ModelError: a grid below 2, or not 1 to 30 objects.
        """
        grid = self.layout_format.grid if grid is None else grid
        max_objects = self.layout_format.max_objects if max_objects is None else max_objects
        self._describe(grid, max_objects)

    def _set(self, classes: ClassPrompts, device: torch.device) -> None:
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
        self._describe(*self._sizes)
        self._place()

    def _describe(self, grid: int, max_objects: int) -> None:
        """The format and the table that follow from the classes and these numbers."""
        for what, value, least in (("grid", grid, 2), ("max_objects", max_objects, 1)):
            if not is_whole(value, least):
                raise ModelError(
                    f"{what} must be a number of at least {least}, got {shown(value)}."
                )
        if max_objects > MAX_OBJECTS:
            raise ModelError(
                f"expected max_objects of at most {MAX_OBJECTS}, with which GLIGEN was trained, "
                f"got {shown(max_objects)}."
            )
        if grid > MAX_GRID:
            raise ModelError(f"expected a grid of at most {MAX_GRID}, got {shown(grid)}.")
        self._sizes = (grid, max_objects)
        n = len(self.classes.names)
        self.layout_format = LayoutFormat.compact(self.classes.names, max_objects, grid)
        table = torch.zeros(self.layout_format.vocabulary_size, n + 2)
        table[:n, :n] = torch.eye(n)
        sides = torch.linspace(-1, 1, grid)
        y, x = torch.meshgrid(sides, sides, indexing="ij")
        table[slice(*self.layout_format.coordinate_range), n:] = torch.stack([x, y], dim=2).flatten(
            0, 1
        )
        self.vocabulary = Vocabulary(table, self.layout_format.token_names())

    def _place(self) -> None:
        """Phrases and caption to where the network is, in its precision."""
        self._placed_phrases = self.phrases.to(self.device)
        self._placed_caption = self._caption.to(self.device, self.dtype)

    def to(self, device: torch.device, dtype: torch.dtype) -> Gligen:
        """Moves the network; the VAE stays in float32, the text encoder on the CPU."""
        super().to(device, dtype)
        self._place()
        return self

    def facts(self) -> dict[str, Any]:
        return {**super().facts(), "caption": self.caption}

    def arguments(self, condition: torch.Tensor) -> dict[str, Any]:
        """The caption, and the objects as ``position_net`` takes them."""
        return {
            "encoder_hidden_states": self._placed_caption.expand(len(condition), -1, -1),
            "cross_attention_kwargs": {"gligen": self.grounding(condition)},
        }

    def grounding(self, condition: torch.Tensor) -> dict[str, torch.Tensor]:
        """What ``position_net`` takes for conditions [N, S D], in the network's precision.

        Returns:
            boxes [N, 30, 4] as left, top, right, bottom in the unit interval; masks [N, 30], 1 for
            an object that is there; positive_embeddings [N, 30, P]. Differentiable.
        """
        n = len(self.layout_format.names)
        objects = self.slots(condition).unflatten(1, (-1, SLOTS_PER_OBJECT))
        # All 30 are given: absent ones are attended to as well.
        objects = F.pad(objects, (0, 0, 0, 0, 0, MAX_OBJECTS - self.layout_format.max_objects))
        weights, corners = objects[:, :, 0, :n], objects[:, :, 1:, n:]
        found = {
            "boxes": (corners.flatten(2) + 1) / 2,
            "masks": weights.sum(dim=2),
            "positive_embeddings": weights @ self._placed_phrases.to(weights.dtype),
        }
        return {key: value.to(self.dtype) for key, value in found.items()}


class StagedGligen(StagedUNet, Gligen):
    """One whose network can be cut.

    ``position_net`` runs once per condition; the caption's keys and values are computed once.
    """

    def _place(self) -> None:
        super()._place()
        with torch.inference_mode(False), torch.no_grad():
            self._kv = stages.project(self.unet, self._placed_caption.clone())

    def project(self, condition: torch.Tensor) -> State:
        """The grounding tokens, as every block takes them."""
        tokens = self.unet.position_net(**self.grounding(condition))
        return stages.grounding(self.unet, tokens)

    def attended(self, projected: State) -> tuple[State, State]:
        """The caption's keys and values for as many rows, and the grounding tokens."""
        return tuple(x.expand(len(projected[0]), -1, -1) for x in self._kv), projected


def load(directory: Path, **asked: Any) -> Gligen:
    """Reads what ``StableDiffusionGLIGENPipeline.save_pretrained`` writes.

    The model comes in parts (``StagedGligen``) where its UNet can be cut. Names of classes stand as
    they are unless said. ``dive_fast.json`` may state ``caption``, ``grid`` and ``max_objects``.

    Args:
        asked: see ``Pipeline``.

    Raises:
        ModelError: a part is missing, broken or unsupported, or there are no classes.
    """
    pipeline = Pipeline(directory, **asked)
    pipeline.check_parts(parts(ENCODERS))
    prompts = pipeline.prompts(Gligen.templates)
    caption = pipeline.extra.get("caption", "")
    if not isinstance(caption, str):
        raise ModelError(f"expected a text as caption in {directory}, got {shown(caption)}.")
    schedule, text = pipeline.discrete_schedule(), pipeline.text(ENCODERS)
    unet = pipeline.network(UNet2DConditionModel, "unet")
    check_grounding(unet, text, directory)
    check_unet(unet, text, directory)
    vae = pipeline.vae(unet.config.in_channels)
    family = StagedGligen if stages.can_be_cut(unet) else Gligen
    return family(
        unet,
        vae,
        schedule,
        text,
        prompts,
        caption=caption,
        grid=pipeline.extra.get("grid", GRID),
        max_objects=pipeline.extra.get("max_objects", MAX_OBJECTS),
        name=pipeline.name,
        device=pipeline.device,
    )


def is_gligen(directory: Path) -> bool:
    """Whether the UNet of a model directory is grounded; published indices do not always say so.

    Raises:
        ModelError: its configuration cannot be read.
    """
    path = directory / "unet" / "config.json"
    kind = read_json(path).get("attention_type") if path.exists() else None
    return isinstance(kind, str) and kind.startswith("gated")


def check_grounding(unet: UNet2DConditionModel, text: PromptEncoder, where: str | Path) -> None:
    """That the network is grounded on boxes with phrases of this text encoder.

    Raises:
        ModelError: it is not.
    """
    kind, network = unet.config.attention_type, getattr(unet, "position_net", None)
    if kind == "gated-text-image":
        raise ModelError(
            f"the unet in {where} also takes an image of every object (attention_type {kind!r}), "
            f"expected one that takes phrases alone ('gated')."
        )
    if kind != "gated" or network is None:
        raise ModelError(
            f"expected a unet with a position_net (attention_type 'gated') in {where}, "
            f"got attention_type {kind!r}."
        )
    if network.positive_len != text.shape[1]:
        raise ModelError(
            f"the position_net in {where} takes phrases of {network.positive_len} values, but its "
            f"text encoder gives {text.shape[1]}."
        )
    channels, out = unet.config.in_channels, unet.config.out_channels
    if channels == 2 * out + 1:
        raise ModelError(
            f"the unet in {where} paints into images ({channels} channels), expected one that "
            f"makes whole ones ({out} channels)."
        )
