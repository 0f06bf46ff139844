"""What the tests of several text-to-image transformers share; each writes out its own formulas."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import assert_refused, call
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from dive_fast import DiffusionClassifier
from dive_fast.errors import ModelError
from dive_fast.models import load_model
from dive_fast.strategies import resolve_strategy

CLASSES = ["cat", "dog"]
PROMPTS = ["a photo of a cat.", "a photo of a dog."]

# (pipeline, x_t, sigma, prompt) to the prediction of eps - x0, as the published training has it.
Predict = Callable[[Any, Tensor, float, str], Tensor]


def make_vae(channels: int = 4, shift: float | None = 0.06) -> AutoencoderKL:
    """RGB 16 x 16 to latents of 8 x 8."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=16,
        scaling_factor=1.5,
        shift_factor=shift,
    ).eval()


def make_pixels(seed: int = 0) -> np.ndarray:
    """uint8 [16, 16, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)


def edit(path: Path, **changes: Any) -> None:
    """Sets entries of a JSON object; the file may be missing."""
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | changes))


def check_losses(directory: Path, pipeline: Any, predict: Predict, shift: float = 0.06) -> None:
    """|| eps - x0 - f ||^2 at x_t = (1 - sigma) x0 + sigma eps, sigma = t / 1000."""
    clf = DiffusionClassifier.from_pretrained(directory, classes=CLASSES)
    pixels = make_pixels()[None]
    probes = clf.probe_list(resolve_strategy("enumerate", None, {}), 3)
    found = clf.losses(pixels, probes=probes)
    with torch.no_grad():
        images = torch.tensor(pixels).permute(0, 3, 1, 2) / 127.5 - 1
        x0 = (pipeline.vae.encode(images).latent_dist.mean - shift) * 1.5
        for k, t in enumerate(probes.timesteps.tolist()):
            sigma, eps = (t + 1) / 1000, probes.noise[probes.noise_index[k]][None]
            for c, prompt in enumerate(PROMPTS):
                predicted = predict(pipeline, (1 - sigma) * x0 + sigma * eps, sigma, prompt)
                expected = (eps - x0 - predicted).square().mean()
                torch.testing.assert_close(found[0, c, k], expected, rtol=1e-4, atol=1e-5)


def check_precisions(directory: Path, rtol: float = 0.05) -> None:
    """Losses in 16 bits are those of float32, but for rounding."""

    def losses(dtype: str) -> Tensor:
        clf = DiffusionClassifier.from_pretrained(directory, classes=CLASSES, dtype=dtype)
        probes = clf.probe_list(resolve_strategy("enumerate", None, {}), 3)
        return clf.losses(make_pixels()[None], probes=probes)

    expected = losses("float32")
    for dtype in ("bfloat16", "float16"):
        torch.testing.assert_close(losses(dtype), expected, rtol=rtol, atol=0)


def check_answers(directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every kind of strategy, and the command line."""
    clf = DiffusionClassifier.from_pretrained(directory, classes=[*CLASSES, "bird"])
    for strategy in ("auto", "enumerate", "invert"):
        answer = clf(make_pixels(), strategy=strategy, probes=4)[0]
        assert answer.label in clf.names and answer.log_posterior.isfinite().any()
    photo = tmp_path / "photo.png"
    Image.fromarray(make_pixels()).save(photo)
    said = call(
        capsys, "classify", photo, "--model", directory, "--classes", "cat,dog", "--probes", 4
    )
    assert said.code == 0 and ("cat" in said.out or "dog" in said.out), said


def check_size(directory: Path, tmp_path: Path) -> None:
    """``size`` in ``dive_fast.json`` is the side of the images."""
    small, large = load_model(directory, classes=CLASSES), tmp_path / "large"
    shutil.copytree(directory, large)
    edit(large / "dive_fast.json", size=24)
    clf = DiffusionClassifier.from_pretrained(large, classes=CLASSES)
    assert small.image_shape == (3, 16, 16) and clf.model.image_shape == (3, 24, 24)
    assert clf.model.latent_shape == (small.latent_shape[0], 12, 12)
    assert clf(make_pixels(), strategy="enumerate", probes=2)[0].log_posterior.isfinite().all()
    assert clf.model.identity() != small.identity()


def _schedule(directory: Path) -> None:
    path = directory / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({"_class_name": "DDPMScheduler", "prediction_type": "epsilon"}))


def _no_encoder(directory: Path) -> None:
    edit(directory / "model_index.json", text_encoder=[None, None])


def _no_tokenizer(directory: Path) -> None:
    index = json.loads((directory / "model_index.json").read_text())
    del index["tokenizer"]
    (directory / "model_index.json").write_text(json.dumps(index))


def _no_folder(directory: Path) -> None:
    shutil.rmtree(directory / "text_encoder")


def _empty_tokenizer(directory: Path) -> None:
    for path in (directory / "tokenizer").iterdir():
        path.unlink()


def _no_vocabulary(directory: Path) -> None:
    """The encoder has fewer embeddings than the tokenizer has tokens."""
    transformers = pytest.importorskip("transformers")
    index = json.loads((directory / "model_index.json").read_text())
    encoder = getattr(transformers, index["text_encoder"][1]).from_pretrained(
        directory / "text_encoder"
    )
    encoder.resize_token_embeddings(2)
    encoder.save_pretrained(directory / "text_encoder")


def _size(size: Any) -> Callable[[Path], None]:
    return lambda directory: edit(directory / "dive_fast.json", size=size)


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "an epsilon schedule": (_schedule, "expected a schedule with the target 'flow'.*'epsilon'"),
    "no text encoder": (_no_encoder, "expected text_encoder in .*, found none"),
    "no tokenizer": (_no_tokenizer, "expected tokenizer in .*, found none"),
    "an empty tokenizer": (
        _empty_tokenizer,
        "expected tokenizer.json, or .* in .*, found none",
    ),
    "no vocabulary": (_no_vocabulary, "tokens, but its text encoder knows 2"),
    "no folder": (_no_folder, "expected the folder text_encoder"),
    "another network": (
        lambda d: edit(d / "model_index.json", transformer=["diffusers", "DiTTransformer2DModel"]),
        "expected transformer in .* to be a .*, got 'DiTTransformer2DModel'",
    ),
    "other latents": (
        lambda d: make_vae(8).save_pretrained(d / "vae"),
        "takes 4 channels, but its VAE gives 8",
    ),
    "an odd size": (_size(18), "expected images of a multiple of 4 pixels, .*, got 18"),
    "no size": (_size("big"), "expected images of a multiple of 4 pixels, .*, got 'big'"),
    "a size of 0": (_size(0), "expected images of a multiple of 4 pixels, .*, got 0"),
    "a huge size": (_size(4 * 10**6), "at most .*, got 4000000"),
}


def check_refused(
    directory: Path, tmp_path: Path, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """One of ``DAMAGES`` is one sentence, in Python and on the command line."""
    damage, message = DAMAGES[what]
    broken = tmp_path / "broken"
    shutil.copytree(directory, broken)
    damage(broken)
    with pytest.raises(ModelError, match=message):
        load_model(broken, classes=CLASSES)
    photo = tmp_path / "photo.png"
    Image.fromarray(make_pixels()).save(photo)
    said = call(capsys, "classify", photo, "--model", broken, "--classes", "cat,dog")
    assert_refused(said, message)
