"""Weights saved with an unfused LoRA adapter: the model predicts what the one in memory does."""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DiTTransformer2DModel,
    FluxPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from pipelines import intercept
from safetensors.torch import load_file
from tiny_lora import CLIP, NETWORK, calm, load, same, weights, write_flux, write_lora
from tiny_sd import write_sd, write_to_hub
from unfused_adapters import LINEAR, UNET, adapt, rewrite, state, write_unfused
from weight_files import STEM, copied, shard

from dive_fast.models import load_model
from dive_fast.models.files.checkpoint import load_component

peft = pytest.importorskip("peft", reason="adapters are made with peft")

PROMPTS = ["a photo of a cat.", "a photo of a dog."]
LATENTS = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return calm(write_sd(tmp_path_factory.mktemp("sd") / "model"), StableDiffusionPipeline)


@pytest.fixture(scope="module")
def unfused(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_unfused(base, tmp_path_factory.mktemp("unfused") / "model")


# -- the truth -------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [True, False], ids=["adapter_config.json", "alone"])
def test_stable_diffusion_with_adapters_of_both_parts(
    config: bool, base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Linear layers, convolutions of 1 x 1 and 3 x 3, with and without bias, and CLIP's."""
    options = {"r": 2, "lora_alpha": 5 if config else 2}
    directory = copied(base, tmp_path / "model")
    pipeline = StableDiffusionPipeline.from_pretrained(directory)
    for part, targets in (
        ("unet", [*NETWORK, "conv1", "proj_in", "conv_shortcut", "time_emb_proj"]),
        ("text_encoder", CLIP),
    ):
        stated = adapt(getattr(pipeline, part), targets, **options)
        getattr(pipeline, part).save_pretrained(directory / part)
        if config:
            stated.save_pretrained(directory / part)
    stored = load_file(directory / UNET)
    assert {v.ndim for n, v in stored.items() if "lora_A" in n} == {2, 4}
    assert any(v.shape[2:] == (3, 3) for n, v in stored.items() if "lora_A" in n)
    assert any("base_layer.bias" in name for name in stored)
    asked = intercept(
        pipeline, pipeline.unet, prompt=PROMPTS, latents=LATENTS, num_inference_steps=4,
        guidance_scale=1.0, height=16, width=16,
    )  # fmt: skip
    with caplog.at_level(logging.WARNING):
        model = load(directory)
    plain = load(base)
    for each in asked:
        x_t, t = each.given["sample"], each.given["timestep"].long().expand(2)
        found = model.predict(x_t, t, model.vocabulary.table)
        torch.testing.assert_close(found, each.output, rtol=1e-5, atol=1e-5)
        assert (found - plain.predict(x_t, t, plain.vocabulary.table)).abs().max() > 1e-2
    assert (model.vocabulary.table - plain.vocabulary.table).abs().max() > 1e-2
    assert list(weights(model)) == list(weights(plain))  # no layer of peft's is left
    assert model.identity()["weights"] != plain.identity()["weights"]
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == (0 if config else 2)  # one for each part
    for message, part in zip(said, ("unet", "text_encoder"), strict=bool(said)):
        assert part in " ".join(said) and "alpha = r, at the scale 1" in message


def test_flux_and_its_t5(tmp_path: Path) -> None:
    """A transformer, and a text encoder of which two names are of one weight."""
    directory = write_flux(tmp_path / "model")
    pipeline = FluxPipeline.from_pretrained(directory)
    for part, targets in (("transformer", NETWORK), ("text_encoder_2", ["q", "wi_0"])):
        config = adapt(getattr(pipeline, part), targets, lora_alpha=3)
        getattr(pipeline, part).save_pretrained(directory / part)
        config.save_pretrained(directory / part)
    packed = torch.nn.functional.pixel_unshuffle(LATENTS, 2).flatten(2).transpose(1, 2)
    (asked,) = intercept(
        pipeline, pipeline.transformer, prompt=PROMPTS, latents=packed, num_inference_steps=1,
        height=16, width=16,
    )  # fmt: skip
    model, plain = load(directory), load(write_flux(tmp_path / "plain"))
    found = model.predict(LATENTS, torch.full((2,), 999), model.vocabulary.table)
    expected = asked.output.transpose(1, 2).unflatten(2, (4, 4))
    expected = torch.nn.functional.pixel_shuffle(expected, 2)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not torch.equal(model.vocabulary.table, plain.vocabulary.table)
    assert model.identity()["weights"] != plain.identity()["weights"]


def test_dit(dit_dir: Path, tmp_path: Path) -> None:
    directory = copied(dit_dir, tmp_path / "model")
    network = DiTTransformer2DModel.from_pretrained(directory / "transformer")
    adapt(network, ["to_q", "proj_out_2", "linear"])
    network.save_pretrained(directory / "transformer")
    model = load_model(directory)
    x_t = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    t, classes = torch.tensor([10, 700]), torch.tensor([0, 2])
    with torch.no_grad():
        expected = network(x_t, t, class_labels=classes).sample[:, : x_t.shape[1]]
    found = model.predict(x_t, t, model.vocabulary.table[classes])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"lora_alpha": 7},
        {"lora_alpha": 7, "use_rslora": True},
        {"rank_pattern": {"to_k": 3, "attn2.to_q": 1}, "alpha_pattern": {r"attn1\.to_q": 9}},
        {"rank_pattern": {r"down_blocks.*to_k": 4}, "alpha_pattern": {r"down.*k": 0.5, "to_k": 8}},
    ],
    ids=["alpha", "rslora", "patterns", "expressions"],
)
def test_weights_are_those_that_peft_merges(options: dict, base: Path, tmp_path: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(base / "unet")
    directory = copied(base / "unet", tmp_path / "unet")
    adapt(unet, NETWORK, **options).save_pretrained(directory)
    unet.save_pretrained(directory)
    found = load_component(UNet2DConditionModel, directory, False).state_dict()
    n = 0
    for name, module in unet.named_modules():
        if hasattr(module, "lora_A"):
            expected = module.base_layer.weight + module.get_delta_weight("default")
            torch.testing.assert_close(found[f"{name}.weight"], expected, rtol=1e-6, atol=1e-6)
            n += 1
    assert n == 32


def test_the_sum_is_made_in_float32_and_stored_as_asked(unfused: Path) -> None:
    stored = load_file(unfused / UNET)
    a, b = (stored[f"{LINEAR}.lora_{half}.default.weight"] for half in "AB")
    expected = stored[f"{LINEAR}.base_layer.weight"] + b @ a
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        unet = load_component(UNet2DConditionModel, unfused / "unet", False, dtype=dtype)
        assert all(v.dtype == dtype for v in unet.parameters())
        tight = {} if dtype != torch.float32 else {"rtol": 1e-6, "atol": 1e-6}
        torch.testing.assert_close(
            unet.state_dict()[f"{LINEAR}.weight"], expected.to(dtype), **tight
        )


def halved(folder: Path) -> None:
    rewrite(folder / f"{STEM}.safetensors", lambda w: w.update({n: w[n].half() for n in w}))


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / f"{STEM}.safetensors"), folder / f"{STEM}.bin")
    (folder / f"{STEM}.safetensors").unlink()


def as_peft_model(folder: Path) -> None:
    """As the whole of a ``PeftModel`` has them, of an adapter of another name."""

    def change(w: dict[str, torch.Tensor]) -> None:
        for name in list(w):
            w[f"base_model.model.{name.replace('.default.', '.style-1.')}"] = w.pop(name)

    rewrite(folder / f"{STEM}.safetensors", change)


@pytest.mark.parametrize("change", [shard, pickled, halved, as_peft_model])
def test_files_of_every_kind(change: Callable, unfused: Path, tmp_path: Path) -> None:
    directory = copied(unfused, tmp_path / "model")
    change(directory / "unet")
    found, expected = load(directory, allow_pickle=True), load(unfused)
    close = {"rtol": 5e-3, "atol": 1e-3} if change is halved else {"rtol": 0, "atol": 0}
    for name, value in weights(expected).items():
        torch.testing.assert_close(weights(found)[name], value, **close)


def test_a_lora_on_top(base: Path, unfused: Path, tmp_path: Path) -> None:
    file = write_lora(StableDiffusionPipeline.from_pretrained(base), tmp_path, "unet")
    plain, with_lora = weights(load(base)), weights(load(base, file, 0.5))
    adapter, both = weights(load(unfused)), weights(load(unfused, file, 0.5))
    for name, value in both.items():
        expected = adapter[name] + with_lora[name] - plain[name]
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)
    assert any(not torch.equal(both[name], adapter[name]) for name in both)


def test_peft_is_not_needed(unfused: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    assert same(load(unfused), load(unfused))


def test_from_the_hub_with_its_alpha(
    unfused: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """As ``hub.wanted`` would have fetched it: ``adapter_config.json`` lies beside the weights."""

    def write(directory: Path) -> Path:
        shutil.copytree(unfused, directory)
        return state(directory / "unet", lora_alpha=4)

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    write_to_hub(tmp_path, "someone/unfused", write)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    found, once = weights(load("someone/unfused")), weights(load(unfused))
    plain = load_file(unfused / UNET)[f"{LINEAR}.base_layer.weight"]
    name = f"0.{LINEAR}.weight"
    torch.testing.assert_close(found[name] - plain, 2 * (once[name] - plain))
    assert not caplog.records[1:]  # one of ``once``
