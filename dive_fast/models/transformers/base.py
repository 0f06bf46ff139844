"""What text-to-image transformers share: prompts by their pipeline, one forward, one loader."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import torch
from torch import Tensor, nn

from dive_fast.core.numbers import is_whole
from dive_fast.errors import ModelError
from dive_fast.models.autoencoder import KL_OR_TINY, Autoencoder, image_shape
from dive_fast.models.pipeline import Pipeline
from dive_fast.models.text.encoders import import_transformers, quiet_transformers
from dive_fast.models.text.pipeline_text import PipelineText, load_encoders
from dive_fast.models.text.prompt_cache import digest_of_files
from dive_fast.models.text.prompted import PromptedModel

TRANSFORMER = "transformer"  # the folder
MOST_SIDE = 4096  # of latents, where the network itself sets no bound


class TextTransformer(PromptedModel):
    """A text-to-image transformer as classifier; see ``PromptedModel`` for the arguments.

    A family says what its pipeline's ``encode_prompt`` gives (``encode_prompts``) and how its
    network is called with that (``run``).
    """

    pipeline_class: ClassVar[str]  # of diffusers
    network_class: ClassVar[str]
    older_names: ClassVar[tuple[str, ...]] = ()  # of the network's class, in published indices
    vae_classes: ClassVar[Sequence[str]] = KL_OR_TINY
    constants: ClassVar[tuple[str, ...]] = ()  # parts of a condition that are not optimised
    optional: ClassVar[tuple[str, ...]] = ()  # text encoders that may be left out
    target: ClassVar[str] = "flow"  # of the schedule

    text: PipelineText

    @staticmethod
    @abstractmethod
    def encode_prompts(
        pipeline: Any, prompts: list[str], device: torch.device
    ) -> dict[str, Tensor]:
        """The parts of the prompts' conditions, each [N, ...], as the pipeline computes them."""

    @abstractmethod
    def run(self, x_t: Tensor, t: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        """The network's prediction of ``schedule.target``, [M, C or 2C, h, w].

        Args:
            x_t: [M, C, h, w] in the network's dtype.
            t: int64 [M].
            parts: of the condition, each [M, ...] in the network's dtype.
        """

    @classmethod
    def check_network(cls, network: nn.Module, directory: Path) -> None:
        """That the network is one of those that ``run`` calls rightly; a ``ModelError`` if not."""

    @classmethod
    def latents(cls, network: nn.Module) -> tuple[int, int, int]:
        """(C, h, w) of x0, unless ``dive_fast.json`` states the ``size`` of the images."""
        side = network.config.sample_size
        return (network.config.in_channels, side, side)

    @classmethod
    def sides(cls, network: nn.Module) -> range:
        """The h that the network can be run at."""
        return range(1, MOST_SIDE + 1)

    @classmethod
    def widths(cls, network: nn.Module) -> dict[str, int]:
        """The last dimension of the condition's parts that the network takes."""
        return {}

    def facts(self) -> dict[str, Any]:
        return {**super().facts(), "latents": list(self.latent_shape)}

    def predict(self, x_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """See ``models.protocol.Model.predict``."""
        parts = self.text.parts.unpack(condition.to(self.dtype))
        return self.run(x_t.to(self.dtype), t, parts)

    def n_tokens(self, patch: int) -> int:
        """The number of the image's tokens, for patches of so many latents a side."""
        _, h, w = self.latent_shape
        return (h // patch) * (w // patch)

    def sigma(self, t: Tensor) -> Tensor:
        """sigma of a flow's timesteps, float32 [M]."""
        return self.schedule.s.to(t.device)[t]


def load_transformer(family: type[TextTransformer], directory: Path, **asked: Any) -> Any:
    """Reads what the family's pipeline writes by ``save_pretrained``.

    Args:
        asked: see ``Pipeline``.

    Raises:
        ModelError: a part is missing, broken or unsupported, or there are no classes.
    """
    pipeline = Pipeline(directory, **asked)
    names = (family.network_class, *family.older_names)
    pipeline.check_parts({TRANSFORMER: names, "vae": family.vae_classes})
    prompts, schedule = pipeline.prompts(), pipeline.schedule()
    if schedule.target != family.target:
        raise ModelError(
            f"expected a schedule with the target {family.target!r} for the {family.network_class} "
            f"in {directory}, got {schedule.target!r}."
        )
    network = pipeline.network(getattr(diffusers, family.network_class), TRANSFORMER)
    family.check_network(network, directory)
    channels, *sides = family.latents(network)
    vae = pipeline.vae(channels)
    shape = _resized((channels, *sides), family.sides(network), vae, pipeline)
    parts = pipeline.with_lora(_text_half(family, network, pipeline))
    folders = [part for part in pipeline.index if part.startswith(("tokenizer", "text_encoder"))]
    text = PipelineText(
        parts, family.encode_prompts, family.constants, digest_of_files(directory, folders)
    )
    for part, width in family.widths(network).items():
        if text.parts.shapes[part][-1] != width:
            raise ModelError(
                f"the network in {directory} takes the part {part!r} of width {width}, but its "
                f"text encoders give {text.parts.shapes[part][-1]}."
            )
    return family(
        network,
        vae,
        schedule,
        text,
        prompts,
        name=pipeline.name,
        device=pipeline.device,
        latent_shape=shape,
    )


def _resized(
    shape: tuple[int, int, int], sides: range, vae: Autoencoder, pipeline: Pipeline
) -> tuple[int, int, int]:
    """(C, h, w) of latents, with h and w for the ``size`` that ``dive_fast.json`` may state."""
    factor = image_shape((shape[0], 1, 1), vae)[1]
    size = pipeline.extra.get("size")
    if size is None:
        size = shape[1] * factor if is_whole(shape[1], 1) else shape[1]
    if not is_whole(size, 1) or size % factor or size // factor not in sides:
        raise ModelError(
            f"expected images of a multiple of {sides.step * factor} pixels, at most "
            f"{sides[-1] * factor}, for the network in {pipeline.directory}, got {size!r}."
        )
    return (shape[0], size // factor, size // factor)


def _text_half(family: type[TextTransformer], network: nn.Module, pipeline: Pipeline) -> Any:
    """The pipeline with what ``encode_prompt`` needs; some ask the network for a width."""
    with quiet_transformers(import_transformers()):  # some pipelines' imports warn
        kind = getattr(diffusers, family.pipeline_class)
    found = load_encoders(
        pipeline.directory,
        pipeline.index,
        pipeline.allow_pickle,
        pipeline.variant,
        pipeline.dtype,
    )
    for part in inspect.signature(kind).parameters:
        if not part.startswith(("tokenizer", "text_encoder")) or part in family.optional:
            continue
        if found.get(part) is None:
            raise ModelError(
                f"expected {part} in {pipeline.directory / 'model_index.json'}, found none."
            )
    parts = {TRANSFORMER: network, "vae": None, "scheduler": None, **found}
    return kind(**parts)
