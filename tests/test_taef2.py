"""TAEF2: what it computes, the forms in which it is read, and a training in its latents."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pickle
import zipfile
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest
import tiny_taef2
import torch
from command import assert_refused, call
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_classes import TINY, train, write_colours
from torch import Tensor

from dive_fast import DiffusionClassifier
from dive_fast.errors import ModelError
from dive_fast.models.autoencoder import encode_latents, image_shape, latent_channels
from dive_fast.models.files.checkpoint import fingerprint, load_component
from dive_fast.models.taef2 import load_taef2
from dive_fast.models.tiny_autoencoder import AutoencoderTAEF2
from dive_fast.training.classes_latents import decoded, latent_side, load_autoencoder

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pair of ``.pth`` files."""
    place = tmp_path_factory.mktemp("taef2")
    tiny_taef2.write_pair(place)
    return place


def pictures(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(3)) * 2 - 1


def assert_same(found: Tensor, expected: Tensor) -> None:
    """A reference in double precision."""
    assert found.dtype == torch.float32 and found.shape == expected.shape
    error = (found.double() - expected).square().mean() / expected.square().mean()
    assert error.sqrt() < 1e-5


@pytest.mark.parametrize("form", ["pth", "safetensors", "single"])
def test_published_forms(form: str, tmp_path: Path) -> None:
    """Latents and pictures are those that the tensors say."""
    write = tiny_taef2.write_single if form == "single" else tiny_taef2.write_pair
    encoder, decoder = write(tmp_path) if form == "single" else write(tmp_path, form)
    vae = load_taef2(tmp_path)
    assert not vae.training and not any(p.requires_grad for p in vae.parameters())
    x = pictures(2, 3, 40, 24)
    with torch.no_grad():
        z = vae.encode(x).latents
        back = vae.decode(z).sample
    assert z.shape == (2, 32, 5, 3) and back.shape == x.shape
    assert_same(z, tiny_taef2.encode(encoder, (x.double() + 1) / 2))
    assert_same(back, tiny_taef2.decode(decoder, z.double()) * 2 - 1)


def test_the_side_branches_count(folder: Path) -> None:
    """Without them the latents are others, so that the comparison above sees them."""
    weights = torch.load(folder / "taef2_encoder.pth", weights_only=True)
    plain = {key: value for key, value in weights.items() if ".pool." not in key}
    assert len(weights) - len(plain) == 12
    x = (pictures(1, 3, 16, 16).double() + 1) / 2
    with_them, without = tiny_taef2.encode(weights, x), tiny_taef2.encode(plain, x)
    assert (with_them - without).square().mean() > 0.1 * with_them.square().mean()


@pytest.mark.parametrize(
    ("widths", "blocks"), [((4, 8), (1, 2)), ((8,), (2,)), ((4, 8, 12), (2, 1, 1))]
)
def test_other_sizes_and_files_of_our_own(widths: tuple, blocks: tuple, tmp_path: Path) -> None:
    vae = AutoencoderTAEF2(
        in_channels=1, latent_channels=2, block_out_channels=widths, layers_per_block=blocks
    )
    vae.eval().register_to_config(scaling_factor=0.5)
    vae.save_pretrained(tmp_path)
    loaded = load_component(AutoencoderTAEF2, tmp_path, allow_pickle=False)
    theirs = AutoencoderTAEF2.from_pretrained(tmp_path)
    for other in (loaded, theirs):
        assert dict(other.config).items() >= {"scaling_factor": 0.5, "in_channels": 1}.items()
        for name, weight in vae.state_dict().items():
            assert torch.equal(other.state_dict()[name], weight), name
    factor = 2 ** (len(widths) - 1)
    assert latent_channels(loaded) == 2 and image_shape((2, 3, 5), loaded) == (
        1, 3 * factor, 5 * factor,
    )  # fmt: skip
    parts: dict[str, dict[str, Tensor]] = {"encoder": {}, "decoder": {}}
    for name, weight in vae.state_dict().items():
        part, _, key = name.split(".", 2)
        parts[part][key] = weight
    x = pictures(3, 1, 3 * factor, 5 * factor)
    expected = tiny_taef2.encode(parts["encoder"], (x.double() + 1) / 2)
    x0 = encode_latents(loaded, x, CPU)
    assert_same(x0, expected * 0.5)
    clipped = (tiny_taef2.decode(parts["decoder"], expected) * 2 - 1).clamp(-1, 1)
    assert_same(decoded(loaded, x0), clipped)


def test_training_in_its_latents(folder: Path, tmp_path: Path, capsys) -> None:
    """By the pair, then by the model that came out; diffusers loads that too."""
    from diffusers import DiTPipeline

    (tmp_path / "photos").mkdir()
    photos, out = write_colours(tmp_path / "photos"), tmp_path / "model"
    said = call(
        capsys, "train-classes", "--data", photos, "--out", out, "--vae", folder, "--size", 16,
        "--patch-size", 1, "--width", 16, "--heads", 2, "--layers", 1, "--steps", 2, "--copies", 1,
        "--samples-every", 2, "--batch-size", 6, "--held-out", 0.5, "--readers", 0,
    )  # fmt: skip
    assert said.code == 0, said.err
    index = json.loads((out / "model_index.json").read_text())
    assert index["vae"] == ["dive_fast.models.tiny_autoencoder", "AutoencoderTAEF2"]
    classifier = DiffusionClassifier.from_pretrained(out)
    assert classifier.model.latent_shape == (32, 2, 2)
    assert classifier.model.image_shape == (3, 16, 16)
    with Image.open(out / "samples" / "000002.png") as samples:
        assert samples.size == (6 * 16, 3 * 16)
    x0 = classifier.encode(list(map(str, sorted(photos.rglob("*.png")))))
    assert 0.8 < x0.square().mean() < 1.25
    said = call(capsys, "classify", photos / "red" / "0.png", "--model", out, "--probes", 4)
    assert said.code == 0 and said.out.split()[1] in classifier.names
    assert type(DiTPipeline.from_pretrained(out).vae) is AutoencoderTAEF2
    config = dataclasses.replace(TINY, image_size=16, patch_size=2)
    train(photos, tmp_path / "again", config, vae=out)
    first, second = load_autoencoder(folder), load_autoencoder(tmp_path / "again")
    assert fingerprint(first) == fingerprint(second) and second.config.scaling_factor == 1


def test_sides_of_latents(folder: Path) -> None:
    vae = load_autoencoder(folder)
    assert latent_side(vae, 320) == 40
    with pytest.raises(ModelError, match="the autoencoder's 8 pixels a latent divide, got 324"):
        latent_side(vae, 324)


def test_of_the_hub_safetensors_only(tmp_path: Path, monkeypatch) -> None:
    tiny_taef2.write_single(tmp_path)
    asked = []

    def snapshot(hub_id: str, allow_patterns: list[str]) -> str:
        asked.append((hub_id, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    vae = load_autoencoder("madebyollin/taef2")
    assert type(vae) is AutoencoderTAEF2
    ((hub_id, allowed),) = asked
    assert hub_id == "madebyollin/taef2"
    fetched = [
        name
        for name in ("taef2.safetensors", "taef2_encoder.safetensors", "taef2_encoder.pth")
        if any(fnmatch(name, pattern) for pattern in allowed)
    ]
    assert fetched == ["taef2.safetensors", "taef2_encoder.safetensors"]


def test_a_photograph(real_data) -> None:
    """The published weights give photographs back; without the side branches they do not."""
    vae = load_autoencoder(real_data("vae_taef2"))
    with zipfile.ZipFile(real_data("det80_coco_val2017_open_320px.zip")) as file:
        photograph = Image.open(io.BytesIO(file.read("images/000000000785.webp"))).convert("RGB")
    pixels = np.array(photograph.crop((80, 20, 208, 148)))
    x = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1
    x0 = encode_latents(vae, x, CPU)
    mean_square = ((decoded(vae, x0) - x) / 2).square().mean()
    assert x0.shape == (1, 32, 16, 16) and -10 * mean_square.log10() > 28
    weights = torch.load(real_data("vae_taef2") / "taef2_encoder.pth", weights_only=True)
    assert_same(x0, tiny_taef2.encode(weights, (x.double() + 1) / 2))


class Exit:
    """What a pickle may do to whoever reads it."""

    def __reduce__(self) -> tuple:
        return os._exit, (3,)


class TestBadFiles:
    def test_sets(self, folder: Path, tmp_path: Path) -> None:
        tiny_taef2.write_pair(tmp_path / "half")
        (tmp_path / "half" / "taef2_decoder.pth").unlink()
        tiny_taef2.write_pair(tmp_path / "two")
        tiny_taef2.write_single(tmp_path / "two")
        (tmp_path / "none").mkdir()
        for name, message in (
            ("half", "expected taef2_decoder.pth beside taef2_encoder.pth in .*half, found none"),
            ("two", "one set of TAEF2's weights in .*two, got taef2.safetensors and taef2_encoder"),
            ("none", "expected config.json in .*none or its folder vae, found none, nor any of "),
        ):
            with pytest.raises(ModelError, match=message):
                load_autoencoder(tmp_path / name)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda w: without_pools(w), "do not fit TAEF2: 12 missing keys, the first is encoder"),
            (lambda w: w | {"15.weight": w["14.weight"]}, "1 unexpected keys.* encoder.layers.15"),
            (lambda w: w | {"0.weight": w["2.weight"]}, r"0.weight: \[64, 64, 3, 3\], expected"),
            (lambda w: w | {"0.bias": w["0.bias"] / 0}, "encoder.layers.0.bias holds NaN or inf"),
            (lambda w: w | {"0.bias": w["0.bias"].int()}, "expected weights of .* got .* of int32"),
            (lambda w: w | {"x": 3}, "must hold dense tensors by name, got int as 'x'"),
            (lambda w: {"conv_in.weight": w["0.weight"]}, "79 missing keys"),
            (lambda w: [w], "must hold tensors by name, got list"),
            (lambda w: {"0.bias": Exit()}, r"taef2_encoder.pth is truncated or damaged: .*_exit"),
        ],
        ids=["TAESD", "more", "shape", "NaN", "int", "no tensor", "foreign", "list", "pickle"],
    )
    def test_weights(self, change, message: str, tmp_path: Path, capsys) -> None:
        encoder, _ = tiny_taef2.write_pair(tmp_path)
        torch.save(change(encoder), tmp_path / "taef2_encoder.pth")
        with pytest.raises(ModelError, match=message) as refused:
            load_autoencoder(tmp_path)
        assert "\n" not in str(refused.value)

    @pytest.mark.parametrize("form", ["pth", "safetensors"])
    @pytest.mark.parametrize("kind", ["empty", "cut", "text", "plain pickle"])
    def test_damage(self, kind: str, form: str, tmp_path: Path, capsys) -> None:
        place, photos = tmp_path / "vae", tmp_path / "photos"
        tiny_taef2.write_pair(place, form)
        path = place / f"taef2_decoder.{form}"
        content = {
            "empty": b"",
            "cut": path.read_bytes()[:-1000],
            "text": b"<html>not found</html>",
            "plain pickle": pickle.dumps(Exit(), protocol=2),
        }
        path.write_bytes(content[kind])
        photos.mkdir()
        write_colours(photos)
        said = call(
            capsys, "train-classes", "--data", photos, "--out", tmp_path / "out", "--vae", place
        )
        assert_refused(said, f"taef2_decoder.{form}.*(an empty file|is truncated or damaged)")
        assert not (tmp_path / "out").exists()

    def test_a_configuration(self, tmp_path: Path) -> None:
        AutoencoderTAEF2(block_out_channels=(4, 4), layers_per_block=(1, 1)).save_pretrained(
            tmp_path
        )
        config = json.loads((tmp_path / "config.json").read_text())
        for change, message in (
            ({"layers_per_block": [1]}, "expected as many block_out_channels .* got 2 and 1"),
            ({"block_out_channels": [], "layers_per_block": []}, "one or more, got 0 and 0"),
            ({"layers_per_block": [1, 2]}, "do not fit its config.json: .* missing keys"),
            ({"block_out_channels": "4"}, "block_out_channels in .* must be"),
        ):
            (tmp_path / "config.json").write_text(json.dumps(config | change))
            with pytest.raises(ModelError, match=message):
                load_autoencoder(tmp_path)


def without_pools(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """As the files of TAESD are."""
    return {key: value for key, value in weights.items() if ".pool." not in key}


def test_names_of_a_single_file(tmp_path: Path) -> None:
    """The published file's names are the class's, which saves them again."""
    tiny_taef2.write_single(tmp_path / "published")
    load_taef2(tmp_path / "published").save_pretrained(tmp_path / "own")
    published = load_file(tmp_path / "published" / "taef2.safetensors")
    own = load_file(tmp_path / "own" / "diffusion_pytorch_model.safetensors")
    assert own.keys() == published.keys()
    save_file(own, tmp_path / "published" / "taef2.safetensors")
    assert fingerprint(load_taef2(tmp_path / "published")) == fingerprint(
        load_taef2_of(own, tmp_path / "third")
    )


def load_taef2_of(weights: dict[str, Tensor], folder: Path) -> AutoencoderTAEF2:
    folder.mkdir()
    save_file(weights, folder / "taef2.safetensors")
    return load_taef2(folder)
