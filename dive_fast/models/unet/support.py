"""Which ``UNet2DConditionModel`` the stages of ``models.unet`` cover, and the walk over parts."""

from __future__ import annotations

from collections.abc import Iterator

from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_blocks import (
    CrossAttnDownBlock2D,
    CrossAttnUpBlock2D,
    DownBlock2D,
    UNetMidBlock2DCrossAttn,
    UpBlock2D,
)
from torch import nn

from dive_fast.errors import ModelError

_FREEU = ("s1", "s2", "b1", "b2")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def has_cross_attention(block: nn.Module | None) -> bool:
    return getattr(block, "has_cross_attention", False)


def transformers(unet: UNet2DConditionModel, down_only: bool = False) -> Iterator[nn.Module]:
    """The ``Transformer2DModel`` of all blocks or of the down blocks, in call order."""
    blocks = unet.down_blocks
    if not down_only:
        blocks = (*unet.down_blocks, unet.mid_block, *unet.up_blocks)
    for block in filter(has_cross_attention, blocks):
        yield from block.attentions


def transformer_blocks(
    unet: UNet2DConditionModel, down_only: bool = False
) -> Iterator[BasicTransformerBlock]:
    """Their ``BasicTransformerBlock``, each of which holds one cross-attention."""
    for transformer in transformers(unet, down_only):
        yield from transformer.transformer_blocks


def check_supported(unet: nn.Module) -> None:
    """Whether the stages give what the network's own forward gives.

    Raises:
        ModelError: the network, its configuration or something attached to it is none of those that
            the stages cover.
    """
    reason = _configuration(unet) or _modules(unet)
    if reason:
        raise ModelError(
            f"expected a UNet2DConditionModel that can be cut in stages, got {reason}."
        )


def can_be_cut(unet: nn.Module) -> bool:
    """Whether ``check_supported`` lets it pass."""
    return (_configuration(unet) or _modules(unet)) is None


def _configuration(unet: nn.Module) -> str | None:
    """What in the configuration the stages do not cover."""
    if not isinstance(unet, UNet2DConditionModel):
        return f"a {type(unet).__name__}"
    if type(unet).forward is not UNet2DConditionModel.forward:
        return f"the subclass {type(unet).__name__} with a forward of its own"
    if getattr(unet, "_hf_peft_config_loaded", False):
        return "one with LoRA adapters loaded, not fused"
    config = unet.config
    if unet.class_embedding is not None:
        return "one with class embeddings"
    if config.addition_embed_type not in (None, "text_time"):
        return f"one with addition_embed_type {config.addition_embed_type!r}"
    if unet.encoder_hid_proj is not None:
        return "one with an encoder_hid_proj (IP-Adapter or Kandinsky)"
    if config.conv_in_kernel % 2 == 0:
        return f"one with the even conv_in_kernel {config.conv_in_kernel}"
    if not any(type(block) is CrossAttnDownBlock2D for block in unet.down_blocks):
        return "one without cross-attention in its down blocks"
    return None


def _modules(unet: UNet2DConditionModel) -> str | None:
    """What in the modules, or attached to them, the stages do not cover."""
    allowed = (
        *((block, (CrossAttnDownBlock2D, DownBlock2D)) for block in unet.down_blocks),
        *((block, (CrossAttnUpBlock2D, UpBlock2D)) for block in unet.up_blocks),
        (unet.mid_block, (UNetMidBlock2DCrossAttn, type(None))),
    )
    for block, types in allowed:
        if type(block) not in types:
            return f"one with a {type(block).__name__}"
    if any(getattr(block, name, None) for block in unet.up_blocks for name in _FREEU):
        return "one with FreeU enabled"
    for transformer in transformers(unet):
        if type(transformer) is not Transformer2DModel:
            return f"one with a {type(transformer).__name__}"
        for block in transformer.transformer_blocks:
            if reason := _transformer_block(block):
                return reason
    if any(_is_hooked(module) for module in _passed_over(unet)):
        return "one with hooks or a replaced forward on a module that the stages pass over"
    return None


def _transformer_block(block: nn.Module) -> str | None:
    if type(block) is not BasicTransformerBlock:
        return f"one with a {type(block).__name__}"
    if block.only_cross_attention:
        return "one with only_cross_attention"
    if block._chunk_size is not None:
        return "one with a chunked feed-forward"
    for attention in (block.attn1, block.attn2):
        if type(attention.processor) is not AttnProcessor2_0:
            return f"one with the attention processor {type(attention.processor).__name__}"
    return None


def _passed_over(unet: UNet2DConditionModel) -> Iterator[nn.Module]:
    """The modules whose parts the stages call, but not they themselves."""
    yield unet
    yield from filter(has_cross_attention, (*unet.down_blocks, unet.mid_block, *unet.up_blocks))
    yield from transformers(unet)
    for block in transformer_blocks(unet):
        yield block
        yield block.attn2
        if (fuser := getattr(block, "fuser", None)) is not None:
            yield fuser


def _is_hooked(module: nn.Module) -> bool:
    return "forward" in vars(module) or any(getattr(module, name) for name in _HOOKS)
