"""What all models have in common whose UNet cross-attends to an encoded layout."""

from __future__ import annotations

import math

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from dive_fast.errors import ModelError
from dive_fast.layouts import LayoutFormat
from dive_fast.models import unet as stages
from dive_fast.models.autoencoder import Autoencoder
from dive_fast.models.layout_support import embed_tokens
from dive_fast.models.protocol import State
from dive_fast.vocabulary import Vocabulary


class LayoutStages:
    """The network in parts, see ``models.protocol.StagedModel``; the subclass sets the attributes.

    A condition is the token embeddings of a layout end to end, [M, S D]. The layout encoder and the
    keys and values of the cross-attentions depend on it alone, so they are computed once per
    condition.

    Attributes:
        unet: frozen.
        layout_encoder: token embeddings [N, S, D] to what the UNet cross-attends to, [N, L, W].
        vae: encodes pictures to latents, or None.
        layout: what the tokens mean.
        vocabulary: of the tokens: table [V, D] and what each one means.
    """

    name: str
    unet: UNet2DConditionModel
    layout_encoder: nn.Module
    vae: Autoencoder | None
    layout: LayoutFormat
    vocabulary: Vocabulary
    device: torch.device
    dtype: torch.dtype

    def to(self, device: torch.device, dtype: torch.dtype) -> LayoutStages:
        """Moves the UNet and the layout encoder; the VAE stays in float32."""
        # ModelMixin.to() warns about modules to keep in float32 even where there are none.
        torch.nn.Module.to(self.unet, device, dtype)
        torch.nn.Module.to(self.layout_encoder, device, dtype)
        if self.vae is not None:
            self.vae.to(device)
        self.device, self.dtype = torch.device(device), dtype
        return self

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens int64 [N, S] to conditions, float32 [N, S D] on the CPU.

        Raises:
            ModelError: another shape or dtype, or tokens outside the vocabulary.
        """
        return embed_tokens(self.layout, self.vocabulary.table, tokens)

    def predict(self, x_t: torch.Tensor, t: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """See ``models.protocol.Model.predict``; condition is [M, S D]."""
        hidden = self._encode_layout(condition)
        return self.unet(x_t.to(self.dtype), t, encoder_hidden_states=hidden).sample

    def prefix(self, x_t: torch.Tensor, t: torch.Tensor) -> State:
        """See ``models.protocol.StagedModel`` and ``models.unet``."""
        return stages.prefix(self.unet, x_t.to(self.dtype), t)

    def project(self, condition: torch.Tensor) -> State:
        """The layout encoder, then the keys and values of all cross-attentions."""
        return stages.project(self.unet, self._encode_layout(condition))

    def encoder(self, prefix: State, projected: State) -> State:
        """The rest of the down blocks."""
        return stages.encoder(self.unet, prefix, projected)

    def decoder(self, encoded: State, projected: State) -> torch.Tensor:
        """Mid block, up blocks and output."""
        return stages.decoder(self.unet, encoded, projected)

    def _encode_layout(self, condition: torch.Tensor) -> torch.Tensor:
        """[N, S D] to what the UNet cross-attends to, [N, L, W]."""
        shape = (self.layout.n_slots, self.vocabulary.dim)
        if condition.dim() != 2 or condition.shape[1] != math.prod(shape):
            raise ModelError(
                f"the condition of the layout-to-image model {self.name} is the embeddings of "
                f"{shape[0]} tokens, expected [N, {math.prod(shape)}], got {list(condition.shape)}."
            )
        return self.layout_encoder(condition.to(self.dtype).unflatten(1, shape))
