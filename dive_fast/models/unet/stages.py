"""diffusers' ``UNet2DConditionModel`` in exact stages, cut where the condition first enters.

The condition c (text embeddings) reaches the network through its cross-attentions alone, as keys
and values K = c W_k, V = c W_v. So a forward is

    f(x_t, t, c) = decoder(encoder(prefix(x_t, t), project(c)), project(c))

with ``prefix`` everything up to the first cross-attention (conv_in, the time embedding, the
resnets and the self-attention before it), ``project`` the K and V of every cross-attention in call
order, ``encoder`` the rest of the down blocks, and ``decoder`` mid block, up blocks and output.
Every stage calls the network's own modules: no weights are copied and nothing is patched.

SDXL (``addition_embed_type="text_time"``) also adds the pooled text to the time embedding, which
every resnet sees. There ``prefix`` is conv_in and the bare time embedding only, and the pooled text
travels as the last tensor of ``project``.

GLIGEN (arXiv 2301.07093) also attends to grounding tokens, one per object, between the
self-attention and the cross-attention of every block. The prefix ends before that, so it is the
same; ``grounding`` projects the tokens for each block, and ``encoder`` and ``decoder`` take them
beside K and V. Left out, a GLIGEN network is the text-conditional one that it was made of.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import repeat

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock, GatedSelfAttentionDense
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn

from dive_fast.errors import ModelError
from dive_fast.models.unet.support import (
    can_be_cut,
    check_supported,
    has_cross_attention,
    transformer_blocks,
)

State = tuple[Tensor, ...]
# Of each block K, V and the grounding tokens, or None.
_Inputs = Iterator[tuple[Tensor, Tensor, Tensor | None]]

__all__ = [
    "UNet2DConditionModel",
    "UNet2DConditionOutput",
    "added_embedding",
    "can_be_cut",
    "check_supported",
    "condition_enters_time",
    "decoder",
    "encoder",
    "grounding",
    "prefix",
    "project",
    "reused_parameters",
]


def prefix(unet: UNet2DConditionModel, sample: Tensor, timestep: Tensor | float | int) -> State:
    """Everything that does not depend on the condition.

    Args:
        sample: x_t [M, C, h, w], in the network's dtype.
        timestep: t, one number or [M].

    Returns:
        The time embedding [M, E]; the skips before the first cross-attention [M, c, h, w] each; the
        output of the resnet before it [M, c, h, w]; the tokens after the first self-attention
        [M, h w, c], where norm2 comes next. With ``condition_enters_time``: the bare time embedding
        and the output of conv_in.
    """
    if unet.config.center_input_sample:
        sample = 2 * sample - 1.0
    emb = unet.time_embedding(unet.get_time_embed(sample, timestep))
    h = unet.conv_in(sample)
    if condition_enters_time(unet):
        return emb, h
    emb = _activated(unet, emb)
    skips = [h]
    for block in unet.down_blocks[: _entry(unet)]:
        h, outputs = block(h, emb)
        skips.extend(outputs)
    block = unet.down_blocks[_entry(unet)]
    h = block.resnets[0](h, emb)
    transformer = block.attentions[0]
    tokens, _ = transformer._operate_on_continuous_inputs(h)
    return (emb, *skips, h, _self_attention(transformer.transformer_blocks[0], tokens))


def project(
    unet: UNet2DConditionModel,
    encoder_hidden_states: Tensor,
    added_cond_kwargs: Mapping[str, Tensor] | None = None,
) -> State:
    """K and V of every cross-attention, in call order; differentiable.

    Args:
        encoder_hidden_states: the conditions [N, L, D].
        added_cond_kwargs: SDXL's "text_embeds" [N, P] and "time_ids" [N, 6]; other networks do not
            read it.

    Returns:
        K, V, K, V, ... [N, L, c] each, and for SDXL ``added_embedding`` [N, E] at the end.
    """
    attentions = [block.attn2 for block in transformer_blocks(unet)]
    kv = tuple(linear(encoder_hidden_states) for a in attentions for linear in (a.to_k, a.to_v))
    if not condition_enters_time(unet) or added_cond_kwargs is None:
        return kv
    return (*kv, added_embedding(unet, added_cond_kwargs, encoder_hidden_states))


def added_embedding(
    unet: UNet2DConditionModel, added_cond_kwargs: Mapping[str, Tensor], like: Tensor
) -> Tensor:
    """What SDXL adds to the time embedding, [N, E], computed in the dtype of ``like``."""
    return unet.get_aug_embed(like, like, added_cond_kwargs)


def grounding(unet: UNet2DConditionModel, tokens: Tensor) -> State:
    """GLIGEN's grounding tokens [N, n, D] as each block takes them, [N, n, c]; differentiable."""
    return tuple(block.fuser.linear(tokens) for block in transformer_blocks(unet))


def encoder(
    unet: UNet2DConditionModel, prefix_state: State, kv: State, grounded: State = ()
) -> State:
    """The rest of the down blocks.

    Args:
        prefix_state: of ``prefix``, M rows.
        kv: of ``project``, gathered to the same M rows.
        grounded: of ``grounding``, gathered to the same M rows; empty for no grounding.

    Returns:
        The time embedding [M, E] and all skips [M, c, h, w]; the last of them is what the mid block
        takes.

    Raises:
        ModelError: the numbers of rows differ, or SDXL's added embedding is missing.
    """
    _check_rows(unet, prefix_state, kv)
    inputs = _inputs(kv, grounded)
    emb, *skips = prefix_state
    if condition_enters_time(unet):
        emb = _activated(unet, emb + kv[-1])
        (h,), tokens, start = skips, None, 0
    else:
        *skips, h, tokens = skips
        start = _entry(unet)
    for block in unet.down_blocks[start:]:
        h, outputs = _down(block, h, emb, inputs, tokens)
        skips.extend(outputs)
        tokens = None
    return (emb, *skips)


def decoder(unet: UNet2DConditionModel, state: State, kv: State, grounded: State = ()) -> Tensor:
    """Mid block, up blocks and output.

    Args:
        state: of ``encoder``, M rows.
        kv: of ``project``, gathered to the same M rows.
        grounded: as ``encoder`` got it.

    Returns:
        The prediction [M, C_out, h, w].
    """
    _check_rows(unet, state, kv)
    emb, *skips = state
    done = sum(1 for _ in transformer_blocks(unet, down_only=True))
    inputs = _inputs(kv[2 * done :], grounded[done:])
    h = skips[-1]
    # As diffusers: sizes are only passed on where halving and doubling does not give them back.
    factor = 2**unet.num_upsamplers
    pass_size = any(side % factor != 0 for side in skips[0].shape[-2:])
    if unet.mid_block is not None:
        h = unet.mid_block.resnets[0](h, emb)
        for transformer, resnet in zip(
            unet.mid_block.attentions, unet.mid_block.resnets[1:], strict=True
        ):
            h = resnet(_transformer(transformer, h, inputs), emb)
    for block in unet.up_blocks:
        n = len(block.resnets)
        own, skips = skips[-n:], skips[:-n]
        size = skips[-1].shape[2:] if pass_size and skips else None
        h = _up(block, h, tuple(own), emb, inputs, size)
    if unet.conv_norm_out:
        h = unet.conv_act(unet.conv_norm_out(h))
    return unet.conv_out(h)


def condition_enters_time(unet: UNet2DConditionModel) -> bool:
    """Whether the condition also enters the time embedding (SDXL), so that there is no prefix."""
    return unet.config.addition_embed_type == "text_time"


def reused_parameters(unet: UNet2DConditionModel) -> Iterator[nn.Parameter]:
    """The parameters that ``prefix`` and ``project`` read (some more of the block at the cut)."""
    modules = [unet.conv_in, unet.time_embedding]
    if not condition_enters_time(unet):
        modules.extend(unet.down_blocks[: _entry(unet) + 1])
    for block in transformer_blocks(unet):
        modules.extend((block.attn2.to_k, block.attn2.to_v))
    for module in modules:
        yield from module.parameters()


def _entry(unet: UNet2DConditionModel) -> int:
    """The number of down blocks before the first with cross-attention."""
    return next(i for i, block in enumerate(unet.down_blocks) if has_cross_attention(block))


def _inputs(kv: State, grounded: State) -> _Inputs:
    # An added embedding at the end has no partner, so it drops out.
    return iter(list(zip(kv[0::2], kv[1::2], grounded or repeat(None), strict=False)))


def _check_rows(unet: UNet2DConditionModel, state: State, kv: State) -> None:
    if len(state[0]) != len(kv[0]):
        raise ModelError(
            f"expected the keys and values of {len(state[0])} rows, one for each row of the "
            f"state, got {len(kv[0])}."
        )
    if condition_enters_time(unet) and len(kv) % 2 == 0:
        raise ModelError(
            "expected keys and values projected with added_cond_kwargs, which this UNet needs "
            "(addition_embed_type 'text_time'), got none."
        )


def _activated(unet: UNet2DConditionModel, emb: Tensor) -> Tensor:
    return emb if unet.time_embed_act is None else unet.time_embed_act(emb)


def _down(
    block: nn.Module, h: Tensor, emb: Tensor, inputs: _Inputs, tokens: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    """A down block; with ``tokens`` its first resnet and first self-attention are already done."""
    if not has_cross_attention(block):
        return block(h, emb)
    outputs = []
    for resnet, transformer in zip(block.resnets, block.attentions, strict=True):
        if tokens is None:
            h = resnet(h, emb)
        h = _transformer(transformer, h, inputs, tokens)
        tokens = None
        outputs.append(h)
    if block.downsamplers is not None:
        for downsampler in block.downsamplers:
            h = downsampler(h)
        outputs.append(h)
    return h, outputs


def _up(
    block: nn.Module,
    h: Tensor,
    skips: State,
    emb: Tensor,
    inputs: _Inputs,
    size: torch.Size | None,
) -> Tensor:
    if not has_cross_attention(block):
        return block(h, skips, emb, size)
    for resnet, transformer, skip in zip(
        block.resnets, block.attentions, reversed(skips), strict=True
    ):
        h = _transformer(transformer, resnet(torch.cat([h, skip], dim=1), emb), inputs)
    for upsampler in block.upsamplers or ():
        h = upsampler(h, size)
    return h


def _transformer(
    transformer: Transformer2DModel, h: Tensor, inputs: _Inputs, tokens: Tensor | None = None
) -> Tensor:
    """h + transformer(h); with ``tokens`` its first self-attention is already done."""
    batch, _, height, width = h.shape
    resumed = tokens is not None
    if not resumed:
        tokens, _ = transformer._operate_on_continuous_inputs(h)
    for block in transformer.transformer_blocks:
        if not resumed:
            tokens = _self_attention(block, tokens)
        resumed = False
        k, v, objects = next(inputs)
        if objects is not None:
            tokens = _gated_attention(block.fuser, tokens, objects)
        tokens = _cross_attention(block.attn2, block.norm2(tokens), k, v) + tokens
        tokens = block.ff(block.norm3(tokens)) + tokens
    linear = transformer.use_linear_projection
    inner = transformer.in_channels if linear else transformer.inner_dim
    return transformer._get_output_for_continuous_inputs(tokens, h, batch, height, width, inner)


def _self_attention(block: BasicTransformerBlock, tokens: Tensor) -> Tensor:
    return block.attn1(block.norm1(tokens)) + tokens


def _gated_attention(fuser: GatedSelfAttentionDense, tokens: Tensor, objects: Tensor) -> Tensor:
    """What GLIGEN's ``GatedSelfAttentionDense`` computes, with ``objects`` projected already."""
    if not fuser.enabled:
        return tokens
    both = fuser.norm1(torch.cat([tokens, objects], dim=1))
    tokens = tokens + fuser.alpha_attn.tanh() * fuser.attn(both)[:, : tokens.shape[1]]
    return tokens + fuser.alpha_dense.tanh() * fuser.ff(fuser.norm2(tokens))


def _cross_attention(attention: Attention, tokens: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What ``AttnProcessor2_0`` computes, with K and V given: softmax(Q K^T / sqrt(d)) V."""
    q, k, v = (
        x.unflatten(2, (attention.heads, -1)).transpose(1, 2)
        for x in (attention.to_q(tokens), k, v)
    )
    out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).to(q.dtype)
    for part in attention.to_out:
        out = part(out)
    return out
