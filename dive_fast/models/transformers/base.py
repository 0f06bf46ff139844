"""What text-to-image transformers share: prompts by their pipeline, one forward, one loader."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import torch
from torch import Tensor, nn

from dive_fast.core.schedule import Schedule
from dive_fast.errors import ModelError
from dive_fast.models.pipeline import Pipeline
from dive_fast.models.text.pipeline_text import PipelineText, load_encoders
from dive_fast.models.text.prompted import PromptedModel

TRANSFORMER = "transformer"  # the folder


class TextTransformer(PromptedModel):
    """A text-to-image transformer as classifier; see ``PromptedModel`` for the arguments.

    A family says what its pipeline's ``encode_prompt`` gives (``encode_prompts``) and how its
    network is called with that (``run``).
    """

    pipeline_class: ClassVar[str]  # of diffusers
    network_class: ClassVar[str]
    older_names: ClassVar[tuple[str, ...]] = ()  # of the network's class, in published indices
    vae_class: ClassVar[str] = "AutoencoderKL"
    text_classes: ClassVar[Mapping[str, tuple[str, ...]]] = {}  # folders that must be there
    flow: ClassVar[bool] = True  # trained as a rectified flow; else with betas
    constants: ClassVar[tuple[str, ...]] = ()  # parts of a condition that are not optimised

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
        """(C, h, w) of x0."""
        side = network.config.sample_size
        return (network.config.in_channels, side, side)

    def predict(self, x_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """See ``models.protocol.Model.predict``."""
        parts = self.text.parts.unpack(condition.to(self.dtype))
        return self.run(x_t.to(self.dtype), t, parts)

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
    network_names = (family.network_class, *family.older_names)
    pipeline.check_parts(
        {TRANSFORMER: network_names, "vae": family.vae_class, **family.text_classes}
    )
    prompts, schedule = pipeline.prompts(), pipeline.schedule()
    _check_schedule(family, schedule, directory)
    network = pipeline.component(getattr(diffusers, family.network_class), TRANSFORMER)
    family.check_network(network, directory)
    shape = family.latents(network)
    vae = pipeline.vae(shape[0], family.vae_class)
    text = PipelineText(
        _text_half(family, network, pipeline), family.encode_prompts, family.constants
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


def _check_schedule(family: type[TextTransformer], schedule: Schedule, directory: Path) -> None:
    kinds = {True: "a flow-matching schedule", False: "a schedule of betas"}
    found = schedule.target == "flow"
    if found != family.flow:
        raise ModelError(
            f"expected {kinds[family.flow]} in {directory / 'scheduler'}, as a "
            f"{family.network_class} is trained with, got {kinds[found]}."
        )


def _text_half(family: type[TextTransformer], network: nn.Module, pipeline: Pipeline) -> Any:
    """The pipeline with what ``encode_prompt`` needs; some ask the network for a width."""
    kind = getattr(diffusers, family.pipeline_class)
    found = load_encoders(pipeline.directory, pipeline.index, pipeline.allow_pickle)
    parts = {TRANSFORMER: network, "vae": None, "scheduler": None, **found}
    return kind(**parts)
