"""The families "pixart-alpha" (arXiv 2310.00426) and "pixart-sigma" (arXiv 2403.04692)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import is_bs4_available, is_ftfy_available
from torch import Tensor, nn

from dive_fast.errors import ModelError
from dive_fast.models.files.checkpoint import read_json
from dive_fast.models.transformers.base import load_transformer
from dive_fast.models.transformers.masked import MaskedTransformer, masked, tokens


class PixArtAlpha(MaskedTransformer):
    """A condition is T5's sequence of 120 tokens, and its mask.

    The network of 1024 x 1024 pixels is also told the image's size, as that of the whole image.
    """

    family = "pixart-alpha"
    pipeline_class = "PixArtAlphaPipeline"
    network_class = "PixArtTransformer2DModel"
    older_names = ("Transformer2DModel",)
    target = "epsilon"

    @staticmethod
    def encode_prompts(
        pipeline: Any, prompts: list[str], device: torch.device
    ) -> dict[str, Tensor]:
        sequence, mask, _, _ = pipeline.encode_prompt(
            prompts,
            do_classifier_free_guidance=False,
            device=device,
            clean_caption=_cleans_captions(),
        )
        return masked(sequence, mask)

    @classmethod
    def widths(cls, network: nn.Module) -> dict[str, int]:
        # Without a projection the blocks take the sequence as it is.
        config = network.config
        return {"sequence": config.caption_channels or config.cross_attention_dim}

    def facts(self) -> dict[str, Any]:
        return {**super().facts(), "clean_caption": _cleans_captions()}

    def run(self, x_t: Tensor, t: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        sizes: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if self.network.use_additional_conditions:
            _, height, width = self.image_shape
            sizes["resolution"] = x_t.new_tensor([[height, width]]).expand(len(x_t), -1)
            sizes["aspect_ratio"] = x_t.new_tensor([[height / width]]).expand(len(x_t), -1)
        return self.network(
            x_t,
            encoder_hidden_states=parts["sequence"],
            encoder_attention_mask=tokens(parts["mask"]),
            timestep=t,
            added_cond_kwargs=sizes,
        ).sample


class PixArtSigma(PixArtAlpha):
    """A condition is T5's sequence of 300 tokens, and its mask; no sizes."""

    family = "pixart-sigma"
    pipeline_class = "PixArtSigmaPipeline"

    @classmethod
    def check_network(cls, network: nn.Module, directory: Path) -> None:
        super().check_network(network, directory)
        if network.use_additional_conditions:
            raise ModelError(
                f"expected use_additional_conditions to be false in the transformer in "
                f"{directory}, as PixArt-Sigma takes no sizes of images, got true."
            )


def _cleans_captions() -> bool:
    """Whether the pipelines clean prompts here, which they do where these packages are."""
    return is_bs4_available() and is_ftfy_available()


def load(directory: Path, **asked: Any) -> PixArtAlpha:
    """See ``load_transformer``."""
    name = read_json(directory / "model_index.json")["_class_name"]
    family = PixArtSigma if name == PixArtSigma.pipeline_class else PixArtAlpha
    return load_transformer(family, directory, **asked)
