"""The parts of the prior's transformer, as in DiT (arXiv 2212.09748)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEED_FORWARD = 4
FREQUENCIES = 128


class TimeEmbedding(nn.Module):
    """Timesteps to vectors: sines and cosines, then two linear layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(2 * FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        )

    def forward(self, t: Tensor) -> Tensor:
        """int64 [B] to [B, width]."""
        like = self.mlp[0].weight
        steps = torch.arange(FREQUENCIES, device=like.device, dtype=like.dtype)
        angles = t[:, None] * torch.exp(-math.log(10_000.0) * steps / FREQUENCIES)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1))


class Block(nn.Module):
    """Self-attention and feed-forward, scaled and gated by time; the identity at first."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, FEED_FORWARD * width),
            nn.GELU(),
            nn.Linear(FEED_FORWARD * width, width),
        )
        self.modulation = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, h: Tensor, time: Tensor) -> Tensor:
        """[B, n, width] and [B, width] to [B, n, width]."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(time)[:, None].chunk(6, 2)
        h = h + gate1 * self._attend(self.norm1(h) * (1 + scale1) + shift1)
        return h + gate2 * self.feed_forward(self.norm2(h) * (1 + scale2) + shift2)

    def _attend(self, h: Tensor) -> Tensor:
        q, k, v = self.qkv(h).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
