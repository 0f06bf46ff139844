"""The untrained network of a layout-to-image model: transformer and layout encoder together."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dive_fast.core.layouts import LayoutFormat
from dive_fast.models.layout_to_image.encoder import LayoutEncoder
from dive_fast.models.layout_to_image.raster import drawn_tokens
from dive_fast.models.layout_to_image.transformer import build_layout_transformer, denoise
from dive_fast.training.layout_losses import LayoutTrainingConfig
from dive_fast.training.layout_rivals import Contrast

TOKEN_STD = 0.5


class Trained(nn.Module):
    """A transformer and its layout encoder, as they are trained: x_t, t and tokens to the noise.

    A token of -1 is a class that is not known.
    """

    def __init__(
        self,
        transformer: nn.Module,
        encoder: LayoutEncoder,
        layout: LayoutFormat,
        config: LayoutTrainingConfig,
    ) -> None:
        super().__init__()
        self.transformer, self.encoder = transformer, encoder
        self.layout, self.drawn = layout, config.raster
        self.contrast = Contrast() if config.contrast > 0 else None

    def forward(self, x_t: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        if self.drawn:
            channels = drawn_tokens(self.layout, tokens, x_t.shape[-1])
            x_t = torch.cat([x_t, channels], dim=1)
        return denoise(self.transformer, x_t, t, self.encoder(self._embedded(tokens)))

    def _embedded(self, tokens: Tensor) -> Tensor:
        """Embeddings [B, S, D]; of a class that is not known the mean of all."""
        table = self.encoder.token_embedding.weight
        mean = table[slice(*self.layout.class_range)].mean(dim=0)
        return torch.where((tokens < 0)[..., None], mean, table[tokens.clamp_min(0)])


def build(layout: LayoutFormat, config: LayoutTrainingConfig) -> Trained:
    """The untrained model of a configuration."""
    transformer, encoder = build_layout_transformer(
        layout,
        sample_size=config.sample_size,
        in_channels=config.in_channels,
        patch_size=config.patch_size,
        channels=config.channels,
        layers=config.layers,
        heads=config.heads,
        width=config.width,
        encoder_layers=config.encoder_layers,
        encoder_heads=config.encoder_heads,
        raster=config.raster,
    )
    start_tokens(encoder, layout)
    return Trained(transformer, encoder, layout, config)


def start_tokens(encoder: LayoutEncoder, layout: LayoutFormat) -> None:
    """Corners that are near each other start with embeddings that are near each other.

    The first half of the width holds sines and cosines of x, the second half those of y. All tokens
    are of one size, large enough that the first steps do not wipe out where they began.
    """
    width = encoder.config.width
    # From one period over the whole image to one over two steps of the grid.
    n = width // 4
    frequencies = math.pi * (layout.grid / 2) ** (torch.arange(n) / max(1, n - 1))
    angles = torch.linspace(0, 1, layout.grid)[:, None] * frequencies
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)  # [G, width / 2]
    corners = torch.cat(
        [waves[None].expand(layout.grid, -1, -1), waves[:, None].expand(-1, layout.grid, -1)], dim=2
    )
    start, stop = layout.coordinate_range
    with torch.no_grad():
        table = encoder.token_embedding.weight.normal_(std=TOKEN_STD)
        table[start:stop, : 4 * n] = corners.flatten(0, 1) * (TOKEN_STD * math.sqrt(2))
        encoder.position_embedding.weight.normal_(std=TOKEN_STD)
