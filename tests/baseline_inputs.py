"""A small DiT for the tests of the published loops, and a short inversion of it."""

from __future__ import annotations

import torch
from diffusers import DDPMScheduler, DiTTransformer2DModel

from bench.baselines.dive import invert

N_CLASSES, WIDTH, CHANNELS, SIZE = 5, 16, 2, 4
ALPHA_BAR = DDPMScheduler(beta_schedule="linear").alphas_cumprod
X0 = torch.randn(1, CHANNELS, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
NOISES = torch.randn(60, CHANNELS, SIZE, SIZE, generator=torch.Generator().manual_seed(42))
# The same rows in another batch: fp32 sums of a two-layer model in another order.
CLOSE = {"rtol": 1e-4, "atol": 1e-6}


def make_transformer(seed: int = 0, out_channels: int = 2 * CHANNELS) -> DiTTransformer2DModel:
    torch.manual_seed(seed)
    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=WIDTH // 2,
        in_channels=CHANNELS,
        out_channels=out_channels,
        num_layers=2,
        sample_size=SIZE,
        patch_size=2,
        num_embeds_ada_norm=N_CLASSES,
    )
    table = torch.randn(N_CLASSES + 1, WIDTH) * 0.5
    with torch.no_grad():
        for block in model.transformer_blocks:
            block.norm1.emb.class_embedder.embedding_table.weight.copy_(table)
            # Large enough that the class, which enters here, moves the loss.
            block.norm1.linear.weight.normal_(std=0.5)
    return model.eval()


def label_table(transformer: DiTTransformer2DModel) -> torch.Tensor:
    return transformer.transformer_blocks[0].norm1.emb.class_embedder.embedding_table.weight.data


def small_invert(transformer, x0, noises, **settings):
    return invert(transformer, x0, ALPHA_BAR, noises, **{"t_interval": 40, **settings})
