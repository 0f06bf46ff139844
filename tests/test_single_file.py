"""Checkpoints in one file: the model is that of the directory with the same weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from command import assert_refused, call
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_sd import write_sd, write_to_hub
from tiny_single_file import write_configurations, write_single_file, write_single_xl, write_xl

from dive_fast import DiffusionClassifier
from dive_fast.errors import ModelError
from dive_fast.models import load_model

CLASSES = ["cat", "dog"]
HUB_ID = "stable-diffusion-v1-5/stable-diffusion-v1-5"  # where diffusers has the configuration from


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sd(tmp_path_factory.mktemp("sd") / "model")


@pytest.fixture(scope="module")
def single(sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_single_file(sd, tmp_path_factory.mktemp("single") / "sd.safetensors")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of what is converted; of the hub an empty one, and no network."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "cache" / "dive_fast" / "single_file"


@pytest.fixture
def hub(sd: Path, tmp_path: Path) -> Path:
    """The configuration of SD 1.5 has been fetched before."""
    return write_to_hub(tmp_path / "hub", HUB_ID, lambda to: write_configurations(sd, to))


def load(source: Path):
    return load_model(source, device="cpu", classes=CLASSES)


def test_it_is_the_model_of_the_directory(sd: Path, single: Path, hub: Path, cache: Path) -> None:
    model = load(single)
    assert model.identity() == load(sd).identity() and model.name == str(single)
    (directory,) = cache.iterdir()
    written = {path: path.stat().st_mtime_ns for path in directory.rglob("*")}
    assert load(single).identity() == model.identity()  # not converted again
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*/*")} == written


def test_sdxl(tmp_path: Path) -> None:
    """Also what OpenCLIP has in another form."""
    directory = write_xl(tmp_path / "model")
    file = write_single_xl(directory, tmp_path / "sdxl.safetensors")
    hub_id = "stabilityai/stable-diffusion-xl-base-1.0"
    write_to_hub(tmp_path / "hub", hub_id, lambda to: write_configurations(directory, to))
    assert load(file).identity() == load(directory).identity()
    stored = load_file(file)
    stored.pop("conditioner.embedders.1.model.transformer.resblocks.3.attn.in_proj_bias")
    save_file(stored, file)
    with pytest.raises(ModelError, match="is not whole: it lacks "):
        load(file)


def test_half_precision(sd: Path, hub: Path, tmp_path: Path) -> None:
    model = load(write_single_file(sd, tmp_path / "half.safetensors", torch.float16))
    expected = load(sd).network.state_dict()
    for name, value in model.network.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, expected[name].half().float()), name


def test_another_file_of_the_same_name(sd: Path, single: Path, hub: Path, tmp_path: Path) -> None:
    file = tmp_path / "sd.safetensors"
    file.write_bytes(single.read_bytes())
    before = load(file).identity()
    write_single_file(write_sd(tmp_path / "other", seed=1), file)
    assert load(file).identity()["weights"] != before["weights"]


def test_fitted_values_are_not_written_into_the_cache(single: Path, hub: Path) -> None:
    clf = DiffusionClassifier.from_pretrained(single, classes=CLASSES, device="cpu")
    with pytest.raises(ModelError, match="no model directory of yours to write to"):
        clf.save_fitted()


def test_without_the_hub(single: Path, cache: Path) -> None:
    message = "cannot be converted to a StableDiffusionPipeline, .* configuration is fetched from"
    with pytest.raises(ModelError, match=message) as caught:
        load(single)
    assert "\n" not in str(caught.value)
    assert not list(cache.iterdir())


def drop(key: str) -> Callable[[dict], None]:
    return lambda stored: stored.pop(key)


def add(key: str) -> Callable[[dict], None]:
    return lambda stored: stored.update({key: torch.full((2,), 7.5)})


def lora(stored: dict) -> None:
    stored.clear()
    stored["unet.a.lora.up.weight"] = torch.ones(2)


UNET, TEXT = "model.diffusion_model", "cond_stage_model.transformer.text_model"
DAMAGES = {
    "no unet": (drop(f"{UNET}.input_blocks.0.0.weight"), "it has no model.diffusion_model.input"),
    "no vae": (drop("first_stage_model.encoder.conv_in.weight"), "it has no first_stage_model"),
    "a weight less": (
        drop(f"{UNET}.input_blocks.1.0.emb_layers.1.bias"),
        "is not whole: it lacks |cannot be conv",
    ),
    "text": (drop(f"{TEXT}.final_layer_norm.bias"), "is not whole: it lacks "),
    "more": (add(f"{UNET}.label_emb.0.0.weight"), "holds more than a StableDiffusionPipeline"),
    "another schedule": (add("ztsnr"), "it has the schedule of 'ztsnr'"),
    "lora": (lora, "it holds LoRA weights, which are given as lora=, --lora"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_damaged(single: Path, hub: Path, tmp_path: Path, cache: Path, damage, message) -> None:
    stored = load_file(single)
    damage(stored)
    file = tmp_path / "sd.safetensors"
    save_file(stored, file)
    with pytest.raises(ModelError, match=message) as caught:
        load(file)
    assert "\n" not in str(caught.value)
    assert not cache.exists() or not list(cache.iterdir())


def test_cut_off_and_of_other_kinds(single: Path, tmp_path: Path) -> None:
    file = tmp_path / "sd.safetensors"
    file.write_bytes(single.read_bytes()[:-10])
    with pytest.raises(ModelError, match="sd.safetensors is truncated or damaged"):
        load(file)
    (tmp_path / "sd.ckpt").write_bytes(b"")
    with pytest.raises(ModelError, match="expected a model directory.* got the file .*sd.ckpt"):
        load(tmp_path / "sd.ckpt")


def test_a_cache_that_cannot_be_written(single: Path, hub: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the directory belongs")
    with pytest.raises(ModelError, match="cannot be converted into the cache: "):
        load(single)


def test_the_command_line(single: Path, hub: Path, tmp_path: Path, capsys) -> None:
    image = tmp_path / "photo.png"
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(image)
    asked = ("classify", image, "--model", single, "--classes", "cat,dog", "--probes", 2)
    said = call(capsys, *asked)
    assert said.code == 0 and not said.err, said
    hub.rename(hub.with_name("gone"))
    assert call(capsys, *asked).code == 0  # the hub is not asked again
    single_elsewhere = tmp_path / "copy.safetensors"
    single_elsewhere.write_bytes(single.read_bytes())
    again = ("classify", image, "--model", single_elsewhere, "--classes", "cat,dog")
    assert_refused(call(capsys, *again), "fetched from the hub")
