"""What all models have in common whose UNet cross-attends to an encoded layout."""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel

from dive_fast.models.layout_to_image.base import LayoutConditioned
from dive_fast.models.protocol import State
from dive_fast.models.unet import stages


class LayoutStages(LayoutConditioned):
    """The network in parts, see ``models.protocol.StagedModel``.

    The layout encoder and the keys and values of the cross-attentions depend on the condition
    alone, so they are computed once per condition.
    """

    network: UNet2DConditionModel

    @property
    def unet(self) -> UNet2DConditionModel:
        """The denoiser."""
        return self.network

    def predict(self, x_t: torch.Tensor, t: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """See ``models.protocol.Model.predict``; condition is [M, S D]."""
        hidden = self.encode_layout(condition)
        return self.unet(x_t.to(self.dtype), t, encoder_hidden_states=hidden).sample

    def prefix(self, x_t: torch.Tensor, t: torch.Tensor) -> State:
        """See ``models.protocol.StagedModel`` and ``models.unet``."""
        return stages.prefix(self.unet, x_t.to(self.dtype), t)

    def project(self, condition: torch.Tensor) -> State:
        """The layout encoder, then the keys and values of all cross-attentions."""
        return stages.project(self.unet, self.encode_layout(condition))

    def encoder(self, prefix: State, projected: State) -> State:
        """The rest of the down blocks."""
        return stages.encoder(self.unet, prefix, projected)

    def decoder(self, encoded: State, projected: State) -> torch.Tensor:
        """Mid block, up blocks and output."""
        return stages.decoder(self.unet, encoded, projected)
