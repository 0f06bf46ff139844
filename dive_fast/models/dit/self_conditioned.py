"""A DiT whose later blocks are conditioned on what its earlier ones have found.

Self-conditioning after DDAE++ (arXiv 2505.10999): features of the middle of the network are pooled
over the image and guide the blocks behind.

    f   = W LayerNorm(mean_i z_i) + b,  z_i the tokens behind the middle block
    c_l = temb(t) + y                   of the blocks up to there
    c_l = temb(t) + y + f               of the blocks behind, and of the output layer

W and b start as zero: an untrained network is diffusers' own. One linear map is enough, as what
each block makes of c_l is a linear map of SiLU(c_l).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn


class Rerouted(NamedTuple):
    """Stands where a block gets its labels: the labels, and f [M, D] to add to their embedding."""

    labels: Tensor
    features: Tensor


class _Norm(nn.Module):
    """diffusers' ``AdaLayerNormZero`` of a block, made of its parts, which also takes features.

    The features come from outside the embedder, so that whatever stands in the embedder's place
    (a class vector, one embedder for all blocks) leaves them alone.
    """

    def __init__(self, plain: nn.Module) -> None:
        super().__init__()
        self.emb, self.silu = plain.emb, plain.silu
        self.linear, self.norm = plain.linear, plain.norm

    def forward(
        self,
        x: Tensor,
        timestep: Tensor | None,
        class_labels: Rerouted,
        hidden_dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        c = self.emb(timestep, class_labels.labels, hidden_dtype=hidden_dtype)
        found = self.linear(self.silu(c + class_labels.features))
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = found.chunk(6, dim=1)
        x = self.norm(x) * (1 + scale[:, None]) + shift[:, None]
        return x, gate, shift_mlp, scale_mlp, gate_mlp


class _Rerouting(nn.Module):
    """f [M, D] of tokens [M, N, D]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        # Zeros draw nothing, so that the other weights start as they do without.
        self.weight = nn.Parameter(torch.zeros(width, width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, tokens: Tensor) -> Tensor:
        pooled = tokens.mean(dim=1)
        return F.linear(F.layer_norm(pooled, pooled.shape[1:]), self.weight, self.bias)


class SelfConditionedDiT(DiTTransformer2DModel):
    """A ``DiTTransformer2DModel`` with self-conditioning; it takes the same arguments.

    Attributes:
        middle: how many blocks the features are taken behind: half of them, at least one.
    """

    _supports_gradient_checkpointing = False

    # The parent's own registers the configuration, and from_config looks at its signature.
    @functools.wraps(DiTTransformer2DModel.__init__)
    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self.middle = max(1, len(self.transformer_blocks) // 2)
        for block in self.transformer_blocks[self.middle :]:
            block.norm1 = _Norm(block.norm1)
        self.rerouting = _Rerouting(self.inner_dim)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | None = None,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """As the parent's.

        Args:
            hidden_states: x_t, float [M, C, h, w].
            timestep: t [M].
            class_labels: int64 [M].
        """
        tokens, features = through(
            self, self.pos_embed(hidden_states), class_labels, timestep=timestep
        )
        embed = self.transformer_blocks[0].norm1.emb
        c = embed(timestep, class_labels, hidden_dtype=tokens.dtype)
        found = output(self, tokens, c, features)
        return Transformer2DModelOutput(sample=found) if return_dict else (found,)


def through(
    transformer: DiTTransformer2DModel,
    tokens: Tensor,
    labels: Tensor,
    *,
    timestep: Tensor | None = None,
    first: int = 0,
    last: int | None = None,
    features: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Tokens [M, N, D] behind the blocks ``first`` to ``last`` (exclusive), and f if it is known.

    Args:
        labels, timestep: what the embedders of the blocks take.
        features: f [M, D], where a block before ``first`` has made it.
    """
    middle = transformer.middle if isinstance(transformer, SelfConditionedDiT) else None
    for i, block in enumerate(transformer.transformer_blocks[first:last], start=first + 1):
        given = labels if features is None else Rerouted(labels, features)
        tokens = block(tokens, timestep=timestep, class_labels=given)
        if i == middle:
            features = transformer.rerouting(tokens)
    return tokens, features


def output(
    transformer: DiTTransformer2DModel, tokens: Tensor, c: Tensor, features: Tensor | None
) -> Tensor:
    """The output layer, which puts the patches together again: [M, C, h, w].

    Args:
        tokens: behind the last block, [M, N, D].
        c: temb(t) + y of the first block's embedder, which also serves this layer, [M, D].
        features: f [M, D]; None without self-conditioning.
    """
    c = c if features is None else c + features
    shift, scale = transformer.proj_out_1(F.silu(c)).chunk(2, dim=1)
    tokens = transformer.norm_out(tokens) * (1 + scale[:, None]) + shift[:, None]
    side, patch = round(tokens.shape[1] ** 0.5), transformer.patch_size
    patches = transformer.proj_out_2(tokens).unflatten(2, (patch, patch, -1))
    # [M, row, column, y, x, C] to [M, C, row, y, column, x].
    grid = patches.unflatten(1, (side, side)).permute(0, 5, 1, 3, 2, 4)
    return grid.flatten(4, 5).flatten(2, 3)
