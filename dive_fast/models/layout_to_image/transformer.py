"""The transformer of the family "layout-to-image": the tokens of the layout in its sequence.

diffusers' ``SD3Transformer2DModel`` (MM-DiT, arXiv 2403.03206): the patches of x_t and the tokens
of the layout attend to each other and to themselves, each with weights of their own, modulated by
t. Of SD3 it takes the network alone: x_t is noised by a diffusion schedule, and the pooled prompt,
which a layout does not have, is zero.
"""

from __future__ import annotations

import torch
from diffusers import ModelMixin, SD3Transformer2DModel
from torch import nn

from dive_fast.core.layouts import LayoutFormat
from dive_fast.errors import ModelError
from dive_fast.models.base import check_sizes
from dive_fast.models.layout_to_image.base import LayoutModel, build_encoder
from dive_fast.models.layout_to_image.encoder import LayoutEncoder
from dive_fast.models.layout_to_image.raster import LayoutRaster, n_channels


class LayoutTransformerModel(LayoutModel):
    """A transformer with the layout in its sequence; see ``LayoutModel`` for the arguments.

    The layout meets x_t in the first block, so nothing of a forward is worth keeping: the network
    runs whole. One that takes more channels than it gives is shown the layout drawn (``raster``).
    """

    folder = "transformer"

    def __init__(self, denoiser: ModelMixin, encoder: LayoutEncoder, *args, **named) -> None:
        super().__init__(denoiser, encoder, *args, **named)
        self.raster: LayoutRaster | None = None
        if denoiser.config.in_channels > self.latent_shape[0]:
            self.raster = LayoutRaster(self.layout_format, self.vocabulary.table)
            self.raster.to(self.device)

    def to(self, device: torch.device, dtype: torch.dtype) -> LayoutTransformerModel:
        """As all models; the drawing stays in float32."""
        if self.raster is not None:
            self.raster.to(device)
        return super().to(device, dtype)

    def predict(self, x_t: torch.Tensor, t: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """See ``models.protocol.Model.predict``; condition is [M, S D]."""
        x = x_t.to(self.dtype)
        if self.raster is not None:
            channels = self.raster(self.slots(condition), x.shape[-1])
            x = torch.cat([x, channels.to(self.dtype)], dim=1)
        return denoise(self.network, x, t, self.encode_layout(condition))

    def _channels(self, denoiser: ModelMixin) -> int:
        given, taken = denoiser.config.out_channels, denoiser.config.in_channels
        return given if taken == given + n_channels(self.layout_format) else taken

    def _check(self, denoiser: ModelMixin, encoder: LayoutEncoder) -> None:
        width = encoder.config.width
        if denoiser.config.joint_attention_dim != width:
            raise ModelError(
                f"the transformer takes embeddings of {denoiser.config.joint_attention_dim}, but "
                f"its layout encoder gives {width}."
            )
        check_sizes(denoiser, "denoiser", self._channels(denoiser))


def denoise(
    transformer: SD3Transformer2DModel, x_t: torch.Tensor, t: torch.Tensor, hidden: torch.Tensor
) -> torch.Tensor:
    """The prediction for x_t [M, C, h, w] at t [M] with an encoded layout [M, S, D]."""
    pooled = hidden.new_zeros(len(hidden), transformer.config.pooled_projection_dim)
    return transformer(
        x_t,
        encoder_hidden_states=hidden,
        pooled_projections=pooled,
        timestep=t.to(x_t.device),
        return_dict=False,
    )[0]


def build_layout_transformer(
    layout: LayoutFormat,
    *,
    sample_size: int,
    in_channels: int,
    patch_size: int,
    channels: int,
    layers: int,
    heads: int,
    width: int,
    encoder_layers: int,
    encoder_heads: int,
    raster: bool = False,
) -> tuple[SD3Transformer2DModel, LayoutEncoder]:
    """A transformer and a layout encoder with random weights, to be trained.

    The forward of a training step is
    ``denoise(transformer, x_t, t, encoder(encoder.token_embedding(tokens)))``.

    Args:
        layout: what the tokens mean.
        sample_size, in_channels: of the latents, or of the images where there is no VAE.
        patch_size: sides of the patches.
        channels: of every token in the transformer.
        layers, heads: of the transformer.
        width: D, of the layout encoder.
        encoder_layers, encoder_heads: of the layout encoder.
        raster: whether x_t comes with the layout drawn (``raster``).

    Raises:
        ModelError: sizes that do not fit together.
    """
    if sample_size % patch_size:
        raise ModelError(f"expected a sample_size that {patch_size} divides, got {sample_size}.")
    # diffusers places patches by sines and cosines of both axes.
    if channels % (4 * heads):
        raise ModelError(f"expected channels that 4 and {heads} heads divide, got {channels}.")
    encoder = build_encoder(layout, width, encoder_layers, encoder_heads)
    transformer = SD3Transformer2DModel(
        sample_size=sample_size,
        patch_size=patch_size,
        in_channels=in_channels + (n_channels(layout) if raster else 0),
        out_channels=in_channels,
        num_layers=layers,
        attention_head_dim=channels // heads,
        num_attention_heads=heads,
        joint_attention_dim=width,
        caption_projection_dim=channels,
        pooled_projection_dim=1,
        pos_embed_max_size=sample_size // patch_size,
        qk_norm="rms_norm",
    )
    _start_as_identity(transformer)
    return transformer, encoder


def _start_as_identity(transformer: SD3Transformer2DModel) -> None:
    """adaLN-Zero (DiT, arXiv 2212.09748): every block starts as the identity, the output as 0."""
    linears = [transformer.norm_out.linear, transformer.proj_out]
    for block in transformer.transformer_blocks:
        linears += [block.norm1.linear, block.norm1_context.linear]
    for linear in linears:
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
