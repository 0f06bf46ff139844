"""Stable Diffusion directories: how published ones look, and how broken ones are refused."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command import assert_refused, call
from pictures import noise_picture
from safetensors.torch import load_file, save_file
from tiny import read_json, write_json
from tiny_sd import LENGTH, make_unet, make_vae

from dive_fast import DiffusionClassifier, ModelError
from dive_fast.models import load_model

CLASSES = ["cat", "dog"]
UNET = "unet/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"
Change = Callable[[Path], object]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    noise_picture((20, 16), 80).save(tmp_path / "image.png")
    return tmp_path / "image.png"


def change_json(file: str, **values: object) -> Change:
    return lambda d: write_json(d / file, read_json(d / file) | values)


def remove(*names: str) -> Change:
    def apply(directory: Path) -> None:
        for name in names:
            path = directory / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return apply


def write(file: str, content: bytes) -> Change:
    return lambda d: (d / file).write_bytes(content)


def change_weights(file: str, change: Callable[[dict], dict | None]) -> Change:
    def apply(directory: Path) -> None:
        weights = load_file(directory / file)
        save_file(change(weights) or weights, directory / file)

    return apply


def text_key(weights: dict, name: str) -> str:
    """transformers 4 and 5 save the text encoder with and without "text_model."."""
    return next(key for key in weights if key.endswith(name))


def drop(name: str) -> Callable[[dict], dict | None]:
    return lambda w: {k: v for k, v in w.items() if k != text_key(w, name)}


def put(name: str, value: torch.Tensor) -> Callable[[dict], dict | None]:
    return lambda w: w | {text_key(w, name): value}


def pickle_text(directory: Path) -> None:
    weights = load_file(directory / TEXT)
    torch.save(weights, directory / "text_encoder" / "pytorch_model.bin")
    (directory / TEXT).unlink()


def save_unet(**changes: object) -> Change:
    return lambda d: make_unet(12, **changes).save_pretrained(d / "unet")


SD: dict[str, tuple[Change, str]] = {
    "no tokenizer": (remove("tokenizer"), "expected the folder tokenizer in"),
    "no merges": (remove("tokenizer/merges.txt"), "expected vocab.json and merges.txt"),
    "no vocab": (remove("tokenizer/vocab.json"), "expected vocab.json and merges.txt"),
    "vocab cut": (
        write("tokenizer/vocab.json", b'{"a": '),
        "tokenizer cannot be loaded as CLIPTok",
    ),
    "merges binary": (write("tokenizer/merges.txt", b"\xff\xfe\x00"), "tokenizer cannot be loaded"),
    "tokenizer too large": (
        change_json("tokenizer/vocab.json", surplus=68),
        "tokenizer in .* has 69 tokens, but its text encoder knows 68",
    ),
    "text encoder too small": (
        change_json("text_encoder/config.json", vocab_size=10),
        "size mismatch for .*token_embedding.weight",
    ),
    "no text encoder": (remove("text_encoder"), "expected the folder text_encoder in"),
    "no text config": (remove("text_encoder/config.json"), "expected config.json in"),
    "no text weights": (remove(TEXT), "expected weights model.safetensors in .*text_encoder"),
    "text weights empty": (write(TEXT, b""), "got an empty file"),
    "text weights damaged": (write(TEXT, b"version https"), "is truncated or damaged"),
    "text weights missing": (
        change_weights(TEXT, drop("final_layer_norm.bias")),
        "1 missing keys, the first is .*final_layer_norm.bias",
    ),
    "text weights surplus": (
        change_weights(TEXT, lambda w: w | {"text_model.extra": torch.zeros(2)}),
        "1 unexpected keys, the first is .*extra",
    ),
    "text weights mis-shaped": (
        change_weights(TEXT, put("final_layer_norm.bias", torch.zeros(2))),
        r"size mismatch for .*final_layer_norm.bias: \[2\], expected \[12\]",
    ),
    "text weights NaN": (
        change_weights(TEXT, put("final_layer_norm.bias", torch.full((12,), torch.nan))),
        "text_encoder are not finite: .*final_layer_norm.bias",
    ),
    "text weights pickled": (
        pickle_text,
        r"pickled weights only \(pytorch_model.bin\), .* refused unless asked for",
    ),
    "another text encoder": (
        change_json("text_encoder/config.json", model_type="t5"),
        "text_encoder cannot be loaded as CLIPTextModel: expected the model_type clip_text_model",
    ),
    "another class of text encoder": (
        change_json("model_index.json", text_encoder=["x", "RobertaModel"]),
        "expected text_encoder in .* to be a CLIPTextModel, got 'RobertaModel'",
    ),
    "no unet in the index": (
        change_json("model_index.json", unet=[None, None]),
        "expected unet in .* to be a UNet2DConditionModel, got None",
    ),
    "no unet": (remove("unet"), "expected the folder unet in"),
    "no unet weights": (remove(UNET), "expected weights diffusion_pytorch_model.safetensors in"),
    "no vae": (remove("vae"), "expected the folder vae in"),
    "no scheduler": (remove("scheduler"), "expected scheduler_config.json in"),
    "EDM scheduler": (
        lambda d: write_json(
            d / "scheduler/scheduler_config.json", {"_class_name": "EDMEulerScheduler"}
        ),
        "expected a scheduler that states its betas, got EDMEulerScheduler",
    ),
    "narrow unet": (
        save_unet(cross_attention_dim=20),
        "takes embeddings of 20, but its text encoder gives 12",
    ),
    "inpainting unet": (save_unet(in_channels=9), "takes 9 channels, but its VAE gives 4"),
    "odd output": (save_unet(out_channels=5), "expected 4 or 8 output channels of the unet"),
    "class unet": (save_unet(num_class_embeds=3), "takes class labels beside the prompt"),
    "image unet": (
        save_unet(encoder_hid_dim=12, encoder_hid_dim_type="image_proj"),
        "takes images beside the prompt .*'image_proj'",
    ),
    "projected unet": (
        save_unet(encoder_hid_dim=20),
        "takes embeddings of 20, but its text encoder gives 12",
    ),
    "unet without cross-attention": (
        save_unet(
            down_block_types=("DownBlock2D",) * 2,
            mid_block_type="UNetMidBlock2D",
            up_block_types=("UpBlock2D",) * 2,
        ),
        "has no cross-attention to read a prompt with",
    ),
    "even kernels": (save_unet(conv_in_kernel=4), r"odd kernels .* got 4 \(conv_in\) and 3"),
    "guidance unet": (save_unet(time_cond_proj_dim=8), "conditioned on a guidance scale"),
    "unet of SDXL": (
        save_unet(added=10),
        "addition_embed_type of the unet .* None, got 'text_time'",
    ),
    "no sample size": (save_unet(sample_size=None), "to state one sample_size .* got None"),
    "oblong": (save_unet(sample_size=(8, 16)), r"to state one sample_size .* got .8, 16"),
}
SDXL: dict[str, tuple[Change, str]] = {
    "no second tokenizer": (remove("tokenizer_2"), "expected the folder tokenizer_2 in"),
    "no second encoder": (remove("text_encoder_2"), "expected the folder text_encoder_2 in"),
    "the refiner": (
        change_json("model_index.json", text_encoder=[None, None]),
        "expected text_encoder in .* to be a CLIPTextModel, got None",
    ),
    "lengths": (
        change_json("tokenizer_2/tokenizer_config.json", model_max_length=9),
        "text encoders of one length in .*, got 16 and 9 tokens",
    ),
    "added values": (
        lambda d: make_unet(28, added=11).save_pretrained(d / "unet"),
        "takes 59 added values, but six sizes and the pooled text give 58",
    ),
    "unet of SD": (
        lambda d: make_unet(28).save_pretrained(d / "unet"),
        "addition_embed_type of the unet .* 'text_time', got None",
    ),
}
CASES = [("sd", *case) for case in SD.values()] + [("sdxl", *case) for case in SDXL.values()]


@pytest.mark.parametrize(("kind", "change", "message"), CASES, ids=[*SD, *SDXL])
def test_broken_directory(kind, change, message, request, tmp_path, image, capsys) -> None:
    directory = tmp_path / "model"
    shutil.copytree(request.getfixturevalue(kind), directory)
    change(directory)
    said = call(capsys, "classify", image, "--model", directory, "--classes", "cat,dog")
    assert_refused(said, message)


def test_without_transformers(sd, image, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    arguments = ("classify", image, "--model", sd, "--classes", "cat,dog")
    assert_refused(call(capsys, *arguments), r"transformers, .* pip install 'dive_fast\[text\]'")


def test_timestep_embedding_is_of_dit(sd):
    with pytest.raises(ModelError, match="timestep_embedding is for models of the family dit"):
        load_model(sd, classes=CLASSES, timestep_embedding="original")


def losses(directory: Path, **options: object) -> torch.Tensor:
    clf = DiffusionClassifier.from_pretrained(directory, classes=CLASSES, **options)
    x0 = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return clf.losses(latents=x0, probes=3)


def publish_text(weights: dict) -> dict:
    """The names of transformers 4, and the constant that it saved up to 4.30."""
    old = {"text_model." + k.removeprefix("text_model."): v for k, v in weights.items()}
    return old | {"text_model.embeddings.position_ids": torch.arange(LENGTH)[None]}


def publish_vae(weights: dict) -> dict:
    """The VAE's attention as diffusers named it up to 0.17, and as the published files have it."""
    for new, old in (
        ("to_q", "query"),
        ("to_k", "key"),
        ("to_v", "value"),
        ("to_out.0", "proj_attn"),
    ):
        weights = {k.replace(f".{new}.", f".{old}."): v for k, v in weights.items()}
    assert any(".proj_attn." in key for key in weights)
    return weights


PUBLISHED: dict[str, Change] = {
    "old text encoder": change_weights(TEXT, publish_text),
    "old vae": change_weights("vae/diffusion_pytorch_model.safetensors", publish_vae),
    "variants beside": lambda d: [
        (d / folder / name).write_bytes(b"another precision, which is not read")
        for folder, name in (
            ("unet", "diffusion_pytorch_model.fp16.safetensors"),
            ("unet", "diffusion_pytorch_model.non_ema.bin"),
            ("text_encoder", "model.fp16.safetensors"),
            ("vae", "diffusion_pytorch_model.fp16.safetensors"),
        )
    ],
    "no safety checker, no image encoder": change_json(
        "model_index.json",
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        feature_extractor=["transformers", "CLIPImageProcessor"],
        image_encoder=[None, None],
    ),
    "image to image": change_json("model_index.json", _class_name="StableDiffusionImg2ImgPipeline"),
}


@pytest.mark.parametrize("change", PUBLISHED.values(), ids=PUBLISHED)
def test_published_directories_load(change, sd, tmp_path):
    shutil.copytree(sd, tmp_path / "model")
    change(tmp_path / "model")
    torch.testing.assert_close(losses(tmp_path / "model"), losses(sd))
    vaes = [load_model(d, classes=CLASSES).vae.state_dict() for d in (sd, tmp_path / "model")]
    assert all(torch.equal(vaes[0][key], vaes[1][key]) for key in make_vae().state_dict())


def test_weights_in_half_precision_are_read_as_float32(sd, tmp_path):
    shutil.copytree(sd, tmp_path / "model")
    for file in (UNET, TEXT):
        change_weights(file, lambda w: {k: v.half() for k, v in w.items()})(tmp_path / "model")
    change_json("text_encoder/config.json", dtype="float16", torch_dtype="float16")(
        tmp_path / "model"
    )
    model = load_model(tmp_path / "model", device="cpu", classes=CLASSES)
    parts = (model.unet, model.text.towers[0].encoder)
    assert {p.dtype for part in parts for p in part.parameters()} == {torch.float32}
    torch.testing.assert_close(losses(tmp_path / "model"), losses(sd), rtol=0.02, atol=0)


def test_pickled_weights_on_request(sd, tmp_path):
    shutil.copytree(sd, tmp_path / "model")
    pickle_text(tmp_path / "model")
    torch.testing.assert_close(losses(tmp_path / "model", allow_pickle=True), losses(sd))


class _Touch:
    """Makes a folder when it is unpickled without restrictions."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.mkdir, (self.path,)


def test_code_in_a_pickle_is_not_run(sd, tmp_path):
    shutil.copytree(sd, tmp_path / "model")
    pickle_text(tmp_path / "model")
    torch.save(
        {"weight": _Touch(tmp_path / "run")},
        tmp_path / "model" / "text_encoder" / "pytorch_model.bin",
    )
    with pytest.raises(ModelError, match="text_encoder cannot be loaded as CLIPTextModel"):
        losses(tmp_path / "model", allow_pickle=True)
    assert not (tmp_path / "run").exists()
