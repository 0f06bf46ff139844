"""``accelerate``: a diffusion network with its own call signature that does less work.

A loop that the user keeps as it is calls the network with rows (x_t, t, condition). In a UNet the
part before the first cross-attention depends on (x_t, t) alone and the keys and values of the
cross-attentions on the condition alone, so both are kept and found again by content, also from
call to call. See ``models.unet`` for the cut and ``content_store`` for the store.
"""

from __future__ import annotations

import torch
from torch import nn

from dive_fast.accelerator.base import Accelerated, Statistics
from dive_fast.accelerator.dit import AcceleratedDiT
from dive_fast.accelerator.unet import AcceleratedUNet
from dive_fast.core.numbers import is_whole
from dive_fast.errors import DiveFastError, ModelError
from dive_fast.models.dit import shared_embedder as dit_embedder
from dive_fast.models.unet import stages

AUTOCAST_DTYPES = (torch.bfloat16, torch.float16)

__all__ = ["Accelerated", "Statistics", "accelerate"]


def accelerate(
    network: nn.Module,
    *,
    cache_bytes: int = 2 * 2**30,
    dtype: torch.dtype | None = None,
    channels_last: bool = False,
    compile: bool = False,
) -> Accelerated:
    """A network that is called like ``network`` and gives the same, with less work.

    For a diffusers ``UNet2DConditionModel`` the prefix of an (x_t, t) and the keys and values of a
    condition are reused within a call and across calls: the results are those of the network up to
    the rounding of another batch composition. Calls that cannot be split (masks, ControlNet
    residuals, a gradient of the sample or of the weights, ...) go to the network unchanged. For a
    ``DiTTransformer2DModel`` the embedder is evaluated once instead of once per block. For other
    networks only the options below change anything.

    Args:
        network: a diffusion network; it is held, not copied.
        cache_bytes: bytes that may be kept from call to call, on the network's device; 0 shares
            within a call only.
        dtype: run under autocast in ``torch.bfloat16`` or ``torch.float16``; results come back in
            the dtype of the sample.
        channels_last: keep the weights of the convolutions (in place) and the sample in
            channels-last order.
        compile: run what is computed through ``torch.compile``.

    Returns:
        A ``torch.nn.Module`` with the network's own call signature, whose other attributes
        (``config``, ``dtype``, ``device``, ...) are the network's.

    Raises:
        ModelError: ``network`` is no module, or already accelerated.
        DiveFastError: an option is out of range.
    """
    if not isinstance(network, nn.Module):
        raise ModelError(f"expected a torch.nn.Module to accelerate, got {network!r}.")
    if isinstance(network, Accelerated):
        raise ModelError("expected the network itself, got one that is already accelerated.")
    if not is_whole(cache_bytes, 0):
        raise DiveFastError(f"expected cache_bytes of 0 or more, got {cache_bytes!r}.")
    if dtype is not None and dtype not in AUTOCAST_DTYPES:
        raise DiveFastError(
            f"expected dtype torch.bfloat16, torch.float16 or None for autocast, got {dtype!r}."
        )
    kind = Accelerated
    if isinstance(network, stages.UNet2DConditionModel):
        kind = AcceleratedUNet
    elif isinstance(network, dit_embedder.DiTTransformer2DModel):
        kind = AcceleratedDiT
    return kind(network, cache_bytes, dtype, bool(channels_last), bool(compile))
