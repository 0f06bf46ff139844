"""Model directories that cannot be used: one sentence each, and no code of theirs is run."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from command import assert_refused, call
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import read_json, write_json

from dive_fast import DiffusionClassifier, ModelError
from dive_fast.models import load_model, register_model_family

WEIGHTS = "diffusion_pytorch_model.safetensors"
PICKLED = "diffusion_pytorch_model.bin"
TRANSFORMER = f"transformer/{WEIGHTS}"
LABELS = {"0": "circle", "1": "square", "2": "cross", "3": "star"}

Change = Callable[[Path], object]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    return tmp_path / "image.png"


def change_json(file: str, **values: object) -> Change:
    return lambda d: write_json(d / file, read_json(d / file) | values)


def without(file: str, key: str) -> Change:
    return lambda d: write_json(
        d / file, {k: v for k, v in read_json(d / file).items() if k != key}
    )


def write(file: str, content: bytes) -> Change:
    return lambda d: (d / file).write_bytes(content)


def cut(file: str, at: int) -> Change:
    return lambda d: (d / file).write_bytes((d / file).read_bytes()[:at])


def remove(name: str) -> Change:
    return lambda d: shutil.rmtree(d / name) if (d / name).is_dir() else (d / name).unlink()


def change_weights(change: Callable[[dict], object], file: str = TRANSFORMER) -> Change:
    def apply(directory: Path) -> None:
        weights = load_file(directory / file)
        change(weights)
        save_file(weights, directory / file)

    return apply


def spoil(value: float) -> Callable[[dict], object]:
    def change(weights: dict) -> None:
        weights[min(weights)].view(-1)[0] = value

    return change


def pickle_weights(directory: Path, component: str = "transformer") -> Path:
    """Replaces the safetensors by a pickle of the same weights."""
    safe = directory / component / WEIGHTS
    torch.save(load_file(safe), directory / component / PICKLED)
    safe.unlink()
    return directory / component / PICKLED


PIXELS: dict[str, tuple[Change, str]] = {
    "no index": (remove("model_index.json"), "expected model_index.json in .*, found none"),
    "index cut": (cut("model_index.json", 20), "model_index.json cannot be read as JSON"),
    "index empty": (write("model_index.json", b""), "model_index.json cannot be read as JSON"),
    "index binary": (write("model_index.json", b"\xff\x00"), "cannot be read as JSON"),
    "index deep": (write("model_index.json", b"[" * 10**5), "cannot be read as JSON"),
    "index a list": (write("model_index.json", b"[1]"), "must hold a JSON object, got list"),
    "no family": (without("model_index.json", "_class_name"), "supported are .*DiTPipeline"),
    "family a list": (
        change_json("model_index.json", _class_name=["DiTPipeline"]),
        "supported are .*DiTPipeline",
    ),
    "another family": (
        change_json("model_index.json", _class_name="ShapEPipeline"),
        "'ShapEPipeline', which is not supported; supported are .*DiTPipeline",
    ),
    "too few labels": (
        change_json("model_index.json", id2label={"0": "circle"}),
        "must name the classes 0 to 3, got 1",
    ),
    "labels a list": (change_json("model_index.json", id2label=["a"]), "map class ids to names"),
    **{
        f"a label {label!r}": (
            change_json("model_index.json", id2label={**LABELS, "1": label}),
            "must name the class 1 by a text that is not empty",
        )
        for label in ("", " ", None, True, 1.5, ["square"])
    },
    "a label twice": (
        change_json("model_index.json", id2label={**LABELS, "01": "oval"}),
        "must name the classes 0 to 3, got 5 ids",
    ),
    "no transformer": (remove("transformer"), "expected the folder transformer in"),
    "no config": (remove("transformer/config.json"), "expected config.json in"),
    "config broken": (write("transformer/config.json", b"{"), "config.json cannot be read as JSON"),
    "config absurd": (
        change_json("transformer/config.json", patch_size=0),
        "cannot be loaded as DiTTransformer2DModel",
    ),
    "config of text": (
        change_json("transformer/config.json", num_layers="two"),
        "cannot be loaded as DiTTransformer2DModel",
    ),
    "fewer layers": (
        change_json("transformer/config.json", num_layers=1),
        r"do not fit its config.json: \d+ unexpected keys, the first is transformer_blocks.1",
    ),
    "more layers": (
        change_json("transformer/config.json", num_layers=3),
        r"do not fit its config.json: \d+ missing keys, the first is transformer_blocks.2",
    ),
    "more classes": (
        change_json("transformer/config.json", num_embeds_ada_norm=7),
        "size mismatch for .*embedding_table.weight",
    ),
    "no weights": (remove(TRANSFORMER), f"expected weights {WEIGHTS} in .*, found none"),
    "weights empty": (write(TRANSFORMER, b""), "got an empty file"),
    "weights cut": (cut(TRANSFORMER, -100), f"{WEIGHTS} is truncated or damaged"),
    "weights cut short": (cut(TRANSFORMER, 5), f"{WEIGHTS} is truncated or damaged"),
    "weights of text": (
        write(TRANSFORMER, b"version https://git-lfs.github.com/spec/v1"),
        f"{WEIGHTS} is truncated or damaged",
    ),
    "wrong shape": (
        change_weights(lambda w: w.update({"proj_out_2.bias": torch.zeros(3)})),
        "size mismatch for proj_out_2.bias",
    ),
    "one missing": (
        change_weights(lambda w: w.pop("proj_out_2.bias")),
        "1 missing keys, the first is proj_out_2.bias",
    ),
    "one too many": (
        change_weights(lambda w: w.update(extra=torch.zeros(3))),
        "1 unexpected keys, the first is extra",
    ),
    "NaN": (change_weights(spoil(float("nan"))), "are not finite: .* holds NaN or inf"),
    "infinity": (change_weights(spoil(float("inf"))), "are not finite: .* holds NaN or inf"),
    "pickled": (pickle_weights, "pickled weights only .* refused unless asked for"),
    "no scheduler": (remove("scheduler"), "expected scheduler_config.json in"),
    "scheduler empty": (
        write("scheduler/scheduler_config.json", b""),
        "scheduler_config.json cannot be read as JSON",
    ),
    "unknown schedule": (
        change_json("scheduler/scheduler_config.json", beta_schedule="sigmoid"),
        "the scheduler's betas cannot be read: sigmoid is not implemented for DDIMScheduler",
    ),
    "unknown target": (
        change_json("scheduler/scheduler_config.json", prediction_type="flow"),
        "expected a prediction_type of epsilon, .* got 'flow'",
    ),
}

VAE: dict[str, tuple[Change, str]] = {
    "no vae": (remove("vae"), "expected the folder vae in"),
    "vae cut": (cut(f"vae/{WEIGHTS}", -10), f"vae/{WEIGHTS} is truncated or damaged"),
    "vae NaN": (
        change_weights(spoil(float("nan")), f"vae/{WEIGHTS}"),
        "are not finite: .* holds NaN or inf",
    ),
    "vae pickled": (
        lambda d: pickle_weights(d, "vae"),
        "pickled weights only .* refused unless asked for",
    ),
}

CASES = [(name, "dit_dir", *case) for name, case in PIXELS.items()]
CASES += [(name, "latent_dit_dir", *case) for name, case in VAE.items()]


@pytest.mark.parametrize(("name", "kind", "change", "message"), CASES, ids=[c[0] for c in CASES])
def test_broken_directory(
    name: str, kind: str, change: Change, message: str, request, tmp_path: Path, image, capsys
) -> None:
    directory = tmp_path / "model"
    shutil.copytree(request.getfixturevalue(kind), directory)
    change(directory)
    assert_refused(call(capsys, "classify", image, "--model", directory), message)
    with pytest.raises(ModelError, match=message):
        load_model(directory)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            "cifar",
            r"unknown model 'cifar': expected a model of the zoo \(.*digits.*\), a directory",
        ),
        ("no/such/directory", "unknown model 'no/such/directory'"),
        (__file__, "expected a model directory, got the file"),
        (Path(__file__).parent, "expected model_index.json in .*, found none"),
    ],
)
def test_unknown_model(model: object, message: str, image: Path, capsys) -> None:
    assert_refused(call(capsys, "classify", image, "--model", model), message)


def test_hub_id_that_cannot_be_fetched(image: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    said = call(capsys, "classify", image, "--model", "nobody/no-such-model")
    assert_refused(said, "nobody/no-such-model is no directory here and could not be fetched")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--dtype", "int8"), "expected a dtype of float32, .* got 'int8'"),
        (("--device", "abacus"), "the device 'abacus' cannot be used"),
        (("--device", "meta"), "the device 'meta' cannot be used"),
        (("--device", "cuda:99"), "the device 'cuda:99' cannot be used"),
        (("--timestep-embedding", "x"), "expected a timestep_embedding of .* got 'x'"),
    ],
)
def test_unusable_option(option: tuple, message: str, dit_dir: Path, image: Path, capsys) -> None:
    said = call(capsys, "classify", image, "--model", dit_dir, *option)
    assert_refused(said, message)


@pytest.mark.parametrize("component", ["transformer", "vae"])
def test_pickled_weights_on_request(
    component: str, latent_dit_dir: Path, tmp_path: Path, image
) -> None:
    directory = tmp_path / "model"
    shutil.copytree(latent_dit_dir, directory)
    pickle_weights(directory, component)
    pickled = DiffusionClassifier.from_pretrained(directory, allow_pickle=True)
    safe = DiffusionClassifier.from_pretrained(latent_dit_dir)
    torch.testing.assert_close(pickled.losses(image, probes=3), safe.losses(image, probes=3))


class _Touch:
    """Makes a file when it is unpickled without restrictions."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("kind", ["code", "cut", "empty", "no tensors"])
def test_bad_pickle_on_request(kind: str, dit_dir: Path, tmp_path: Path, image, capsys) -> None:
    directory = tmp_path / "model"
    shutil.copytree(dit_dir, directory)
    path = pickle_weights(directory)
    if kind == "code":
        torch.save({"weight": _Touch(tmp_path / "run")}, path)
    elif kind == "no tensors":
        torch.save([1], path)
    else:
        path.write_bytes(path.read_bytes()[: 200 if kind == "cut" else 0])
    said = call(capsys, "classify", image, "--model", directory, "--allow-pickle")
    assert_refused(said, re.escape(str(directory)))
    assert not (tmp_path / "run").exists()


def test_overflow_in_half_precision(dit_dir: Path, tmp_path: Path, image: Path, capsys) -> None:
    directory = tmp_path / "model"
    shutil.copytree(dit_dir, directory)
    change_weights(lambda w: w["pos_embed.proj.weight"].mul_(3e4))(directory)
    arguments = ("classify", image, "--model", directory, "--probes", 4, "--json")
    assert call(capsys, *arguments).code == 0
    said = call(capsys, *arguments, "--dtype", "float16")
    assert_refused(said, "expected finite losses from .* in torch.float16, got NaN or infinity")
    change_weights(lambda w: w["pos_embed.proj.weight"].mul_(1e4))(directory)
    assert call(capsys, *arguments).code == 0
    said = call(capsys, *arguments, "--dtype", "float16")
    assert_refused(said, "not finite in torch.float16: pos_embed.proj.weight .* beyond 65504")


def test_family_from_outside(tmp_path: Path, dit_dir: Path) -> None:
    """A registered loader is called, and listed among the supported families."""
    from dive_fast.models import source as registry
    from dive_fast.models.dit import model as dit

    directory = tmp_path / "model"
    shutil.copytree(dit_dir, directory)
    change_json("model_index.json", _class_name="MyPipeline")(directory)
    register_model_family("MyPipeline", dit.load)
    try:
        assert load_model(directory).latent_shape == (1, 8, 8)
        change_json("model_index.json", _class_name="Other")(directory)
        with pytest.raises(ModelError, match="supported are .*DiTPipeline, .*MyPipeline"):
            load_model(directory)
    finally:
        del registry.FAMILIES["MyPipeline"]
