"""Stable Diffusion directories whose UNet cannot be cut in parts: it runs whole."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from command import assert_refused, call
from diffusers import UNet2DConditionModel
from PIL import Image
from tiny_sd import make_unet, write_sd, write_sdxl

from dive_fast import DiffusionClassifier, DiveFastError
from dive_fast.models.protocol import Model, StagedModel

CLASSES = ["cat", "dog", "fox", "owl"]
LAYOUTS = {
    "mid block without attention": {"mid_block_type": "UNetMidBlock2D"},
    "blocks of another kind": {
        "down_block_types": ("SimpleCrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "SimpleCrossAttnUpBlock2D"),
    },
    "attention in the mid block alone": {
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
    },
    "no self-attention": {"only_cross_attention": True},
    "text projected": {"encoder_hid_dim": 12, "cross_attention_dim": 20},
}


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One model per layout, and an SDXL."""
    found = {}
    for layout, changes in LAYOUTS.items():
        torch.manual_seed(0)
        found[layout] = write_sd(tmp_path_factory.mktemp("sd"))
        make_unet(12, **{"attention_head_dim": 4, **changes}).save_pretrained(
            found[layout] / "unet"
        )
    found["sdxl"] = write_sdxl(tmp_path_factory.mktemp("sdxl"))
    make_unet(28, added=10, mid_block_type="UNetMidBlock2D").save_pretrained(found["sdxl"] / "unet")
    return found


def latents(n: int = 2) -> torch.Tensor:
    return torch.randn(n, 4, 8, 8, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("layout", [*LAYOUTS, "sdxl"])
def test_the_network_as_it_is(layout, directories):
    directory = directories[layout]
    clf = DiffusionClassifier.from_pretrained(directory, device="cpu", classes=CLASSES)
    model = clf.model
    assert isinstance(model, Model) and not isinstance(model, StagedModel)
    unet = UNet2DConditionModel.from_pretrained(directory / "unet").eval()
    x_t, t, rows = latents(3), torch.tensor([3, 500, 999]), model.vocabulary.table[[0, 3, 1]]
    n = math.prod(model.text.shape)
    added = None
    if layout == "sdxl":
        ids = torch.tensor([16, 16, 0, 0, 16, 16]).expand(3, -1)
        added = {"text_embeds": rows[:, n:], "time_ids": ids}
    text = rows[:, :n].unflatten(1, model.text.shape)
    with torch.no_grad():
        expected = unet(x_t, t, encoder_hidden_states=text, added_cond_kwargs=added).sample
        torch.testing.assert_close(model.predict(x_t, t, rows), expected)


@pytest.mark.parametrize("strategy", ["enumerate", "race", "invert", "auto"])
@pytest.mark.parametrize("layout", ["mid block without attention", "sdxl"])
def test_strategies(layout, strategy, directories):
    clf = DiffusionClassifier.from_pretrained(directories[layout], classes=CLASSES)
    means = clf.losses(latents=latents(), probes=24).mean(dim=2)
    assert (means.sort().values.diff() > 1e-6).all(), "equal classes would prove nothing"
    answers = clf(latents=latents(), strategy=strategy, probes=24)
    assert clf.last_run.cache_hits == clf.last_run.cache_bytes == 0
    for answer, expected in zip(answers, means, strict=True):
        complete = answer.n_probes == 24
        torch.testing.assert_close(answer.losses[complete], expected[complete])
        assert strategy == "invert" or answer.index == int(expected.argmin())


@pytest.mark.parametrize("cache", ["exact", "encoder"])
def test_a_cache_needs_parts(cache, directories, tmp_path, capsys):
    directory = directories["mid block without attention"]
    said = f"expected cache 'off' for .*, which does not come in parts, got '{cache}'"
    with pytest.raises(DiveFastError, match=said):
        DiffusionClassifier.from_pretrained(directory, classes=CLASSES, cache=cache)
    Image.new("RGB", (16, 16)).save(tmp_path / "image.png")
    arguments = ("--model", directory, "--classes", "cat,dog", "--cache", cache)
    assert_refused(call(capsys, "classify", tmp_path / "image.png", *arguments), said)
