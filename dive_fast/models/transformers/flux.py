"""The family "flux": FLUX.1 [dev] and [schnell] (Black Forest Labs), a rectified flow."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dive_fast.core.numbers import is_number
from dive_fast.errors import ModelError
from dive_fast.models.files.sidecar import FILE, read_extra
from dive_fast.models.transformers.base import MOST_SIDE, TextTransformer, load_transformer

PACKED = 4  # the network's channels per channel of the latents: squares of 2 x 2


class Flux(TextTransformer):
    """A condition is T5's sequence and CLIP's pooled vector.

    Attributes:
        guidance: what a network with a guidance embedding ([dev]) is told. 3.5 is what diffusers'
            pipeline and its LoRA training (``--guidance_scale``) take if nobody says.
    """

    family = "flux"
    pipeline_class = "FluxPipeline"
    network_class = "FluxTransformer2DModel"

    guidance: float = 3.5

    @staticmethod
    def encode_prompts(
        pipeline: Any, prompts: list[str], device: torch.device
    ) -> dict[str, Tensor]:
        sequence, pooled, _ = pipeline.encode_prompt(prompts, device=device)
        return {"sequence": sequence, "pooled": pooled}

    @classmethod
    def check_network(cls, network: nn.Module, directory: Path) -> None:
        channels, out = network.config.in_channels, network.proj_out.out_features
        if channels % PACKED or out != channels:
            raise ModelError(
                f"expected a network in {directory} that takes and gives latents packed 2 x 2, "
                f"got {channels} channels in and {out} out."
            )

    @classmethod
    def latents(cls, network: nn.Module) -> tuple[int, int, int]:
        side = 128  # the pipeline's default_sample_size: 1024 pixels
        return (network.config.in_channels // PACKED, side, side)

    @classmethod
    def sides(cls, network: nn.Module) -> range:
        return range(2, MOST_SIDE + 1, 2)

    @classmethod
    def widths(cls, network: nn.Module) -> dict[str, int]:
        return {
            "sequence": network.config.joint_attention_dim,
            "pooled": network.config.pooled_projection_dim,
        }

    def facts(self) -> dict[str, Any]:
        told = {"guidance": self.guidance} if self.network.config.guidance_embeds else {}
        return {**super().facts(), **told}

    def run(self, x_t: Tensor, t: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        m, channels, h, w = x_t.shape
        pipeline, tokens = self.text.pipeline, parts["sequence"].shape[1]
        place = {"device": x_t.device, "dtype": x_t.dtype}
        guidance = None
        if self.network.config.guidance_embeds:
            guidance = torch.full((m,), self.guidance, device=x_t.device)
        found = self.network(
            pipeline._pack_latents(x_t, m, channels, h, w),
            encoder_hidden_states=parts["sequence"],
            pooled_projections=parts["pooled"],
            timestep=self.sigma(t),
            img_ids=pipeline._prepare_latent_image_ids(m, h // 2, w // 2, x_t.device, x_t.dtype),
            txt_ids=torch.zeros(tokens, 3, **place),
            guidance=guidance,
        ).sample
        return pipeline._unpack_latents(found, h, w, vae_scale_factor=1)


def load(directory: Path, **asked: Any) -> Flux:
    """See ``load_transformer``; ``dive_fast.json`` may state the ``guidance``.

    Raises:
        ModelError: as ``load_transformer``, or a guidance that is none.
    """
    guidance = read_extra(directory).get("guidance", Flux.guidance)
    if not is_number(guidance, 0):
        raise ModelError(
            f"guidance in {directory / FILE} must be a number from 0, got {guidance!r}."
        )
    model = load_transformer(Flux, directory, **asked)
    model.guidance = float(guidance)
    return model
