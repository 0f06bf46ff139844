"""Adapters that lie beside a model, or among its weights in another form: told of, not applied."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from weight_files import STEM, copied

from dive_fast import ModelError
from dive_fast.models import load_model

CLASSES = ["cat", "dog"]


def equal(a, b) -> bool:
    """Whether two models have the same weights."""
    return a.identity() == b.identity()


def weights_of(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "transformer" / f"{STEM}.safetensors")


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("pytorch_lora_weights.safetensors", "LoRA weights"),
        ("transformer/pytorch_lora_weights.bin", "LoRA weights"),
        ("transformer/adapter_config.json", "LoRA weights"),
        ("transformer/adapter_model.safetensors", "LoRA weights"),
        ("learned_embeds.safetensors", "textual inversion"),
        ("learned_embeds-steps-500.bin", "textual inversion"),
    ],
)
def test_adapters_beside_a_model_are_told_of(name, what, dit_dir, tmp_path, caplog):
    directory = copied(dit_dir, tmp_path / "model")
    (directory / name).write_bytes(b"{}")
    with caplog.at_level(logging.WARNING, "dive_fast"):
        model = load_model(directory)
    (record,) = caplog.records
    message = record.getMessage()
    assert name in message and what in message and "not applied" in message
    assert equal(model, load_model(dit_dir))


def test_nothing_is_told_of_a_model_alone(dit_dir, sd, caplog):
    load_model(dit_dir)
    load_model(sd, classes=CLASSES)
    assert not caplog.records


def test_an_adapter_of_another_kind_within_the_weights(dit_dir, tmp_path):
    """As peft saves a network with IA3 or trained copies of layers; LoRA is in test_adapters."""
    for i, key in enumerate(("to_q.ia3_l.default", "to_q_lora.down.weight", "norm.lora_A")):
        directory = copied(dit_dir, tmp_path / f"model{i}")
        weights = weights_of(directory) | {f"transformer_blocks.0.attn1.{key}": torch.zeros(2)}
        save_file(weights, directory / "transformer" / f"{STEM}.safetensors")
        if key == "norm.lora_A":  # no name of peft's
            message = "1 unexpected keys, the first is transformer_blocks.0.attn1.norm.lora_A"
        else:
            message = "do not fit .* 1 unexpected keys, .*: they hold an unfused adapter of a kind"
        with pytest.raises(ModelError, match=message):
            load_model(directory)
