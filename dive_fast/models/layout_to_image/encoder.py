"""The layout encoder of latent diffusion's layout-to-image models (arXiv 2112.10752).

A pre-norm transformer over token and position embeddings, the ``Encoder`` of x-transformers:
queries, keys and values without bias, feed-forward of four times the width with exact GELU, a
LayerNorm at the end.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from dive_fast.errors import ModelError

FEED_FORWARD = 4


class LayoutEncoder(ModelMixin, ConfigMixin):
    """Token embeddings of a layout to what a UNet cross-attends to.

    Args:
        vocabulary_size: V, the number of tokens.
        n_slots: S, the length of the sequences.
        width: D.
        layers: the number of pairs of self-attention and feed-forward.
        heads: of each self-attention.
        head_dim: channels of a head; heads x head_dim need not be the width.
        layout: ``LayoutFormat.to_dict()``, what the tokens mean.

    Attributes:
        token_embedding: the table [V, D].
        position_embedding: one row per slot, [S, D].
    """

    @register_to_config
    def __init__(
        self,
        vocabulary_size: int = 8192,
        n_slots: int = 92,
        width: int = 512,
        layers: int = 16,
        heads: int = 8,
        head_dim: int = 64,
        layout: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(vocabulary_size, width)
        self.position_embedding = nn.Embedding(n_slots, width)
        self.blocks = nn.ModuleList(_Block(width, heads, head_dim) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.position_embedding.weight, std=0.02)

    def forward(self, embeddings: Tensor) -> Tensor:
        """Encodes a layout; differentiable.

        Args:
            embeddings: rows of ``token_embedding``, or anything between them, [B, S, D]; position
                embeddings are added here.

        Returns:
            [B, S, D].

        Raises:
            ModelError: another shape.
        """
        slots, width = self.position_embedding.weight.shape
        if embeddings.dim() != 3 or tuple(embeddings.shape[1:]) != (slots, width):
            raise ModelError(
                f"expected token embeddings of shape [B, {slots}, {width}], "
                f"got {list(embeddings.shape)}."
            )
        h = embeddings + self.position_embedding.weight
        for block in self.blocks:
            h = block(h)
        return self.norm(h)


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = _SelfAttention(width, heads, head_dim)
        self.norm2 = nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, FEED_FORWARD * width),
            nn.GELU(),
            nn.Linear(FEED_FORWARD * width, width),
        )

    def forward(self, h: Tensor) -> Tensor:
        h = h + self.attention(self.norm1(h))
        return h + self.feed_forward(self.norm2(h))


class _SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, heads * head_dim, bias=False)
        self.to_k = nn.Linear(width, heads * head_dim, bias=False)
        self.to_v = nn.Linear(width, heads * head_dim, bias=False)
        self.to_out = nn.Linear(heads * head_dim, width)

    def forward(self, h: Tensor) -> Tensor:
        q, k, v = (
            linear(h).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for linear in (self.to_q, self.to_k, self.to_v)
        )
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
