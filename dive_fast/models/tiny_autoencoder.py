"""TAEF2, a tiny autoencoder of FLUX.2's latents, for which diffusers has no class.

    z = encoder((x + 1) / 2),    x = 2 decoder(3 tanh(z / 3)) - 1

Both are residual blocks of three convolutions. At the resolution of the latents a side branch
comes before them, by whose norm, over all places, every place hears of the whole picture:

    h = x + W2 relu(GroupNorm(W1 x))       at the resolution of the latents; h = x elsewhere
    block(x) = relu(h + conv relu conv relu conv h)

Weights are called as in the file that its author publishes for diffusers (``taef2.safetensors``).
"""

from __future__ import annotations

from itertools import pairwise

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTinyOutput
from diffusers.models.autoencoders.vae import DecoderOutput
from torch import Tensor, nn

POOL_GROUPS = 4  # of the side branch's norm
POOL_WIDTH = 4  # its channels, as a multiple of the block's


class AutoencoderTAEF2(ModelMixin, ConfigMixin):
    """Pictures to latents and back; called as diffusers' ``AutoencoderTiny`` is.

    Args:
        in_channels: of the pictures.
        latent_channels: of the latents.
        block_out_channels: of each resolution, from the pictures' to the latents'. From one to the
            next the sides are halved.
        layers_per_block: blocks of each resolution; the decoder has as many.
        scaling_factor: of what learns the latents, x0 = scaling_factor z; not applied here.

    Raises:
        ValueError: not as many ``block_out_channels`` as ``layers_per_block``, or none.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        latent_channels: int = 32,
        block_out_channels: tuple[int, ...] = (64, 64, 64, 64),
        layers_per_block: tuple[int, ...] = (1, 3, 3, 3),
        scaling_factor: float = 1.0,
    ) -> None:
        super().__init__()
        if not len(block_out_channels) == len(layers_per_block) > 0:
            raise ValueError(
                f"expected as many block_out_channels as layers_per_block, and one or more, got "
                f"{len(block_out_channels)} and {len(layers_per_block)}"
            )
        stages = list(zip(block_out_channels, layers_per_block, strict=True))
        self.encoder = _Layers(_encoder_layers(in_channels, latent_channels, stages))
        self.decoder = _Layers(_decoder_layers(in_channels, latent_channels, stages[::-1]))

    def encode(self, x: Tensor) -> AutoencoderTinyOutput:
        """``latents`` [B, C, h, w] of pictures [B, channels, H, W] in [-1, 1]."""
        return AutoencoderTinyOutput(latents=self.encoder(x.add(1).div(2)))

    def decode(self, z: Tensor) -> DecoderOutput:
        """``sample``, pictures [B, channels, H, W], about in [-1, 1], of latents [B, C, h, w]."""
        return DecoderOutput(sample=self.decoder(z.div(3).tanh().mul(3)).mul(2).sub(1))


class _Layers(nn.Module):
    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        # A third faster on CPUs; what comes out is in the usual order.
        return self.layers(x.contiguous(memory_format=torch.channels_last)).contiguous()


class _Block(nn.Module):
    def __init__(self, width: int, pooled: bool) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            _conv(width, width),
            nn.ReLU(inplace=True),
            _conv(width, width),
            nn.ReLU(inplace=True),
            _conv(width, width),
        )
        self.pool = _pool(width) if pooled else None

    def forward(self, x: Tensor) -> Tensor:
        h = x if self.pool is None else x + self.pool(x)
        return self.conv(h).add_(h).relu_()


def _pool(width: int) -> nn.Sequential:
    inner = POOL_WIDTH * width
    return nn.Sequential(
        nn.Conv2d(width, inner, 1, bias=False),
        nn.GroupNorm(POOL_GROUPS, inner),
        nn.ReLU(inplace=True),
        nn.Conv2d(inner, width, 1, bias=False),
    )


def _conv(inner: int, outer: int, **more: int | bool) -> nn.Conv2d:
    return nn.Conv2d(inner, outer, 3, padding=1, **more)


def _encoder_layers(channels: int, latents: int, stages: list[tuple[int, int]]) -> list[nn.Module]:
    layers: list[nn.Module] = [_conv(channels, stages[0][0])]
    layers += _blocks(*stages[0], pooled=len(stages) == 1)
    for i, ((before, _), (width, count)) in enumerate(pairwise(stages), start=2):
        layers.append(_conv(before, width, stride=2, bias=False))
        layers += _blocks(width, count, pooled=i == len(stages))
    return [*layers, _conv(stages[-1][0], latents)]


def _decoder_layers(channels: int, latents: int, stages: list[tuple[int, int]]) -> list[nn.Module]:
    layers: list[nn.Module] = [_conv(latents, stages[0][0]), nn.ReLU(inplace=True)]
    layers += _blocks(*stages[0], pooled=True)
    for (before, _), (width, count) in pairwise(stages):
        layers += [nn.Upsample(scale_factor=2), _conv(before, width, bias=False)]
        layers += _blocks(width, count, pooled=False)
    return [*layers, _conv(stages[-1][0], channels)]


def _blocks(width: int, count: int, pooled: bool) -> list[nn.Module]:
    return [_Block(width, pooled) for _ in range(count)]
