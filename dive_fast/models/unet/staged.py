"""What all models of a text-conditional UNet share: the call, and the network in parts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch

from dive_fast.models.protocol import State
from dive_fast.models.unet import stages


class WholeUNet(ABC):
    """A model whose network is a UNet, run whole; a subclass says what a condition is to it."""

    network: Any
    dtype: torch.dtype

    @property
    def unet(self) -> Any:
        """Called as diffusers' ``UNet2DConditionModel``."""
        return self.network

    @abstractmethod
    def arguments(self, condition: torch.Tensor) -> dict[str, Any]:
        """What the UNet takes for conditions [M, D], by its own names; differentiable."""

    def predict(self, x_t: torch.Tensor, t: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """See ``models.protocol.Model.predict``."""
        return self.unet(x_t.to(self.dtype), t, **self.arguments(condition)).sample


class StagedUNet(WholeUNet):
    """A UNet that can be cut: ``models.protocol.StagedModel`` by ``unet.stages``."""

    def prefix(self, x_t: torch.Tensor, t: torch.Tensor) -> State:
        """See ``stages.prefix``."""
        return stages.prefix(self.unet, x_t.to(self.dtype), t)

    def project(self, condition: torch.Tensor) -> State:
        """Keys and values of all cross-attentions; for SDXL also what joins the time embedding."""
        return stages.project(self.unet, **self.arguments(condition))

    def encoder(self, prefix: State, projected: State) -> State:
        """The rest of the down blocks."""
        return stages.encoder(self.unet, prefix, *self.attended(projected))

    def decoder(self, encoded: State, projected: State) -> torch.Tensor:
        """Mid block, up blocks and output."""
        return stages.decoder(self.unet, encoded, *self.attended(projected))

    def attended(self, projected: State) -> tuple[State, State]:
        """The keys and values, and the grounding tokens, of what ``project`` gave."""
        return projected, ()
