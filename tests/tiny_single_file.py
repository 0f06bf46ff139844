"""Small Stable Diffusion checkpoints in one file, as the original code writes them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)
from ldm_reference import FIRST, UNET, Sizes, unet_shapes, vae_shapes
from safetensors.torch import save_file
from tiny_sd import make_text_encoder, make_unet, save_pipeline, write_sdxl
from torch import Tensor, nn

SIZES = Sizes(
    channels=8, mult=(1, 2), attention=(1,), resnets=1, depth=1, context=12, latent=4,
    vae_channels=8, vae_mult=(1, 1), vae_resnets=2,
)  # fmt: skip
XL_SIZES = replace(SIZES, attention=(2,), depth=2)


def write_single_file(directory: Path, file: Path, dtype: torch.dtype = torch.float32) -> Path:
    """The weights of a Stable Diffusion 1.x directory under their original names."""
    pipeline = StableDiffusionPipeline.from_pretrained(directory)
    state = original_unet(pipeline.unet, list(unet_shapes(SIZES))) | original_vae(pipeline.vae)
    state |= original_clip(pipeline.text_encoder, "cond_stage_model.transformer")
    return save(state, file, dtype)


def write_xl(directory: Path) -> Path:
    """An SDXL with as many layers in its second encoder as tell one file from another."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(write_sdxl(directory))
    tokenizer = pipeline.tokenizer_2
    encoder = make_text_encoder(tokenizer, projection=16, width=16, layers=11)
    pipeline.register_modules(text_encoder_2=encoder, unet=make_unet(28, added=16))
    return save_pipeline(pipeline, directory)


def write_single_xl(directory: Path, file: Path) -> Path:
    """The weights of such a directory under their original names."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(directory)
    names = [f"label_emb.0.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")]
    state = original_unet(pipeline.unet, [*unet_shapes(XL_SIZES), *names])
    state |= original_vae(pipeline.vae)
    state |= original_clip(pipeline.text_encoder, "conditioner.embedders.0.transformer")
    state |= original_open_clip(pipeline.text_encoder_2, "conditioner.embedders.1.model")
    return save(state, file)


def save(state: dict[str, Tensor], file: Path, dtype: torch.dtype = torch.float32) -> Path:
    state = {key: value.detach().to(dtype).contiguous().clone() for key, value in state.items()}
    # What every such file has beside: a schedule, and averages that are not read.
    state["alphas_cumprod"] = torch.linspace(1, 0, 1000)
    state["model_ema.decay"] = torch.tensor(0.9999)
    save_file(state, file)
    return file


def original_unet(unet: nn.Module, names: list[str]) -> dict[str, Tensor]:
    asked = {f"{UNET}.{name}": torch.tensor([i]) for i, name in enumerate(names)}
    found = convert_ldm_unet_checkpoint(asked, unet.config)
    state = unet.state_dict().items()
    return {f"{UNET}.{names[int(found[key])]}": value for key, value in state}


def original_vae(vae: nn.Module) -> dict[str, Tensor]:
    names = [name for name in vae_shapes(SIZES) if not name.startswith("quantize")]
    asked = {f"{FIRST}.{name}": torch.tensor([i]) for i, name in enumerate(names)}
    found = convert_ldm_vae_checkpoint(asked, vae.config)
    state = {names[int(found[key])]: value for key, value in vae.state_dict().items()}
    # Attention of 1 x 1 convolutions.
    attention = (".q.weight", ".k.weight", ".v.weight", ".proj_out.weight")
    return {
        f"{FIRST}.{name}": value[:, :, None, None]
        if name.endswith(attention) and value.ndim == 2
        else value
        for name, value in state.items()
    }


def original_clip(encoder: nn.Module, prefix: str) -> dict[str, Tensor]:
    return {
        f"{prefix}.text_model.{key.removeprefix('text_model.')}": value
        for key, value in encoder.state_dict().items()
    }


def original_open_clip(encoder: nn.Module, prefix: str) -> dict[str, Tensor]:
    """Query, key and value in one matrix, and the projection the other way round."""
    state = {k.removeprefix("text_model."): v for k, v in encoder.state_dict().items()}
    found = {
        "positional_embedding": state["embeddings.position_embedding.weight"],
        "token_embedding.weight": state["embeddings.token_embedding.weight"],
        "text_projection": state["text_projection.weight"].T,
        "logit_scale": torch.tensor(4.6),
    }
    parts = {
        "layer_norm1": "ln_1",
        "layer_norm2": "ln_2",
        "self_attn.out_proj": "attn.out_proj",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
    }
    for kind in ("weight", "bias"):
        found[f"ln_final.{kind}"] = state[f"final_layer_norm.{kind}"]
        for i in range(encoder.config.num_hidden_layers):
            new, old = f"encoder.layers.{i}", f"transformer.resblocks.{i}"
            heads = [state[f"{new}.self_attn.{name}_proj.{kind}"] for name in "qkv"]
            found[f"{old}.attn.in_proj_{kind}"] = torch.cat(heads)
            for name, original in parts.items():
                found[f"{old}.{original}.{kind}"] = state[f"{new}.{name}.{kind}"]
    return {f"{prefix}.{key}": value for key, value in found.items()}


def write_configurations(directory: Path, to: Path) -> Path:
    """What the hub has beside the weights, and nothing of these."""
    for path in directory.rglob("*"):
        if path.suffix in (".json", ".txt"):
            copy = to / path.relative_to(directory)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    return to
