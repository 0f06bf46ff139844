"""What a UNet of diffusers makes of class labels, and what is beside it that says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import Tensor

from dive_fast.core.convention import Convention
from dive_fast.core.numbers import is_whole
from dive_fast.errors import ModelError
from dive_fast.models.base import check_sizes, sample_side
from dive_fast.models.files.checkpoint import read_class_names
from dive_fast.models.pipeline import Pipeline
from dive_fast.models.unet.support import has_cross_attention

_LOOKED_UP = (None, "timestep")  # class_embed_type of labels that are numbers, not vectors

UNet = UNet2DModel | UNet2DConditionModel


def attends(unet: UNet) -> bool:
    """Whether the network has cross-attentions, to attend to its condition."""
    blocks = (*unet.down_blocks, unet.mid_block, *unet.up_blocks)
    conditional = isinstance(unet, UNet2DConditionModel)
    return conditional and any(map(has_cross_attention, blocks))


def class_table(unet: UNet, embeddings: Any, count: int | None, directory: Path) -> Tensor:
    """The conditions of all labels, float32 [C, D], as the network makes them of the labels.

    Args:
        embeddings: the vectors of the classes, where labels are vectors: rows of numbers.
        count: how many classes were named; None where nobody said.

    Raises:
        ModelError: vectors that are missing, superfluous, or do not fit; an unknown number.
    """
    config = unet.config
    looked_up = not attends(unet) and config.class_embed_type in _LOOKED_UP
    if looked_up and embeddings is not None:
        raise ModelError(
            f"dive_fast.json in {directory} states embeddings, but the unet has a table of its own."
        )
    if not looked_up:
        vectors = _vectors(embeddings, unet, directory)
        return vectors if attends(unet) else unet.class_embedding(vectors.to(unet.device))
    n = count if config.num_class_embeds is None else config.num_class_embeds
    if n is None:
        raise ModelError(
            f"expected the names of the classes in {directory}: its unet embeds any number of "
            f"labels (class_embed_type 'timestep'), so classes in dive_fast.json must say how many."
        )
    if not is_whole(n, 1):
        raise ModelError(
            f"expected num_class_embeds of the unet in {directory} above 0, got {n!r}."
        )
    labels = torch.arange(n, device=unet.device)
    if config.class_embed_type == "timestep":
        labels = unet.time_proj(labels)
    return unet.class_embedding(labels)


def check_unet(unet: UNet, convention: Convention, directory: Path) -> None:
    """That the network takes labels or their vectors, and nothing that is not given.

    Raises:
        ModelError: it does not.
    """
    config, where = unet.config, f"the unet in {directory}"
    if attends(unet):
        if unet.class_embedding is not None:
            raise ModelError(
                f"{where} takes a prompt and class labels, of which only one is supported."
            )
        if not isinstance(config.cross_attention_dim, int):
            raise ModelError(
                f"expected one cross_attention_dim of {where}, got {config.cross_attention_dim!r}."
            )
    elif unet.class_embedding is None:
        raise ModelError(
            f"{where} is not conditioned on classes (num_class_embeds and class_embed_type are "
            f"None), so that it cannot tell them apart."
        )
    for key in ("encoder_hid_dim_type", "addition_embed_type", "time_cond_proj_dim"):
        if config.get(key) is not None:
            raise ModelError(f"{where} takes more than classes ({key}), which is not supported.")
    check_sizes(unet, f"unet in {directory}")
    halvings, side = len(unet.down_blocks) - 1, sample_side(unet)
    if side < 1 or side % 2**halvings:
        raise ModelError(
            f"expected a sample_size of {where} that can be halved {halvings} times, got {side}."
        )
    _check_time(config, convention, where)


def _check_time(config: Any, convention: Convention, where: str) -> None:
    """That the network can be told what the convention tells it."""
    kind = config.time_embedding_type
    if kind == "fourier":  # the network divides by sigma, and predicts a score
        raise ModelError(f"{where} is a score network (time_embedding_type 'fourier'), "
                         f"which is not supported.")  # fmt: skip
    if kind != "learned":
        return
    if config.class_embed_type == "timestep":
        raise ModelError(
            f"{where} embeds labels by its table of timesteps, which is not supported."
        )
    if convention.time != "t" or config.num_train_timesteps != len(convention.schedule):
        raise ModelError(
            f"{where} has a table of {config.num_train_timesteps} timesteps, but is told "
            f"{convention.time} of {len(convention.schedule)}."
        )


def _label_width(unet: UNet) -> int:
    """D of the vectors that the network takes for labels; of a sequence the width of a token."""
    config = unet.config
    if attends(unet):
        return config.cross_attention_dim
    if config.class_embed_type == "identity":
        return unet.time_embedding.linear_2.out_features
    return config.projection_class_embeddings_input_dim


def _vectors(embeddings: Any, unet: UNet, directory: Path) -> Tensor:
    width = _label_width(unet)
    where = f"embeddings in dive_fast.json in {directory}"
    if embeddings is None:
        raise ModelError(
            f"the unet takes vectors for classes: expected {where}, rows of {width} numbers, "
            f"found none."
        )
    try:
        table = torch.tensor(embeddings, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ModelError(f"{where} must be rows of {width} numbers: {error}.") from error
    # A sequence may have several tokens.
    tokens = 1 if table.ndim != 2 or not attends(unet) else max(1, table.shape[1] // width)
    if table.ndim != 2 or len(table) == 0 or table.shape[1] != tokens * width:
        raise ModelError(f"expected {where} of [C, {width}], got {list(table.shape)}.")
    if not torch.isfinite(table).all():
        raise ModelError(f"expected finite {where}, got NaN or infinity.")
    return table


def stated_names(pipeline: Pipeline) -> tuple[str, ...] | None:
    """The names that the directory states, by label; None where it states none."""
    stated = pipeline.extra.get("classes")
    if stated is None:
        labels = pipeline.index.get("id2label")
        n = len(labels) if isinstance(labels, dict) else 0
        return read_class_names(pipeline.index, n) if labels else None
    if not isinstance(stated, list) or not all(isinstance(name, str) for name in stated):
        raise ModelError(
            f"expected classes in dive_fast.json in {pipeline.directory} to be a list of names."
        )
    if not stated or len(set(stated)) != len(stated):
        raise ModelError(
            f"expected classes in dive_fast.json in {pipeline.directory} that differ, got {stated}."
        )
    return tuple(stated)
