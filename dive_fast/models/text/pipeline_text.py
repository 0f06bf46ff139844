"""Prompts to conditions by a diffusers pipeline's own ``encode_prompt``."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dive_fast.core.condition import ConditionParts
from dive_fast.errors import ModelError
from dive_fast.models.text.prompts import ClassPrompts

ENCODE_BATCH = 8  # prompts

# (pipeline, prompts, device) to the parts of their conditions, each [N, ...].
Encode = Callable[[Any, list[str], torch.device], Mapping[str, Tensor]]


class PipelineText:
    """The text half of a pipeline; the same interface as ``towers.PromptEncoder``.

    Args:
        pipeline: a diffusers pipeline whose tokenizers and text encoders are there; its network and
            its VAE need not be.
        encode: calls ``encode_prompt`` and names what it gives.
        constants: the parts that are not optimised.

    Attributes:
        parts: what a condition is made of.
    """

    pooled = 0  # the parts say it all

    def __init__(self, pipeline: Any, encode: Encode, constants: Collection[str] = ()) -> None:
        self.pipeline = pipeline
        self._encode_prompts = encode
        self.encoders: tuple[nn.Module, ...] = tuple(
            part for part in pipeline.components.values() if _is_text_encoder(part)
        )
        self.parts = ConditionParts.of(self._encode([""], torch.device("cpu")), constants)

    @property
    def dim(self) -> int:
        return self.parts.dim

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.dim,)

    def modules(self) -> tuple[nn.Module, ...]:
        """The text encoders, for ``identity``."""
        return self.encoders

    def check(self, classes: ClassPrompts) -> None:
        """That no two classes have the same prompts.

        Raises:
            ModelError: two have.
        """
        seen: dict[tuple[str, ...], str] = {}
        for name, prompts in zip(classes.names, classes.prompts, strict=True):
            if prompts in seen:
                raise ModelError(
                    f"the classes {seen[prompts]!r} and {name!r} have the same prompts."
                )
            seen[prompts] = name

    def table(self, classes: ClassPrompts, device: torch.device) -> Tensor:
        """The conditions of all classes, float32 [C, parts * D] on the CPU."""
        texts = [prompt for group in classes.prompts for prompt in group]
        rows = self.encode(texts, device)
        if classes.average == "loss":
            return rows.view(len(classes.names), -1)
        groups = rows.split([len(group) for group in classes.prompts])
        return torch.stack([group.mean(dim=0) for group in groups])

    def encode(self, prompts: Sequence[str], device: torch.device) -> Tensor:
        """The conditions of prompts, float32 [N, D] on the CPU."""
        for encoder in self.encoders:
            encoder.to(device)
        try:
            found = [
                self.parts.pack(self._encode(list(prompts[i : i + ENCODE_BATCH]), device)).cpu()
                for i in range(0, len(prompts), ENCODE_BATCH)
            ]
        finally:
            for encoder in self.encoders:
                encoder.to("cpu")
        return torch.cat(found)

    def _encode(self, prompts: list[str], device: torch.device) -> Mapping[str, Tensor]:
        with torch.no_grad():
            return self._encode_prompts(self.pipeline, prompts, device)


def _is_text_encoder(part: Any) -> bool:
    return isinstance(part, nn.Module) and type(part).__module__.startswith("transformers.")
