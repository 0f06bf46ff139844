"""Transformers that read a prompt's sequence under the mask of its tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dive_fast.core.schedule import Schedule
from dive_fast.errors import ModelError
from dive_fast.models.autoencoder import Autoencoder
from dive_fast.models.base import check_sizes
from dive_fast.models.text.pipeline_text import PipelineText
from dive_fast.models.text.prompts import ClassPrompts
from dive_fast.models.transformers.base import TextTransformer


class MaskedTransformer(TextTransformer):
    """A condition is a sequence and the mask of its tokens; see ``TextTransformer``.

    Raises:
        ModelError: the text encoder's width is not what the network takes.
    """

    constants = ("mask",)

    def __init__(
        self,
        network: nn.Module,
        vae: Autoencoder,
        schedule: Schedule,
        text: PipelineText,
        classes: ClassPrompts,
        **model: Any,
    ) -> None:
        length, width = text.parts.shapes["sequence"]
        if width != self.text_width(network):
            raise ModelError(
                f"expected a text encoder of width {self.text_width(network)} for the "
                f"transformer, got {width}."
            )
        self.check_length(network, length)
        super().__init__(network, vae, schedule, text, classes, **model)

    @classmethod
    def text_width(cls, network: nn.Module) -> int:
        """Of the sequence that the network takes."""
        return network.config.caption_channels

    @classmethod
    def check_length(cls, network: nn.Module, length: int) -> None:
        """That the network takes so many tokens; a ``ModelError`` if not."""

    @classmethod
    def check_network(cls, network: nn.Module, directory: Path) -> None:
        check_sizes(network, f"transformer in {directory}")
        side, patch = network.config.sample_size, network.config.patch_size
        if side < 1 or side % patch:
            raise ModelError(
                f"expected a sample_size that is a multiple of the patch_size {patch} of the "
                f"transformer in {directory}, got {side}."
            )


def masked(sequence: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """The parts of conditions; 0 where the network does not look.

    What a text encoder makes of padding is many times as much as a prompt, differs from prompt to
    prompt, and would decide which class is nearest. Attention without any token is even, so there
    all of it is seen.

    Args:
        sequence: float [N, L, width].
        mask: int [N, L], 1 for a token and 0 for padding.
    """
    seen = (mask > 0) | (mask == 0).all(dim=1, keepdim=True)
    return {"sequence": sequence * seen.unsqueeze(-1), "mask": mask}


def tokens(mask: Tensor) -> Tensor:
    """The mask as the tokenizer gives it, int64: of a mean, every token that one of them has."""
    return (mask > 0).to(torch.int64)
