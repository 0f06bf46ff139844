"""LoRA weights that cannot be used: one sentence each."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from pipelines import change_json
from safetensors.torch import load_file, save_file
from tiny_lora import CLASSES, load, write_flux, write_lora
from tiny_sd import make_unet, write_sd

from dive_fast.errors import ModelError
from dive_fast.models import load_model

pytest.importorskip("peft", reason="LoRA weights need peft")


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sd(tmp_path_factory.mktemp("sd") / "model")


@pytest.fixture(scope="module")
def lora(sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the network and the text encoder of ``sd``."""
    pipeline = StableDiffusionPipeline.from_pretrained(sd)
    return write_lora(pipeline, tmp_path_factory.mktemp("lora"), "unet", "text_encoder")


def changed(lora: Path, folder: Path, change: Callable[[dict], object]) -> Path:
    """The same file with other tensors."""
    stored = load_file(lora)
    change(stored)
    path = folder / "changed.safetensors"
    save_file({key: value.contiguous() for key, value in stored.items()}, path)
    return path


def key_of(stored: dict, pattern: str) -> str:
    return next(key for key in sorted(stored) if re.search(pattern, key))


def rename(stored: dict) -> None:
    for key in [key for key in stored if "attn2.to_k" in key]:
        stored[key.replace("attn2.to_k", "attn7.to_k")] = stored.pop(key)


def rename_all(stored: dict) -> None:
    for key in list(stored):
        stored[key.replace("attn", "other").replace("q_proj", "z_proj")] = stored.pop(key)


def rename_part(stored: dict) -> None:
    for key in [key for key in stored if key.startswith("unet")]:
        stored[key.replace("unet.", "transformer.")] = stored.pop(key)


def widen(stored: dict) -> None:
    key = key_of(stored, r"unet.*(down|lora_A)")
    stored[key] = torch.cat([stored[key]] * 2, dim=1)


DAMAGED = {
    "an unknown layer": (rename, r"no place for \d+ of its \d+ weights: .*attn7.to_k"),
    "no known layer": (rename_all, "cannot be applied to this StableDiffusionPipeline: "),
    "another part": (
        rename_part,
        r"expected weights of unet and text_encoder, got \d+ of others, the first is transformer\.",
    ),
    "another width": (widen, "cannot be applied to this StableDiffusionPipeline: size mismatch"),
    "half a layer": (
        lambda stored: stored.pop(key_of(stored, r"unet.*attn1.to_q.*(down|lora_A)")),
        "is not complete: it lacks unet.*attn1.to_q",
    ),
    "nan": (
        lambda stored: stored[key_of(stored, "unet")].fill_(float("nan")),
        "is not finite: unet.* holds NaN or inf",
    ),
    "a third text encoder": (
        lambda stored: stored.update({"text_encoder_3.q.lora_A.weight": torch.ones(2, 2)}),
        "got 1 of others, the first is text_encoder_3.q",
    ),
    "dora": (
        lambda stored: stored.update({"unet.a.dora_scale": torch.ones(2)}),
        "is a DoRA",
    ),
}


@pytest.mark.parametrize(("change", "message"), DAMAGED.values(), ids=DAMAGED)
def test_another_models(sd: Path, lora: Path, tmp_path: Path, change, message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        load(sd, changed(lora, tmp_path, change))
    assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)


def test_of_another_base(sd: Path, lora: Path, tmp_path: Path) -> None:
    """SD's into FLUX, and that of a wider network of the same kind."""
    with pytest.raises(ModelError, match="expected weights of transformer and text_encoder, got"):
        load(write_flux(tmp_path / "flux"), lora)
    wider = StableDiffusionPipeline.from_pretrained(sd)
    wider.register_modules(unet=make_unet(12, block_out_channels=(16, 32)))
    with pytest.raises(ModelError, match="pytorch_lora_weights.* size mismatch for "):
        load(sd, write_lora(wider, tmp_path, "unet"))


def test_that_of_a_control(tmp_path: Path) -> None:
    """FLUX.1 Canny's LoRA makes the network take the latents of a control image beside its own."""
    flux, file = write_flux(tmp_path / "flux"), tmp_path / "lora.safetensors"
    layer = "transformer.x_embedder"
    halves = {"lora_A": torch.ones(2, 32), "lora_B": torch.ones(32, 2)}
    save_file({f"{layer}.{half}.weight": value for half, value in halves.items()}, file)
    with pytest.raises(ModelError, match="changes the shape of the transformer, .* x_embedder"):
        load(flux, file)


def write_text(folder: Path, lora: Path) -> Path:
    path = folder / "lora.safetensors"
    path.write_text("this is no file of weights")
    return path


def write_cut(folder: Path, lora: Path) -> Path:
    path = folder / "lora.safetensors"
    path.write_bytes(lora.read_bytes()[:-100])
    return path


def write_several(folder: Path, lora: Path) -> Path:
    for name in ("a.safetensors", "b.safetensors"):
        shutil.copy(lora, folder / name)
    return folder


def write_other(folder: Path, lora: Path) -> Path:
    path = folder / "lora.safetensors"
    save_file({"unet.conv_in.weight": torch.ones(2)}, path)
    return path


def write_pickle(folder: Path, lora: Path) -> Path:
    torch.save(load_file(lora), folder / "pytorch_lora_weights.bin")
    return folder


def write_suffix(folder: Path, lora: Path) -> Path:
    return shutil.copy(lora, folder / "lora.txt")


FILES = {
    "text": (write_text, "lora.safetensors is truncated or damaged"),
    "cut": (write_cut, "lora.safetensors is truncated or damaged"),
    "several": (write_several, "expected one file .* got 'a.safetensors', 'b.safetensors': name"),
    "empty directory": (
        lambda folder, _: folder,
        r"expected LoRA weights \(.*\) in .* none",
    ),
    "no lora": (write_other, "expected LoRA weights .* first of its 1 keys is unet.conv_in.weight"),
    "pickle": (
        write_pickle,
        r"pickled LoRA weights only \(pytorch_lora_weights.bin\), which",
    ),
    "suffix": (write_suffix, "expected LoRA weights in a .safetensors file, got .*lora.txt"),
    "missing": (lambda folder, _: folder / "x.safetensors", "a file or directory that exists"),
    "empty name": (lambda *_: "", "as a file, a directory or a hub id, got ''"),
    "zero byte": (lambda *_: "a\0b", "cannot be a file|that exists"),
    "a number": (lambda *_: 3, "as a file, a directory or a hub id, got 3"),
}


@pytest.mark.parametrize(("write", "message"), FILES.values(), ids=FILES)
def test_files_that_are_none(sd: Path, lora: Path, tmp_path: Path, write, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load(sd, write(tmp_path, lora))


def test_a_damaged_pickle(sd: Path, tmp_path: Path) -> None:
    (tmp_path / "lora.bin").write_bytes(b"PK\3\4 no more")
    with pytest.raises(ModelError, match="lora.bin is truncated or damaged"):
        load(sd, tmp_path, allow_pickle=True)


@pytest.mark.parametrize("scale", ["1", None, True, float("nan"), float("inf"), [1.0]])
def test_scales_that_are_none(sd: Path, lora: Path, scale: object) -> None:
    with pytest.raises(ModelError, match="lora_scale must be a number, got"):
        load(sd, lora, scale)


def test_a_scale_beyond_float32(sd: Path, lora: Path) -> None:
    with pytest.raises(ModelError, match="makes weights that are not finite: .* of the unet"):
        load(sd, lora, 1e300)


def test_a_scale_alone(sd: Path) -> None:
    with pytest.raises(ModelError, match="lora_scale is of a lora, got 0.5 without one"):
        load_model(sd, classes=CLASSES, lora_scale=0.5)


def test_without_peft(sd: Path, lora: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModelError, match=r"need peft, .* pip install 'dive_fast\[lora\]'"):
        load(sd, lora)


def test_models_that_cannot_take_one(sd: Path, lora: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="digits cannot take a LoRA: expected a text-to-image"):
        load_model("digits", lora=lora)
    directory = tmp_path / "gligen"
    shutil.copytree(sd, directory)
    change_json(directory / "unet" / "config.json", attention_type="gated")
    with pytest.raises(ModelError, match="gligen cannot take a LoRA: expected a text-to-image"):
        load(directory, lora)
