"""The base of the families whose answers are prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from dive_fast.core.schedule import Schedule
from dive_fast.core.vocabulary import Vocabulary
from dive_fast.models.autoencoder import Autoencoder
from dive_fast.models.base import LatentModel
from dive_fast.models.files.checkpoint import fingerprint
from dive_fast.models.text.prompts import DEFAULT_TEMPLATES, Classes, ClassPrompts
from dive_fast.models.text.towers import PromptEncoder


class PromptedModel(LatentModel):
    """A text-conditional family: a condition is the encoding of a prompt, flat.

    Args:
        network, vae, schedule, model: see ``LatentModel``.
        text: encodes prompts to conditions.
        classes: the answers.
        device: where the prompts are encoded; ``to`` moves the network itself.
        zero_unconditional: "no condition" is zeros, not the empty prompt.
    """

    templates: ClassVar[Sequence[str]] = DEFAULT_TEMPLATES  # where nobody says any

    def __init__(
        self,
        network: nn.Module,
        vae: Autoencoder,
        schedule: Schedule,
        text: PromptEncoder,
        classes: ClassPrompts,
        *,
        device: torch.device | str = "cpu",
        zero_unconditional: bool = False,
        **model: Any,
    ) -> None:
        super().__init__(network, vae, schedule, **model)
        self.text = text
        self.zero_unconditional = zero_unconditional
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
        if templates is None and not isinstance(classes, Mapping):
            templates = self.templates
        self._set(ClassPrompts.make(classes, templates, average), self.device)

    def vocabulary_of(self, prompts: Sequence[str]) -> Vocabulary:
        """Prompts as they stand, one row each, beside the model's own classes, which stay.

        Some may be the same to the text encoder: ``text.twins`` finds those.

        Raises:
            ModelError: there is no memory for so many, or the encoder fails.
        """
        asked = ClassPrompts(tuple(prompts), tuple((prompt,) for prompt in prompts))
        # It is the same for every part.
        unconditional = self.vocabulary.unconditional[: self.text.dim]
        table = self.text.table(asked, self.device, twins=True)
        return Vocabulary(table, asked.names, unconditional, shape=self._row_shape())

    def _row_shape(self) -> tuple[int, ...]:
        # The pooled embedding of SDXL is no further token: its rows stay flat.
        return (self.text.dim,) if self.text.pooled else self.text.shape

    def _set(self, classes: ClassPrompts, device: torch.device) -> None:
        self.text.check(classes)
        table = self.text.table(classes, device)
        unconditional = self.no_condition(device)
        shape = self._row_shape()
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

    def no_condition(self, device: torch.device) -> torch.Tensor:
        """What stands for "no condition" in guidance, float32 [D]; encoded on the device."""
        if self.zero_unconditional:
            return torch.zeros(self.text.dim)
        return self.text.encode([""], device)[0]

    def facts(self) -> dict[str, Any]:
        weights = [fingerprint(encoder) for encoder in self.text.modules()]
        return {**super().facts(), **self.classes.to_dict(), "text_weights": weights}
