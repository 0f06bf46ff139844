"""A small DiT of diffusers' own class with random weights, scaled so that the class matters."""

from __future__ import annotations

import torch
from diffusers import DiTTransformer2DModel

from dive_fast.core.schedule import Schedule, make_betas
from dive_fast.models.dit.model import DiT

N_CLASSES, CHANNELS, SIZE = 5, 2, 4


def make_transformer(
    seed: int = 0,
    *,
    learned_sigma: bool = True,
    tied: bool = True,
    n_classes: int = N_CLASSES,
    channels: int = CHANNELS,
    size: int = SIZE,
    layers: int = 2,
    kind: type[DiTTransformer2DModel] = DiTTransformer2DModel,
) -> DiTTransformer2DModel:
    """Blocks of width 16; with ``tied`` the blocks' embedders hold equal copies."""
    torch.manual_seed(seed)
    model = kind(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=channels,
        out_channels=channels * (2 if learned_sigma else 1),
        num_layers=layers,
        sample_size=size,
        patch_size=2,
        num_embeds_ada_norm=n_classes,
    )
    first, *others = model.transformer_blocks
    with torch.no_grad():
        for block in model.transformer_blocks:
            block.norm1.emb.class_embedder.embedding_table.weight.normal_(std=0.05)
            # A narrow table and a strong response: small steps change the class, and it matters.
            block.norm1.linear.weight.normal_(std=3.0)
    if tied:
        for block in others:
            block.norm1.emb.load_state_dict(first.norm1.emb.state_dict())
    return model.eval().requires_grad_(False)


def make_dit(*, target: str = "epsilon", tied: bool = True, **options) -> DiT:
    schedule = Schedule.from_betas(make_betas("linear", 1000), target)
    transformer = make_transformer(tied=tied, **options)
    return DiT(transformer, None, schedule, tuple("abcde"), tied=tied)
