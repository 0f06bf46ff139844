"""Transformers whose prompts go to Gemma 2 behind an instruction, which "no condition" lacks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dive_fast.models.transformers.masked import MaskedTransformer, masked


class GemmaTransformer(MaskedTransformer):
    """A condition is Gemma's sequence and its mask."""

    def no_condition(self, device: torch.device) -> Tensor:
        return self.text.encode([""], device, _encode_nothing)[0]


def _encode_nothing(pipeline: Any, prompts: list[str], device: torch.device) -> dict[str, Tensor]:
    """What the pipeline guides away from: the prompt alone."""
    _, _, sequence, mask = pipeline.encode_prompt(
        prompts, do_classifier_free_guidance=True, negative_prompt=prompts, device=device
    )
    return masked(sequence, mask)
