"""The family "sana" (arXiv 2410.10629): a rectified flow on latents of a deep autoencoder."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import SanaPipeline
from torch import Tensor, nn

from dive_fast.errors import ModelError
from dive_fast.models.transformers.base import load_transformer
from dive_fast.models.transformers.gemma import GemmaTransformer
from dive_fast.models.transformers.masked import masked, tokens

# What the pipeline puts before every prompt.
_INSTRUCTION = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"]


class Sana(GemmaTransformer):
    """A condition is Gemma's sequence behind the pipeline's instruction, 300 tokens, and its mask.

    Of the instruction only the first token and the last are part of it.
    """

    family = "sana"
    pipeline_class = "SanaPipeline"
    network_class = "SanaTransformer2DModel"
    vae_classes = ("AutoencoderDC",)

    @staticmethod
    def encode_prompts(
        pipeline: Any, prompts: list[str], device: torch.device
    ) -> dict[str, Tensor]:
        sequence, mask, _, _ = pipeline.encode_prompt(
            prompts,
            do_classifier_free_guidance=False,
            device=device,
            complex_human_instruction=_INSTRUCTION.default,
        )
        return masked(sequence, mask)

    @classmethod
    def check_network(cls, network: nn.Module, directory: Path) -> None:
        super().check_network(network, directory)
        if network.config.guidance_embeds:
            raise ModelError(
                f"expected guidance_embeds to be false in the transformer in {directory}, got "
                f"true: distilled ones (Sana-Sprint) are not supported."
            )

    def run(self, x_t: Tensor, t: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        scale = len(self.schedule) * self.network.config.timestep_scale
        return self.network(
            x_t,
            encoder_hidden_states=parts["sequence"],
            encoder_attention_mask=tokens(parts["mask"]),
            timestep=self.sigma(t) * scale,
        ).sample


def load(directory: Path, **asked: Any) -> Sana:
    """See ``load_transformer``."""
    return load_transformer(Sana, directory, **asked)
