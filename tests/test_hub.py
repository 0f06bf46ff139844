"""What is fetched of a model on the hub, and that a fetched one loads."""

from __future__ import annotations

import argparse
import shutil
from collections import Counter
from functools import partial
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file
from tiny_layout import make_layout_model
from tiny_sd import write_to_hub

from dive_fast import DiffusionClassifier, LayoutDetector, ModelError
from dive_fast.cli.loading import load_classifier
from dive_fast.cli.options import add_classifier_options
from dive_fast.models import load_model, resolve
from dive_fast.models.files.hub import download, patterns, wanted
from dive_fast.models.source import FAMILIES

# As published: stable-diffusion-v1-5, with every variant that lies beside.
SD_WANTED = """
model_index.json scheduler/scheduler_config.json
text_encoder/config.json text_encoder/model.safetensors
tokenizer/merges.txt tokenizer/special_tokens_map.json tokenizer/tokenizer_config.json
tokenizer/vocab.json
unet/config.json unet/diffusion_pytorch_model.safetensors
vae/config.json vae/diffusion_pytorch_model.safetensors
""".split()
SD_UNWANTED = """
.gitattributes README.md v1-inference.yaml
v1-5-pruned.ckpt v1-5-pruned.safetensors v1-5-pruned-emaonly.ckpt v1-5-pruned-emaonly.safetensors
feature_extractor/preprocessor_config.json
safety_checker/config.json safety_checker/model.safetensors safety_checker/model.fp16.safetensors
safety_checker/pytorch_model.bin safety_checker/pytorch_model.fp16.bin
text_encoder/model.fp16.safetensors text_encoder/pytorch_model.fp16.bin
unet/diffusion_pytorch_model.fp16.bin unet/diffusion_pytorch_model.fp16.safetensors
unet/diffusion_pytorch_model.non_ema.bin unet/diffusion_pytorch_model.non_ema.safetensors
vae/diffusion_pytorch_model.fp16.bin vae/diffusion_pytorch_model.fp16.safetensors
""".split()
SD_PICKLES = """
text_encoder/pytorch_model.bin unet/diffusion_pytorch_model.bin vae/diffusion_pytorch_model.bin
""".split()


def folders(pipeline_class: str) -> tuple[str, ...]:
    return FAMILIES[pipeline_class].folders


def fetched(files, pipeline_class, variant=None, allow_pickle=False) -> list[str]:
    """What is fetched of a repository of these files."""
    read = None if pipeline_class is None else folders(pipeline_class)
    return sorted(wanted(files, read, variant, allow_pickle, "someone/model"))


def test_stable_diffusion():
    files = SD_WANTED + SD_UNWANTED + SD_PICKLES
    for allow_pickle in (False, True):  # where there are safetensors, pickles are not fetched
        assert fetched(files, "StableDiffusionPipeline", None, allow_pickle) == sorted(SD_WANTED)
    pickled = [name for name in files if not name.endswith(".safetensors")]
    texts = [name for name in SD_WANTED if not name.endswith(".safetensors")]
    assert fetched(pickled, "StableDiffusionPipeline") == sorted(texts)
    found = fetched(pickled, "StableDiffusionPipeline", None, True)
    assert found == sorted(texts + SD_PICKLES)
    found = fetched(pickled, "StableDiffusionPipeline", "fp16", True)
    assert found == sorted(texts + [name.replace(".bin", ".fp16.bin") for name in SD_PICKLES])


def test_sdxl_and_shards():
    wanted = """
    model_index.json text_encoder_2/config.json text_encoder_2/model.safetensors
    tokenizer_2/merges.txt tokenizer_2/vocab.json unet/config.json
    unet/diffusion_pytorch_model-00001-of-00002.safetensors
    unet/diffusion_pytorch_model-00002-of-00002.safetensors
    unet/diffusion_pytorch_model.safetensors.index.json
    """.split()
    variant = """
    text_encoder_2/model.fp16.safetensors
    unet/diffusion_pytorch_model.fp16-00001-of-00002.safetensors
    unet/diffusion_pytorch_model.fp16-00002-of-00002.safetensors
    unet/diffusion_pytorch_model.safetensors.index.fp16.json
    """.split()
    unwanted = """
    sd_xl_base_1.0.safetensors sd_xl_offset_example-lora_1.0.safetensors 01.png LICENSE.md
    text_encoder/flax_model.msgpack text_encoder/model.onnx text_encoder/openvino_model.bin
    vae_1_0/diffusion_pytorch_model.safetensors
    unet/diffusion_pytorch_model.bin.index.json
    vae_decoder/config.json unet/model.onnx_data
    """.split()
    sdxl = "StableDiffusionXLPipeline"
    assert fetched(wanted + variant + unwanted, sdxl) == sorted(wanted)
    texts = [f for f in wanted if "model.safetensors" not in f and "-of-" not in f]
    assert fetched(wanted + variant + unwanted, sdxl, "fp16") == sorted(texts + variant)
    # The only variant of a folder is fetched unasked.
    assert fetched(texts + variant, sdxl) == sorted(texts + variant)


def test_a_variant_that_the_hub_lacks():
    files = SD_WANTED + SD_UNWANTED
    with pytest.raises(ModelError, match="'bf16' in someone/model, got 'fp16', 'non_ema' and full"):
        fetched(files, "StableDiffusionPipeline", "bf16")
    with pytest.raises(ModelError, match="'bf16' in someone/model, got full precision only"):
        fetched(SD_WANTED, "StableDiffusionPipeline", "bf16")


def test_a_family_from_outside_gets_all_folders():
    files = ["model_index.json", "prior/config.json", "prior/diffusion_pytorch_model.safetensors"]
    more = ["single.safetensors", "prior/diffusion_pytorch_model.fp16.safetensors"]
    assert fetched(files + more, None) == files


def test_adapters_on_the_hub_are_told_of_and_not_fetched(caplog):
    more = [
        "pytorch_lora_weights.safetensors",
        "unet/adapter_model.safetensors",
        "lora/config.json",
    ]
    assert fetched(SD_WANTED + more, "StableDiffusionPipeline") == sorted(SD_WANTED)
    (record,) = caplog.records
    said = "'pytorch_lora_weights.safetensors', 'unet/adapter_model.safetensors' in someone/model"
    assert record.getMessage().startswith(said)


def test_the_alpha_of_an_unfused_adapter_is_fetched(caplog):
    files = [*SD_WANTED, "unet/adapter_config.json"]
    assert fetched(files, "StableDiffusionPipeline") == sorted(files)
    assert not caplog.records


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_patterns_where_nobody_could_list_the_files(variant):
    """They let through what would be read, and no file of another kind."""
    files = SD_WANTED + SD_UNWANTED + SD_PICKLES
    read = folders("StableDiffusionPipeline")
    found = set(filter_repo_objects(files, allow_patterns=patterns(read, variant)))
    assert found >= set(fetched(files, "StableDiffusionPipeline", variant))
    assert not any(name.endswith((".bin", ".ckpt")) or "safety" in name for name in found)
    found = set(filter_repo_objects(files, allow_patterns=patterns(read, variant, True)))
    assert found >= set(SD_PICKLES)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache that holds one snapshot of "someone/tiny-sd", and no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return write_to_hub(tmp_path / "hub", "someone/tiny-sd")


def test_a_hub_id_loads(hub):
    model = load_model("someone/tiny-sd", device="cpu", classes=["cat", "dog"])
    assert model.name == "someone/tiny-sd" and model.vocabulary.names == ("cat", "dog")
    assert model.identity() == load_model(hub, device="cpu", classes=["cat", "dog"]).identity()


ONCE = {"hf_hub_download": 1, "list_repo_files": 1, "snapshot_download": 1}


@pytest.fixture
def asked(hub, monkeypatch: pytest.MonkeyPatch) -> Counter:
    """How often ``huggingface_hub`` was asked for one file, for the list, and for a snapshot."""
    counts: Counter = Counter()

    def counted(name: str, original, *args, **options):
        counts[name] += 1
        return original(*args, **options)

    for name in ONCE:
        original = getattr(huggingface_hub, name)
        monkeypatch.setattr(huggingface_hub, name, partial(counted, name, original))
    return counts


def test_a_hub_id_is_resolved_once(hub, asked):
    """Whoever holds what it was resolved to asks the hub no more."""
    source = resolve("someone/tiny-sd")
    assert str(source) == "someone/tiny-sd" and source.directory == hub
    assert not source.own and source.own_directory is None and source.prior is None
    assert source.needs_classes and resolve(source) is source
    classifier = DiffusionClassifier.from_pretrained(source, device="cpu", classes=["cat", "dog"])
    assert classifier.model.name == "someone/tiny-sd" and asked == ONCE


def test_from_pretrained_resolves_once(hub, asked, tmp_path):
    DiffusionClassifier.from_pretrained("someone/tiny-sd", device="cpu", classes=["cat", "dog"])
    assert asked == ONCE
    asked.clear()
    write_to_hub(tmp_path / "hub", "someone/layouts", write_layout_model)
    detector = LayoutDetector.from_pretrained("someone/layouts", device="cpu")
    assert detector.directory is None and asked == ONCE


def test_the_command_line_resolves_once(hub, asked):
    parser = argparse.ArgumentParser()
    add_classifier_options(parser)
    options = parser.parse_args(["--model", "someone/tiny-sd", "--device", "cpu"])
    assert load_classifier(options, ["cat", "dog"]).names == ("cat", "dog")
    assert asked == ONCE


def write_layout_model(directory: Path) -> Path:
    make_layout_model().save_pretrained(directory)
    return directory


def test_pickles_of_the_hub_are_for_those_who_ask(hub):
    safe = hub / "text_encoder" / "model.safetensors"
    torch.save(load_file(safe), safe.with_name("pytorch_model.bin"))
    safe.unlink()
    with pytest.raises(ModelError, match="pickled weights only .*pytorch_model.bin.*, which are"):
        load_model("someone/tiny-sd", classes=["cat", "dog"])
    load_model("someone/tiny-sd", classes=["cat", "dog"], allow_pickle=True)


def test_what_is_not_supported_is_not_fetched(hub, monkeypatch):
    index = hub / "model_index.json"
    index.write_text(index.read_text().replace("StableDiffusionPipeline", "ShapEPipeline"))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: pytest.fail("fetched"))
    with pytest.raises(ModelError, match="in someone/tiny-sd is 'ShapEPipeline', which is not sup"):
        load_model("someone/tiny-sd")


def test_what_is_not_there(hub):
    shutil.rmtree(hub / "unet")
    with pytest.raises(ModelError, match="expected the folder unet in"):
        load_model("someone/tiny-sd", classes=["cat"])
    with pytest.raises(ModelError, match="nobody/none is no directory here and could not be"):
        download("nobody/none", lambda index: None, allow_pickle=False)


def test_tokenizers_of_every_kind():
    """sentencepiece's models, and templates of a chat, as FLUX.1 and Z-Image have them."""
    files = """
    model_index.json tokenizer_2/spiece.model tokenizer_2/special_tokens_map.json
    tokenizer/merges.txt tokenizer/chat_template.jinja tokenizer/tokenizer.json
    """.split()
    left = "tokenizer/README.md tokenizer_2/spiece.vocab flux1-dev.model other/x.model".split()
    assert fetched(files + left, "FluxPipeline") == sorted(files)
    allowed = patterns(folders("FluxPipeline"))
    assert sorted(filter_repo_objects(files + left, allow_patterns=allowed)) == sorted(files)
