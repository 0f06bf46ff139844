"""Networks with adapters that are not fused, in memory and in files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file
from tiny_lora import NETWORK
from weight_files import STEM, copied

peft = pytest.importorskip("peft", reason="adapters are made with peft")

LINEAR = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"  # of the tiny UNet
UNET = f"unet/{STEM}.safetensors"


def adapt(module: Any, targets: list[str], **options: Any) -> Any:
    """Adds an adapter of noise to a network in memory, which is active; its configuration."""
    options = {"r": 2, "lora_alpha": 2} | options
    config = peft.LoraConfig(target_modules=targets, **options)
    peft.inject_adapter_in_model(config, module)
    generator = torch.Generator().manual_seed(0)
    for name, value in module.named_parameters():
        if "lora_" in name:
            value.data = 0.1 * torch.randn(value.shape, generator=generator)
    module.eval()
    return config


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """The file's tensors as they are after ``change``."""
    content = {name: value.clone() for name, value in load_file(path).items()}
    change(content)
    save_file(content, path)


def state(folder: Path, **changes: Any) -> Path:
    """Writes an ``adapter_config.json`` of rank and alpha 2, with these changes."""
    content = {"peft_type": "LORA", "r": 2, "lora_alpha": 2} | changes
    (folder / "adapter_config.json").write_text(json.dumps(content))
    return folder


def write_unfused(base: Path, directory: Path) -> Path:
    """``base`` with an adapter of the UNet, as diffusers' own ``add_adapter`` has it saved."""
    directory = copied(base, directory)
    unet = UNet2DConditionModel.from_pretrained(directory / "unet")
    unet.add_adapter(peft.LoraConfig(r=2, lora_alpha=2, target_modules=[*NETWORK, "conv1"]))
    generator = torch.Generator().manual_seed(0)
    for name, value in unet.named_parameters():
        if "lora_" in name:
            value.data = 0.1 * torch.randn(value.shape, generator=generator)
    unet.save_pretrained(directory / "unet")
    return directory
