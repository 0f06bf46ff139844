"""A diffusers model directory that is being read: the steps that every family's ``load`` takes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import InitVar, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from dive_fast.core.config import Config
from dive_fast.core.convention import Convention
from dive_fast.core.schedule import Schedule
from dive_fast.errors import ModelError, shown
from dive_fast.models.autoencoder import (
    AUTOENCODERS,
    Autoencoder,
    latent_channels,
    normalisation,
)
from dive_fast.models.files.checkpoint import load_component
from dive_fast.models.files.lora import Lora
from dive_fast.models.files.reading import read_json
from dive_fast.models.files.sidecar import FILE, read_extra
from dive_fast.models.lora import fuse
from dive_fast.models.text.prompts import (
    DEFAULT_TEMPLATES,
    Classes,
    ClassPrompts,
    require_classes,
)
from dive_fast.models.text.towers import SUFFIXES, PromptEncoder, load_tower


@dataclass(frozen=True)
class Pipeline:
    """The directory, and what was asked of it: made of the arguments that every loader gets.

    Args:
        timestep_embedding: refused unless "auto"; the family that takes it does not hand it on.

    Attributes:
        directory: with ``model_index.json`` and a folder for each part.
        name: what the user called it.
        allow_pickle: also take ``.bin`` weights.
        variant: of the weights, see ``files.weights.find_weights``.
        classes, templates, average: as ``load_model`` got them.
        device: where prompts are encoded.
        lora: what ``with_lora`` fuses into the parts.
        dtype: that the network will have.

    Raises:
        ModelError: as every method does: a part is missing, broken or unsupported.
    """

    directory: Path
    name: str
    allow_pickle: bool = False
    timestep_embedding: InitVar[str] = "auto"
    classes: Classes | None = None
    templates: Sequence[str] | None = None
    average: str | None = None
    device: torch.device | str = "cpu"
    variant: str | None = None
    lora: Lora | None = None
    dtype: torch.dtype = torch.float32

    def __post_init__(self, timestep_embedding: str) -> None:
        if timestep_embedding != "auto":
            raise ModelError(
                f"timestep_embedding is for models of the family dit, got {timestep_embedding!r} "
                f"for {self.name}."
            )
        if self.lora is not None:
            # Fused in float32: what a LoRA adds may be less than a step of half precision.
            object.__setattr__(self, "dtype", torch.float32)

    @cached_property
    def index(self) -> dict[str, Any]:
        """``model_index.json``."""
        return read_json(self.directory / "model_index.json")

    @property
    def stated(self) -> Config:
        """``model_index.json`` for those who read values of it."""
        return Config(self.directory / "model_index.json", self.index)

    @cached_property
    def extra(self) -> dict[str, Any]:
        """``dive_fast.json``; empty where there is none."""
        return read_extra(self.directory)

    @property
    def stated_extra(self) -> Config:
        """``dive_fast.json`` for those who read values of it."""
        return Config(self.directory / FILE, self.extra)

    def part(self, name: str) -> str | None:
        """The class of a part in ``model_index.json``; None where it is null or not stated.

        Raises:
            ModelError: the entry is neither null nor [library, class].
        """
        entry = self.index.get(name)
        if entry is None or entry == [None, None]:
            return None
        if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str)):
            raise ModelError(
                f"expected {name} in {self.directory / 'model_index.json'} to be [library, class] "
                f"or null, got {shown(entry)}."
            )
        return entry[1]

    def check_parts(self, expected: Mapping[str, str | Sequence[str]]) -> None:
        """That the parts of these names are of these classes; of several, of one of them."""
        for part, names in expected.items():
            names = [names] if isinstance(names, str) else names
            found = self.part(part)
            if found not in names:
                raise ModelError(
                    f"expected {part} in {self.directory / 'model_index.json'} to be a "
                    f"{' or '.join(names)}, got {found!r}."
                )

    @cached_property
    def scheduler_config(self) -> dict[str, Any]:
        """Of the noise schedule of the training."""
        return read_json(self.directory / "scheduler" / "scheduler_config.json")

    def schedule(self) -> Schedule:
        """See ``scheduler_config``."""
        self.part("scheduler")
        return Schedule.from_config(self.scheduler_config)

    def discrete_schedule(self) -> Schedule:
        """That of a network which is told t as a whole number: no flow."""
        schedule = self.schedule()
        if schedule.target == "flow":
            raise ModelError(
                f"expected the scheduler that the network in {self.directory} was trained with, "
                f"got the flow of a {self.scheduler_config.get('_class_name')}."
            )
        return schedule

    def convention(self) -> Convention:
        """How the network is called and read: by the scheduler, where ``dive_fast.json`` does not
        state ``predicts`` and ``time``."""
        return Convention.from_config(
            self.scheduler_config, self.extra.get("predicts"), self.extra.get("time")
        )

    def component(
        self,
        model_class: type,
        folder: str,
        dtype: torch.dtype = torch.float32,
        keep: Collection[str] = (),
    ) -> torch.nn.Module:
        """A part of diffusers, complete, finite and frozen; see ``load_component``."""
        self.part(folder)  # says what is wrong with its entry
        return load_component(
            model_class,
            self.directory / folder,
            self.allow_pickle,
            variant=self.variant,
            dtype=dtype,
            keep=keep,
        )

    def network(
        self, model_class: type, folder: str, keep: Collection[str] = ()
    ) -> torch.nn.Module:
        """A ``component`` in the ``dtype`` that was asked for.

        Args:
            keep: modules from which the table of classes is made, which is in float32.
        """
        return self.component(model_class, folder, self.dtype, keep)

    def vae(self, channels: int, folder: str = "vae") -> Autoencoder:
        """The autoencoder of a network that takes latents of so many channels.

        Its class is what the index states, which is one of ``AUTOENCODERS``: see ``check_parts``.
        """
        vae = self.component(AUTOENCODERS[self.part(folder)], folder)
        try:
            normalisation(vae, self.index.get("_class_name"))
        except ModelError as error:
            raise ModelError(f"the VAE in {self.directory} cannot be used: {error}") from error
        if latent_channels(vae) != channels:
            raise ModelError(
                f"the network in {self.directory} takes {channels} channels, "
                f"but its VAE gives {latent_channels(vae)}."
            )
        return vae

    def with_lora(self, parts: Any) -> Any:
        """A diffusers pipeline with the LoRA that was asked for in its network and text encoders.

        Raises:
            ModelError: as ``lora.fuse``.
        """
        if self.lora is not None:
            fuse(self.lora, parts)
        return parts

    def text(self, class_names: Sequence[str]) -> PromptEncoder:
        """All tokenizers and text encoders, which are of these classes."""
        for suffix, _ in zip(SUFFIXES, class_names, strict=False):
            self.part(f"tokenizer{suffix}")
        towers = [
            load_tower(self.directory, suffix, class_name, self.allow_pickle, self.variant)
            for suffix, class_name in zip(SUFFIXES, class_names, strict=False)
        ]
        if len({tower.length for tower in towers}) > 1:
            raise ModelError(
                f"expected text encoders of one length in {self.directory}, got "
                f"{' and '.join(str(tower.length) for tower in towers)} tokens."
            )
        return PromptEncoder(towers)

    def prompts(self, default_templates: Sequence[str] = DEFAULT_TEMPLATES) -> ClassPrompts:
        """The prompts that were asked for; what is None is what the model directory states.

        A directory states "classes", "templates" and "average" in ``dive_fast.json``; names of
        classes may also stand as ``id2label`` in ``model_index.json``. Where neither says, names
        are put into ``default_templates``.
        """
        classes, templates = require_classes(self.directory, self.classes), self.templates
        if templates is None and not isinstance(classes, Mapping):
            stated = self.extra.get("templates")
            templates = default_templates if stated is None else stated
        average = self.extra.get("average") if self.average is None else self.average
        return ClassPrompts.make(classes, templates, average)
