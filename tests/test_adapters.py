"""Weights saved with an unfused LoRA adapter: the model predicts what the one in memory does."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command import assert_refused, call
from diffusers import (
    DiTTransformer2DModel,
    FluxPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from pipelines import intercept
from safetensors.torch import load_file, save_file
from tiny_lora import CLASSES, CLIP, NETWORK, calm, load, same, weights, write_flux, write_lora
from tiny_sd import write_sd, write_to_hub
from transformers import CLIPTextModel
from weight_files import STEM, copied, shard

from dive_fast.errors import ModelError
from dive_fast.models import load_model
from dive_fast.models.files.checkpoint import load_component

peft = pytest.importorskip("peft", reason="adapters are made with peft")

PROMPTS = ["a photo of a cat.", "a photo of a dog."]
LATENTS = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
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


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return calm(write_sd(tmp_path_factory.mktemp("sd") / "model"), StableDiffusionPipeline)


@pytest.fixture(scope="module")
def unfused(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``base`` with an adapter of the UNet, as diffusers' own ``add_adapter`` has it saved."""
    directory = copied(base, tmp_path_factory.mktemp("unfused") / "model")
    unet = UNet2DConditionModel.from_pretrained(directory / "unet")
    unet.add_adapter(peft.LoraConfig(r=2, lora_alpha=2, target_modules=[*NETWORK, "conv1"]))
    generator = torch.Generator().manual_seed(0)
    for name, value in unet.named_parameters():
        if "lora_" in name:
            value.data = 0.1 * torch.randn(value.shape, generator=generator)
    unet.save_pretrained(directory / "unet")
    return directory


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


def state(folder: Path, **changes: Any) -> Path:
    """Writes an ``adapter_config.json`` of rank and alpha 2, with these changes."""
    content = {"peft_type": "LORA", "r": 2, "lora_alpha": 2} | changes
    (folder / "adapter_config.json").write_text(json.dumps(content))
    return folder


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
