"""Reading latent-diffusion checkpoints, and the configurations that the shapes of weights tell."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from dive_fast.errors import ModelError
from dive_fast.models.layout_to_image.convert_pickle import (
    ZIP_START,
    CheckpointError,
    kind_of,
    read_state_dict,
    state_dict_of,
)

UNET = "model.diffusion_model."
ENCODER = "cond_stage_model.transformer."
FIRST_STAGE = "first_stage_model."
EMA = "model_ema.diffusion_model"
# Of x-transformers and of latent diffusion's group norms; checkpoints do not hold them.
ENCODER_HEAD_DIM = 64
NORM_GROUPS = 32


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The state dict of a checkpoint file; no code that it may hold is run.

    Logs which objects beside the weights were skipped.

    Raises:
        ModelError: the file is missing, cannot be read, or holds no state dict.
    """
    if not path.is_file():
        raise ModelError(f"expected a checkpoint file at {path}, found none.")
    try:
        state = _read(path)
    except CheckpointError as error:
        raise ModelError(f"{path} cannot be read as a checkpoint: {error}") from error
    except Exception as error:  # safetensors, pickle, zip and torch each raise their own kinds
        raise ModelError(f"{path} cannot be read as a checkpoint: {_plain(error)}") from error
    if not isinstance(state, Mapping):
        raise ModelError(f"expected a state dict in {path}, got {kind_of(state)}.")
    tensors = {k: v for k, v in state.items() if isinstance(k, str) and isinstance(v, Tensor)}
    if not tensors:
        raise ModelError(f"expected a state dict in {path}, got {len(state)} entries, no tensors.")
    return tensors


def _read(path: Path) -> Any:
    """Of a file in torch's old format torch reads as much as it takes for safe."""
    if path.suffix == ".safetensors":
        return load_file(path)
    with path.open("rb") as file:
        start = file.read(len(ZIP_START))
    if start == ZIP_START:
        return read_state_dict(path)
    return state_dict_of(torch.load(path, map_location="cpu", weights_only=True))


def _plain(error: Exception) -> str:
    """torch.load's advice on pickles names functions, not what is wrong with the file."""
    refused = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
    if refused:
        return f"it holds the object {refused[1]}, and only weights are read."
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}."
    # Whatever else torch.load says ends in the advice to load without that safety.
    return "expected a state dict as torch.save or safetensors writes it, got something else."


def unet_config(part: Mapping[str, Tensor], latent_size: int, head_channels: int) -> dict[str, Any]:
    """The arguments of ``UNet2DConditionModel`` for the openai UNet of a state dict.

    Raises:
        ModelError: another architecture.
    """
    stem = _weight(part, UNET, "input_blocks.0.0.weight")
    out = _weight(part, UNET, "out.2.weight")
    levels, depths, context = _levels(part)
    channels = [level[0][0] for level in levels]
    if len({len(level) for level in levels}) > 1 or any(len(set(level)) > 1 for level in levels):
        raise ModelError(
            f"expected levels of equal resnets in {UNET}*, each with attention or without, got "
            f"(channels, attention) {levels}."
        )
    if len(depths) != 1 or len(context) != 1:
        raise ModelError(
            f"expected transformers of one depth that attend to one context in {UNET}*, got depths "
            f"{sorted(depths)} and widths {sorted(context)}."
        )
    if wrong := [c for c in channels if c % head_channels or c % NORM_GROUPS]:
        raise ModelError(
            f"expected channels that heads of {head_channels} and {NORM_GROUPS} groups divide in "
            f"{UNET}*, got {wrong[0]}."
        )
    attention = [level[0][1] for level in levels]
    linear = any(k.endswith("proj_in.weight") and v.dim() == 2 for k, v in part.items())
    return {
        "sample_size": latent_size,
        "in_channels": stem.shape[1],
        "out_channels": out.shape[0],
        "block_out_channels": channels,
        "layers_per_block": len(levels[0]),
        "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attention],
        "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in attention[::-1]],
        "transformer_layers_per_block": depths.pop(),
        # diffusers takes the number of heads under this name.
        "attention_head_dim": [c // head_channels for c in channels],
        "cross_attention_dim": context.pop(),
        "use_linear_projection": linear,
        "norm_num_groups": NORM_GROUPS,
    }


def _levels(part: Mapping[str, Tensor]) -> tuple[list[list[tuple[int, bool]]], set[int], set[int]]:
    """(channels, attention) of each level's resnets on the way down; depths; context widths."""
    levels: list[list[tuple[int, bool]]] = [[]]
    for i in range(1, _count(part, "input_blocks")):
        if f"input_blocks.{i}.0.op.weight" in part:
            levels.append([])
            continue
        resnet = _weight(part, UNET, f"input_blocks.{i}.0.in_layers.2.weight")
        levels[-1].append((resnet.shape[0], f"input_blocks.{i}.1.norm.weight" in part))
    if not all(levels):
        raise ModelError(f"expected resnets in every level of {UNET}*, got {levels}.")
    found = [re.match(r"(.*\.)transformer_blocks\.(\d+)\.", key) for key in part]
    places = {match[1] for match in found if match}
    depths = {_count(part, f"{place}transformer_blocks") for place in places}
    context = {w.shape[1] for k, w in part.items() if k.endswith("attn2.to_k.weight")}
    return levels, depths, context


def encoder_config(part: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments of ``LayoutEncoder``, but the layout, for an x-transformers encoder.

    Raises:
        ModelError: another architecture.
    """
    vocabulary_size, width = _weight(part, ENCODER, "token_emb.weight").shape
    slots = len(_weight(part, ENCODER, "pos_emb.emb.weight"))
    inner = len(_weight(part, ENCODER, "attn_layers.layers.0.1.to_q.weight"))
    layers = _count(part, "attn_layers.layers")
    if layers % 2 or inner % ENCODER_HEAD_DIM:
        raise ModelError(
            f"expected pairs of layers and heads of {ENCODER_HEAD_DIM} channels in {ENCODER}*, "
            f"got {layers} layers and {inner} channels."
        )
    return {
        "vocabulary_size": vocabulary_size,
        "n_slots": slots,
        "width": width,
        "layers": layers // 2,
        "heads": inner // ENCODER_HEAD_DIM,
        "head_dim": ENCODER_HEAD_DIM,
    }


def vae_config(part: Mapping[str, Tensor], scale: float, latent_size: int) -> dict[str, Any]:
    """The arguments of ``VQModel`` for the first stage of a state dict.

    Raises:
        ModelError: another architecture.
    """
    entries, embed = _weight(part, FIRST_STAGE, "quantize.embedding.weight").shape
    levels = _count(part, "encoder.down")
    channels = [
        len(_weight(part, FIRST_STAGE, f"encoder.down.{i}.block.0.conv1.weight"))
        for i in range(levels)
    ]
    if any(re.match(r"(en|de)coder\.(down|up)\.\d+\.attn\.", key) for key in part):
        raise ModelError(f"expected {FIRST_STAGE}* with attention in the middle alone, got more.")
    return {
        "in_channels": _weight(part, FIRST_STAGE, "encoder.conv_in.weight").shape[1],
        "out_channels": len(_weight(part, FIRST_STAGE, "decoder.conv_out.weight")),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": channels,
        "layers_per_block": _count(part, "encoder.down.0.block"),
        "latent_channels": len(_weight(part, FIRST_STAGE, "encoder.conv_out.weight")),
        "sample_size": latent_size * 2 ** (levels - 1),
        "num_vq_embeddings": entries,
        "vq_embed_dim": embed,
        "norm_num_groups": NORM_GROUPS,
        "scaling_factor": scale,
        "mid_block_add_attention": "encoder.mid.attn_1.q.weight" in part,
    }


def _weight(part: Mapping[str, Tensor], prefix: str, name: str) -> Tensor:
    if name not in part:
        raise ModelError(
            f"expected a latent-diffusion layout-to-image model with {prefix}{name}, got another "
            f"architecture ({prefix}{next(iter(part))})."
        )
    return part[name]


def _count(part: Mapping[str, Tensor], place: str) -> int:
    """How many numbered modules there are at a place."""
    pattern = re.compile(re.escape(place) + r"\.(\d+)\.")
    return len({match[1] for match in map(pattern.match, part) if match})
