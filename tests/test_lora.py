"""LoRA weights fused into a model: the network predicts what the pipeline's predicts with them."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import assert_refused, call
from diffusers import FluxPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image
from pipelines import intercept
from safetensors.torch import load_file, save_file
from tiny_lora import ALPHA, CLASSES, RANK, calm, load, same, weights, write_flux, write_lora
from tiny_sd import write_sd, write_sdxl, write_to_hub

from dive_fast import DiffusionClassifier
from dive_fast.errors import ModelError

pytest.importorskip("peft", reason="LoRA weights need peft")

PROMPTS = ["a photo of a cat.", "a photo of a dog."]
LATENTS = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sd(tmp_path_factory.mktemp("sd") / "model")


@pytest.fixture(scope="module")
def lora(sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the network and the text encoder of ``sd``."""
    pipeline = StableDiffusionPipeline.from_pretrained(sd)
    return write_lora(pipeline, tmp_path_factory.mktemp("lora"), "unet", "text_encoder")


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_flux(tmp_path_factory.mktemp("flux") / "model")


# -- the truth -------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, -0.4])
@pytest.mark.parametrize(
    ("write", "kind", "parts"),
    [
        (write_sd, StableDiffusionPipeline, ("unet", "text_encoder")),
        (write_sdxl, StableDiffusionXLPipeline, ("unet", "text_encoder", "text_encoder_2")),
    ],
    ids=["sd", "sdxl"],
)
def test_the_network_predicts_what_the_pipelines_predicts(
    write: Callable, kind: Any, parts: tuple[str, ...], scale: float, tmp_path: Path
) -> None:
    directory = calm(write(tmp_path / "model"), kind)
    file = write_lora(kind.from_pretrained(directory), tmp_path / "lora", *parts)
    pipeline = kind.from_pretrained(directory)
    pipeline.load_lora_weights(file)
    pipeline.set_adapters("default_0", scale)  # not fused: layers beside the layers
    asked = intercept(
        pipeline, pipeline.unet, prompt=PROMPTS, latents=LATENTS, num_inference_steps=4,
        guidance_scale=1.0, height=16, width=16,
    )  # fmt: skip
    model, base = load(directory, file, scale), load(directory)
    for each in asked:
        x_t, t = each.given["sample"], each.given["timestep"].long().expand(2)
        found = model.predict(x_t, t, model.vocabulary.table)
        torch.testing.assert_close(found, each.output, rtol=1e-5, atol=1e-5)
        assert (found - base.predict(x_t, t, base.vocabulary.table)).abs().max() > 1e-3
    assert not same(model, base)
    assert (model.vocabulary.table - base.vocabulary.table).abs().max() > 1e-3  # the text's, too


@pytest.mark.parametrize("scale", [0.4])
def test_flux_and_its_text_encoder(flux: Path, tmp_path: Path, scale: float) -> None:
    """``FluxPipeline.fuse_lora`` leaves the text encoder out, if nobody names it."""
    pipeline = FluxPipeline.from_pretrained(flux)
    file = write_lora(pipeline, tmp_path, "transformer", "text_encoder")
    pipeline = FluxPipeline.from_pretrained(flux)
    pipeline.load_lora_weights(file)
    pipeline.set_adapters("default_0", scale)
    packed = torch.nn.functional.pixel_unshuffle(LATENTS, 2).flatten(2).transpose(1, 2)
    (asked,) = intercept(
        pipeline, pipeline.transformer, prompt=PROMPTS, latents=packed, num_inference_steps=1,
        height=16, width=16,
    )  # fmt: skip
    model = load(flux, file, scale)
    found = model.predict(LATENTS, torch.full((2,), 999), model.vocabulary.table)
    expected = asked.output.transpose(1, 2).unflatten(2, (4, 4))
    expected = torch.nn.functional.pixel_shuffle(expected, 2)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (model.vocabulary.table - load(flux).vocabulary.table).abs().max() > 1e-3


def test_weights_are_those_of_the_formula(sd: Path, lora: Path) -> None:
    """W + scale alpha / r B A."""
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    stored = load_file(lora)
    down, up = (stored[f"unet.{layer}.lora.{half}.weight"] for half in ("down", "up"))
    base = load(sd).network.state_dict()[f"{layer}.weight"]
    found = load(sd, lora, 0.7).network.state_dict()[f"{layer}.weight"]
    torch.testing.assert_close(found, base + 0.7 * ALPHA / RANK * up @ down)


def test_a_scale_of_zero_is_the_model_itself(sd: Path, lora: Path) -> None:
    assert same(load(sd, lora, 0), load(sd))


def test_the_identity_tells_them_apart(sd: Path, lora: Path) -> None:
    base, half, whole = load(sd), load(sd, lora, 0.5), load(sd, lora)
    identities = [model.identity() for model in (base, half, whole)]
    assert len({found["weights"] for found in identities}) == 3
    assert [found.get("lora_scale") for found in identities] == [None, 0.5, 1.0]
    assert identities[1]["lora"] == lora.name and "lora" not in identities[0]
    assert load(sd, lora.parent, 0.5).identity() == identities[1]


def test_no_layer_of_peft_is_left(sd: Path, lora: Path) -> None:
    model, base = load(sd, lora), load(sd)
    assert list(weights(model)) == list(weights(base))
    assert type(model) is type(base)  # also where it can be cut
    for module in (model.network, *model.text.modules()):
        assert not module.training and not any(p.requires_grad for p in module.parameters())
        assert all(p.dtype == torch.float32 for p in module.parameters())


def test_half_precision_and_pickles(sd: Path, lora: Path, tmp_path: Path) -> None:
    """Files in float16 and pickled ones without alpha hold the same differences."""
    stored = {key: value.half().float() for key, value in load_file(lora).items()}
    torch.save(stored, tmp_path / "pytorch_lora_weights.bin")
    save_file({k: v.half() for k, v in stored.items()}, tmp_path / "half.safetensors")
    half = load(sd, tmp_path / "half.safetensors")
    assert same(half, load(sd, tmp_path / "pytorch_lora_weights.bin", allow_pickle=True))
    assert not same(half, load(sd))
    with pytest.raises(ModelError, match="pickled LoRA weights, which are refused unless asked"):
        load(sd, tmp_path / "pytorch_lora_weights.bin")


def test_the_format_of_kohya(sd: Path, lora: Path, tmp_path: Path) -> None:
    """With an alpha for each layer; a difference is alpha / rank times up times down."""
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    down, up = torch.randn(RANK, 8), torch.randn(8, RANK)
    name = f"lora_unet_{layer.replace('.', '_')}"
    save_file(
        {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up,
         f"{name}.alpha": torch.tensor(1.0)}, tmp_path / "kohya.safetensors"
    )  # fmt: skip
    found = load(sd, tmp_path / "kohya.safetensors", 2.0).network.state_dict()
    base = load(sd).network.state_dict()
    changed = [key for key in base if not torch.equal(base[key], found[key])]
    assert changed == [f"{layer}.weight"]
    expected = base[changed[0]] + 2.0 / RANK * up @ down
    torch.testing.assert_close(found[changed[0]], expected)


def test_the_directory_of_peft(sd: Path, tmp_path: Path) -> None:
    """Its names say no part, and alpha stands in ``adapter_config.json``."""
    from peft import LoraConfig, get_peft_model

    unet = StableDiffusionPipeline.from_pretrained(sd).unet
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["to_q", "proj_in"])
    adapted = get_peft_model(unet, config)
    for name, value in adapted.named_parameters():
        if "lora_" in name:
            value.data.copy_(0.1 * torch.randn(value.shape))
    adapted.save_pretrained(tmp_path)
    expected = adapted.merge_and_unload().state_dict()
    found, base = load(sd, tmp_path).network.state_dict(), load(sd).network.state_dict()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
    changed = {name.rsplit(".", 2)[1] for name in base if not torch.equal(base[name], found[name])}
    assert changed == {"to_q", "proj_in"}


# -- where it lies ---------------------------------------------------------------------------------


def test_the_file_of_a_directory(sd: Path, lora: Path, tmp_path: Path) -> None:
    """The only one, or the one of diffusers' name; a folder beside does not count."""
    expected = load(sd, lora)
    shutil.copy(lora, tmp_path / "mine.safetensors")
    (tmp_path / "checkpoint-500").mkdir()
    assert same(load(sd, str(tmp_path)), expected)
    shutil.copy(lora, tmp_path)
    (tmp_path / "mine.safetensors").write_bytes(b"")
    assert same(load(sd, str(tmp_path)), expected)


def test_of_the_hub(sd: Path, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its id, or by a file of it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def write(folder: Path) -> Path:
        (folder / "more").mkdir(parents=True)
        shutil.copy(lora, folder)
        shutil.copy(lora, folder / "more" / "one.safetensors")
        return folder

    write_to_hub(tmp_path, "someone/lora", write)
    expected = load(sd, lora)
    for name in ("someone/lora", "someone/lora/more/one.safetensors"):
        model = load(sd, name)
        assert same(model, expected) and model.identity()["lora"] == name
    for name in ("someone/other", "someone/lora/none.safetensors"):
        with pytest.raises(ModelError, match=f"LoRA {name[:8]}.* not be fetched from the hub"):
            load(sd, name)


def test_beside_the_model(sd: Path, lora: Path, tmp_path: Path, caplog: Any) -> None:
    """Told of while nobody asks for it, and how to ask."""
    directory = tmp_path / "model"
    shutil.copytree(sd, directory)
    shutil.copy(lora, directory)
    with caplog.at_level(logging.WARNING, "dive_fast"):
        base = load(directory)
    (said,) = [record.getMessage() for record in caplog.records]
    assert re.search(r"not applied unless asked for \(lora='FILE', --lora FILE", said)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "dive_fast"):
        model = load(directory, directory)
    assert not caplog.records
    assert same(model, load(sd, lora)) and same(base, load(sd))


# -- what was fitted -------------------------------------------------------------------------------


def test_fitted_values_are_the_models_without(sd: Path, lora: Path, tmp_path, caplog) -> None:
    directory = tmp_path / "model"
    shutil.copytree(sd, directory)
    (directory / "dive_fast.json").write_text('{"beta": 7.0}')
    options = {"classes": CLASSES, "device": "cpu"}
    assert load(directory).inverse_temperature == 7.0
    with caplog.at_level(logging.WARNING, "dive_fast"):
        clf = DiffusionClassifier.from_pretrained(directory, lora=lora, **options)
    assert "is not taken with a LoRA" in caplog.text
    assert clf.model.inverse_temperature == 4 * 8 * 8 / 2
    with pytest.raises(ModelError, match="no model directory of yours to write to"):
        clf.save_fitted()
    clf.load_fitted(directory)
    assert clf.model.inverse_temperature == 7.0


# -- the command line ------------------------------------------------------------------------------


def test_the_command_line(sd: Path, lora: Path, tmp_path: Path, capsys: Any) -> None:
    image = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)).save(image)
    asked = ("classify", image, "--model", sd, "--classes", "cat,dog", "--probes", 4)
    said = call(capsys, *asked, "--lora", lora, "--lora-scale", 0.5, "--json")
    assert said.code == 0, said
    clf = DiffusionClassifier.from_pretrained(sd, classes=CLASSES, lora=lora, lora_scale=0.5)
    expected = clf(image, probes=4)[0]
    (answer,) = json.loads(said.out)
    torch.testing.assert_close(torch.tensor(answer["losses"]), expected.losses)
    (base,) = json.loads(call(capsys, *asked, "--json").out)
    assert answer["losses"] != base["losses"]
    for option in (("--lora", "none.safetensors"), ("--lora-scale", 0.5)):
        assert_refused(call(capsys, *asked, *option), "LoRA weights|lora_scale")
    assert call(capsys, *asked, "--lora", lora, "--lora-scale", "much").code == 2
    scenes = ("evaluate", "--data", "scenes", "--out", tmp_path / "run", "--lora", lora)
    assert_refused(call(capsys, *scenes), "--lora is for classifiers")
