"""Which model directories are GLIGENs, and whether their network is one that is supported."""

from __future__ import annotations

from pathlib import Path

from diffusers import UNet2DConditionModel

from dive_fast.errors import ModelError
from dive_fast.models.files.checkpoint import read_json
from dive_fast.models.text.towers import PromptEncoder


def is_gligen(directory: Path) -> bool:
    """Whether the UNet of a model directory is grounded; published indices do not always say so.

    Raises:
        ModelError: its configuration cannot be read.
    """
    path = directory / "unet" / "config.json"
    return path.exists() and str(read_json(path).get("attention_type")).startswith("gated")


def check_grounding(unet: UNet2DConditionModel, text: PromptEncoder, where: str | Path) -> None:
    """That the network is grounded on boxes with phrases of this text encoder.

    Raises:
        ModelError: it is not.
    """
    kind, network = unet.config.attention_type, getattr(unet, "position_net", None)
    if kind == "gated-text-image":
        raise ModelError(
            f"the unet in {where} also takes a picture of every object (attention_type {kind!r}), "
            f"expected one that takes phrases alone ('gated')."
        )
    if kind != "gated" or network is None:
        raise ModelError(
            f"expected a unet with a position_net (attention_type 'gated') in {where}, "
            f"got attention_type {kind!r}."
        )
    if network.positive_len != text.shape[1]:
        raise ModelError(
            f"the position_net in {where} takes phrases of {network.positive_len} values, but its "
            f"text encoder gives {text.shape[1]}."
        )
    channels, out = unet.config.in_channels, unet.config.out_channels
    if channels == 2 * out + 1:
        raise ModelError(
            f"the unet in {where} paints into pictures ({channels} channels), expected one that "
            f"makes whole ones ({out} channels)."
        )
