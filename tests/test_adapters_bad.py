"""Weights with an unfused adapter that cannot be read, and what is told of them."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from command import assert_refused, call
from diffusers import (
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from safetensors.torch import load_file
from tiny_lora import CLASSES, CLIP, NETWORK, calm, load, same
from tiny_sd import write_sd
from transformers import CLIPTextModel
from unfused_adapters import LINEAR, UNET, adapt, rewrite, state, write_unfused
from weight_files import STEM, copied

from dive_fast.errors import ModelError
from dive_fast.models.files.checkpoint import load_component

peft = pytest.importorskip("peft", reason="adapters are made with peft")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return calm(write_sd(tmp_path_factory.mktemp("sd") / "model"), StableDiffusionPipeline)


@pytest.fixture(scope="module")
def unfused(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_unfused(base, tmp_path_factory.mktemp("unfused") / "model")


# -- what cannot be known --------------------------------------------------------------------------


def test_fused_and_unfused_cannot_be_told_apart(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """After ``fuse_lora`` without ``unload_lora_weights`` diffusers writes the same names.

    Were there a mark one day, the sum should not be made: then this test is to fail.
    """
    unet = UNet2DConditionModel.from_pretrained(base / "unet")
    unet.add_adapter(peft.LoraConfig(r=2, lora_alpha=2, target_modules=NETWORK))
    unet.save_pretrained(tmp_path / "before")
    unet.fuse_lora()
    unet.save_pretrained(tmp_path / "after")
    before, after = (load_file(tmp_path / w / f"{STEM}.safetensors") for w in ("before", "after"))
    assert before.keys() == after.keys()
    files = [{p.name for p in (tmp_path / which).iterdir()} for which in ("before", "after")]
    assert files[0] == files[1] == {"config.json", f"{STEM}.safetensors"}
    configs = [json.loads((tmp_path / w / "config.json").read_text()) for w in ("before", "after")]
    assert configs[0] == configs[1]
    with caplog.at_level(logging.WARNING):
        load_component(UNet2DConditionModel, tmp_path / "after", False)
    (record,) = caplog.records
    assert "If it was fused when they were saved" in record.getMessage()


# -- bad files -------------------------------------------------------------------------------------

A, B, BASE = (
    f"{LINEAR}.{part}.weight" for part in ("lora_A.default", "lora_B.default", "base_layer")
)
NAN, INF = torch.full((2, 16), float("nan")), torch.full((16, 2), float("inf"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({B: None}, f"not complete: it lacks {LINEAR}.lora_B."),
        ({A: None}, f"not complete: it lacks {LINEAR}.lora_A."),
        ({A: None, B: None}, f"it lacks {LINEAR}.lora_A and {LINEAR}.lora_B."),
        ({BASE: None}, f"it lacks {LINEAR}.base_layer.weight."),
        ({f"{LINEAR}.weight": torch.zeros(16, 16)}, f"{LINEAR}.weight beside {BASE}: expected one"),
        (
            {A.replace("default", "other"): torch.zeros(2, 16)},
            "expected one, got 'default', 'other'",
        ),
        ({f"{LINEAR}.lora_magnitude_vector.default.weight": torch.zeros(16)}, "a kind that is not"),
        (
            {f"{LINEAR}.lora_embedding_A.default": torch.zeros(2, 16)},
            "a kind that is not supported",
        ),
        (
            {f"{LINEAR}.lora_B.default.bias": torch.zeros(16)},
            r"not supported .*lora_B.default.bias",
        ),
        ({f"{LINEAR}.base_layer.scales": torch.zeros(16)}, r"not supported .*base_layer.scales"),
        ({f"{LINEAR}.lora_A.weight": torch.zeros(2, 16)}, r"not supported .*lora_A.weight"),
        ({A: torch.zeros(3, 16)}, r"does not fit: .*\[3, 16\] and .*\[16, 2\] beside .*\[16, 16\]"),
        ({A: torch.zeros(2, 8)}, r"does not fit: .*lora_A.default.weight of \[2, 8\]"),
        ({A: torch.zeros(32)}, r"does not fit: .*lora_A.default.weight of \[32\]"),
        ({A: torch.zeros(0, 16), B: torch.zeros(16, 0)}, r"does not fit: .*of \[0, 16\]"),
        ({B: torch.zeros(16, 2, 1, 1)}, r"does not fit: .*of \[16, 2, 1, 1\]"),
        ({BASE: torch.zeros(16)}, r"does not fit: .*beside a weight of \[16\]"),
        ({A: NAN}, "are not finite: .*lora_A.default.weight holds NaN or inf"),
        ({B: INF}, "are not finite: .*lora_B.default.weight holds NaN or inf"),
        ({BASE: NAN[:1].expand(16, 16)}, f"are not finite: {LINEAR}.weight holds NaN or inf"),
        (
            {A: torch.zeros(2, 16, dtype=torch.int32)},
            "expected weights of .*, got .*lora_A.* of I32",
        ),
        ({BASE: torch.zeros(16, 16, dtype=torch.int8)}, "expected weights of .*, got .* of I8"),
        ({BASE: torch.zeros(16, 8), A: torch.zeros(2, 8)}, r"size mismatch for .*\[16, 8\], expec"),
    ],
    ids=lambda value: None if isinstance(value, str) else next(iter(value)).split("to_q.")[1],
)
def test_bad_weights(changes: dict, message: str, unfused: Path, tmp_path: Path) -> None:
    folder = copied(unfused / "unet", tmp_path / "unet")

    def change(w: dict[str, torch.Tensor]) -> None:
        for name, value in changes.items():
            w.pop(name, None)
            if value is not None:
                w[name] = value.clone()

    rewrite(folder / f"{STEM}.safetensors", change)
    with pytest.raises(ModelError, match=message):
        load_component(UNet2DConditionModel, folder, False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 4}, "states the rank 4 for .*, but its lora_A in the weights has 2"),
        ({"rank_pattern": {"to_k": 3}}, "states the rank 3 for .*to_k"),
        ({"r": None}, "r in .*adapter_config.json must be "),
        ({"r": "2"}, "r in .*adapter_config.json must be .*, got '2'"),
        ({"lora_alpha": None}, "lora_alpha in .*adapter_config.json must be"),
        ({"lora_alpha": "8"}, "lora_alpha in .* must be .*, got '8'"),
        ({"lora_alpha": float("nan")}, "lora_alpha in .* must be a finite number"),
        ({"alpha_pattern": {"to_k": "high"}}, "to_k in alpha_pattern in .* must be"),
        ({"alpha_pattern": [3]}, "alpha_pattern in .* must be a JSON object"),
        ({"rank_pattern": {"(": 3}}, r"rank_pattern in .* must name layers by regular .* '\('"),
        ({"rank_pattern": {"x(?i)": 3}}, r"rank_pattern in .* must name layers by regular"),
        ({"use_rslora": "yes"}, "use_rslora in .* must be"),
        ({"use_dora": True}, "states use_dora, which is not supported"),
        ({"peft_type": "IA3"}, "expected the peft_type LORA in .*, got 'IA3'"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value),
)
def test_bad_configurations(changes: dict, message: str, unfused: Path, tmp_path: Path) -> None:
    folder = state(copied(unfused / "unet", tmp_path / "unet"), **changes)
    with pytest.raises(ModelError, match=message):
        load_component(UNet2DConditionModel, folder, False)


def test_dora_is_refused(base: Path, tmp_path: Path) -> None:
    folder = copied(base / "unet", tmp_path / "unet")
    unet = UNet2DConditionModel.from_pretrained(folder)
    adapt(unet, NETWORK, use_dora=True)
    unet.save_pretrained(folder)
    with pytest.raises(ModelError, match=r"not supported \(.*\.lora_magnitude_vector\.default"):
        load_component(UNet2DConditionModel, folder, False)


def test_no_memory_is_taken_for_what_does_not_fit(
    unfused: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither values are read nor a network made: the headers say that a layer is missing."""
    folder = copied(unfused / "unet", tmp_path / "unet")
    rewrite(folder / f"{STEM}.safetensors", lambda w: w.pop("conv_in.weight"))
    monkeypatch.delattr("dive_fast.models.files.tensors.SafeTensors.fill")
    monkeypatch.delattr("dive_fast.models.files.checkpoint.Library.materialise")
    with pytest.raises(ModelError, match="1 missing keys, the first is conv_in.weight"):
        load_component(UNet2DConditionModel, folder, False)


def test_an_adapter_in_place_of_a_text_encoder(base: Path, tmp_path: Path) -> None:
    """All that transformers saves of an encoder with ``add_adapter``."""
    directory = copied(base, tmp_path / "model")
    encoder = CLIPTextModel.from_pretrained(directory / "text_encoder")
    encoder.add_adapter(peft.LoraConfig(target_modules=CLIP))
    shutil.rmtree(directory / "text_encoder")
    encoder.save_pretrained(directory / "text_encoder")
    with pytest.raises(
        ModelError, match=r"holds a LoRA adapter alone \(adapter_model.safetensors\)"
    ):
        load(directory)


def test_a_configuration_beside_weights_without_an_adapter(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = copied(base, tmp_path / "model")
    state(directory / "unet")
    with caplog.at_level(logging.WARNING):
        assert same(load(directory), load(base))
    (record,) = caplog.records
    assert "'unet/adapter_config.json'" in record.getMessage()
    assert "not applied" in record.getMessage()


def test_the_command_line(
    unfused: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (16, 16), (200, 30, 30)).save(tmp_path / "photo.png")
    options = ["classify", tmp_path / "photo.png", "--classes", ",".join(CLASSES), "--model"]
    said = call(capsys, *options, unfused)
    assert said.code == 0 and said.err.count("hold a LoRA adapter (") == 1
    assert "dive-fast: the weights in" in said.err
    directory = copied(unfused, tmp_path / "model")
    state(directory / "unet")
    again = call(capsys, *options, directory)
    assert again.code == 0 and "adapter" not in again.err
    state(directory / "unet", r=3)
    assert_refused(call(capsys, *options, directory), "states the rank 3 for")
    (directory / "unet" / "adapter_config.json").unlink()
    rewrite(directory / UNET, lambda w: w.pop("conv_in.weight"))
    assert_refused(call(capsys, *options, directory), "1 missing keys")  # and no warning before it
    rewrite(directory / UNET, lambda w: w.pop(A))
    assert_refused(call(capsys, *options, directory), f"it lacks {LINEAR}.lora_A")
