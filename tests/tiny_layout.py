"""Small layout-to-image models of the real classes, random weights."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, DDPMScheduler, VQModel

from dive_fast.core.layouts import Layout, LayoutFormat
from dive_fast.models.layout_to_image.transformer import (
    LayoutTransformerModel,
    build_layout_transformer,
)
from dive_fast.models.layout_to_image.unet import LayoutToImageModel, build_layout_model
from dive_fast.training.scenes import SCENES_FORMAT

FORMAT = LayoutFormat.compact(("one", "two", "three"), max_objects=2, grid=5, crop=True)


def layouts() -> list[Layout]:
    """Of none, one and two objects."""
    boxes = torch.tensor([[0.0, 0.25, 0.5, 1.0], [0.5, 0.0, 1.0, 0.5]])
    ids = torch.tensor([2, 0])
    return [Layout(boxes[:n], ids[:n]) for n in range(3)]


def make_vae(kind: str):
    """RGB 8 x 8 to latents of 2 channels, 4 x 4."""
    options = dict(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=2,
        norm_num_groups=4,
        sample_size=8,
    )
    if kind == "kl":
        return AutoencoderKL(**options, scaling_factor=0.7, shift_factor=0.1).eval()
    return VQModel(**options, num_vq_embeddings=7, scaling_factor=0.5).eval()


def make_layout_model(
    *, vae: str | None = None, space_to_depth: int = 1, form: LayoutFormat = FORMAT, seed: int = 0
) -> LayoutToImageModel:
    """Two levels; without a VAE of 3 x 8 x 8 images."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet, encoder = build_layout_model(
            form,
            sample_size=8 if vae is None else 4,
            in_channels=3 if vae is None else 2,
            channels=(8, 16),
            width=12,
            encoder_layers=2,
            heads=2,
            layers_per_block=1,
            transformer_depth=2,
            head_channels=4,
            norm_groups=4,
            space_to_depth=space_to_depth,
        )
        autoencoder = None if vae is None else make_vae(vae)
        with torch.no_grad():
            # As after training: the layout matters.
            encoder.token_embedding.weight.mul_(50)
            for name, parameter in unet.named_parameters():
                if "attn2" in name and parameter.ndim == 2:
                    parameter.mul_(4)
    for module in (unet, encoder):
        module.eval().requires_grad_(False)
    return LayoutToImageModel(
        unet, encoder, DDPMScheduler(), autoencoder, space_to_depth=space_to_depth
    )


def make_scenes_model() -> LayoutToImageModel:
    """For the scenes' images and layouts."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet, encoder = build_layout_model(
            SCENES_FORMAT,
            sample_size=32,
            in_channels=1,
            channels=(8, 8),
            width=8,
            encoder_layers=1,
            heads=2,
            layers_per_block=1,
            head_channels=4,
            norm_groups=4,
            space_to_depth=4,
        )
    for module in (unet, encoder):
        module.eval().requires_grad_(False)
    return LayoutToImageModel(unet, encoder, DDPMScheduler(), space_to_depth=4)


def make_layout_transformer(
    *, vae: str | None = None, form: LayoutFormat = FORMAT, seed: int = 0
) -> LayoutTransformerModel:
    """Two layers; without a VAE of 3 x 8 x 8 images."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer, encoder = build_layout_transformer(
            form,
            sample_size=8 if vae is None else 4,
            in_channels=3 if vae is None else 2,
            patch_size=2,
            channels=16,
            layers=2,
            heads=2,
            width=12,
            encoder_layers=1,
            encoder_heads=2,
        )
        autoencoder = None if vae is None else make_vae(vae)
        with torch.no_grad():
            # As after training: no longer the identity, and the layout matters.
            encoder.token_embedding.weight.mul_(50)
            for parameter in transformer.parameters():
                if not parameter.any():
                    parameter.normal_(std=0.2)
    for module in (transformer, encoder):
        module.eval().requires_grad_(False)
    return LayoutTransformerModel(transformer, encoder, DDPMScheduler(), autoencoder)
