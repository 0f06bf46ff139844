"""Stable Diffusion 3 as classifier: the network is asked what diffusers' pipeline asks it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from feature_checks import check_features, flow, second
from flow_families import check_answers, check_precisions, check_refused
from pipelines import check_gradient, intercept, save
from tiny_sd3 import make_sd3

from dive_fast import DiffusionClassifier
from dive_fast.core.condition import ConditionParts
from dive_fast.core.schedule import Schedule
from dive_fast.models import load_model
from dive_fast.models.transformers.sd3 import StableDiffusion3
from dive_fast.strategies import resolve_strategy

CLASSES = ["cat", "dog"]
PROMPTS = ["a photo of a cat.", "a photo of a dog."]


def read_sd3(directory: Path) -> StableDiffusion3Pipeline:
    """As it is published without T5, it must be told so."""
    without = {} if (directory / "tokenizer_3").exists() else dict.fromkeys(
        ("text_encoder_3", "tokenizer_3")
    )  # fmt: skip
    return StableDiffusion3Pipeline.from_pretrained(directory, **without)


@pytest.fixture(scope="module", params=[True, False], ids=["t5", "no t5"])
def sd3(request, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sd3")
    return save(lambda: make_sd3(folder, t5=request.param), folder / "model")


def test_the_network_is_asked_what_the_pipeline_asks(sd3: Path) -> None:
    pipeline = read_sd3(sd3)
    model = load_model(sd3, classes=CLASSES)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    asked = intercept(
        pipeline, pipeline.transformer, prompt=PROMPTS, latents=latents, num_inference_steps=4,
        guidance_scale=1.0, height=16, width=16,
    )  # fmt: skip
    assert [float(call.given["timestep"][0]) for call in asked] == [1000, 667, 334, 1]
    for call in asked:
        t = call.given["timestep"].long() - 1
        found = model.predict(call.given["hidden_states"], t, model.vocabulary.table)
        torch.testing.assert_close(found, call.output, rtol=1e-5, atol=1e-5)
    assert (asked[0].output[0] - asked[0].output[1]).abs().max() > 1e-3  # the prompt is seen


def predict(
    pipeline: StableDiffusion3Pipeline, x_t: torch.Tensor, sigma: float, prompt: str
) -> torch.Tensor:
    sequence, _, pooled, _ = pipeline.encode_prompt(
        prompt, None, None, do_classifier_free_guidance=False
    )
    return pipeline.transformer(
        x_t, encoder_hidden_states=sequence, pooled_projections=pooled,
        timestep=torch.tensor([sigma * 1000]),
    ).sample  # fmt: skip


def test_losses_are_those_of_flow_matching(sd3: Path) -> None:
    """The training's loss, || eps - x0 - f ||^2, at x_t = (1 - sigma) x0 + sigma eps."""
    clf = DiffusionClassifier.from_pretrained(sd3, classes=CLASSES)
    pixels = np.random.default_rng(0).integers(0, 256, (1, 16, 16, 3), dtype=np.uint8)
    probes = clf.probe_list(resolve_strategy("enumerate", None, {}), 3)
    found = clf.losses(pixels, probes=probes)
    pipeline = read_sd3(sd3)
    images = torch.tensor(pixels).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        vae = pipeline.vae
        x0 = (vae.encode(images).latent_dist.mean - 0.06) * 1.5
        for k, t in enumerate(probes.timesteps.tolist()):
            sigma, eps = (t + 1) / 1000, probes.noise[probes.noise_index[k]][None]
            for c, prompt in enumerate(PROMPTS):
                predicted = predict(pipeline, (1 - sigma) * x0 + sigma * eps, sigma, prompt)
                expected = (eps - x0 - predicted).square().mean()
                torch.testing.assert_close(found[0, c, k], expected, rtol=1e-4, atol=1e-5)


def test_features_are_what_the_blocks_give(sd3: Path) -> None:
    pipeline = read_sd3(sd3)
    check_features(
        DiffusionClassifier.from_pretrained(sd3, classes=CLASSES),
        pipeline.transformer,
        lambda x_t, t, c: predict(pipeline, x_t, (t + 1) / 1000, PROMPTS[c]),
        flow,
        # The last block gives no prompt, and None in its place.
        {"transformer_blocks.0": second, "transformer_blocks.1": second},
    )


def test_the_gradient_is_that_of_finite_differences(sd3: Path) -> None:
    check_gradient(load_model(sd3, classes=CLASSES))


def test_it_answers(sd3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check_answers(sd3, tmp_path, capsys)


def test_other_precisions(sd3: Path) -> None:
    check_precisions(sd3)


@pytest.mark.parametrize("what", ["an epsilon schedule", "another network", "other latents"])
def test_refused(
    tmp_path_factory, tmp_path: Path, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path_factory.mktemp("sd3")
    directory = save(lambda: make_sd3(folder), folder / "model")
    check_refused(directory, tmp_path, what, capsys)


def test_the_published_configuration_on_the_meta_device() -> None:
    """Stable Diffusion 3.5 medium."""
    with torch.device("meta"):
        network = SD3Transformer2DModel(
            attention_head_dim=64, caption_projection_dim=1536, in_channels=16, out_channels=16,
            dual_attention_layers=tuple(range(13)), joint_attention_dim=4096, patch_size=2,
            num_attention_heads=24, num_layers=24, pooled_projection_dim=2048,
            pos_embed_max_size=384, qk_norm="rms_norm", sample_size=128,
        )  # fmt: skip
    StableDiffusion3.check_network(network, Path("sd3"))
    assert StableDiffusion3.latents(network) == (16, 128, 128)
    assert StableDiffusion3.widths(network) == {"sequence": 4096, "pooled": 2048}
    parts = ConditionParts({"sequence": (77 + 256, 4096), "pooled": (2048,)})
    assert parts.dim == 1_366_016
    model = StableDiffusion3.__new__(StableDiffusion3)
    model.network, model.schedule = network, Schedule.flow()
    x_t, t = torch.empty(1, 16, 128, 128, device="meta"), torch.zeros(1, dtype=torch.int64)
    found = model.run(x_t, t.to("meta"), parts.unpack(torch.empty(1, parts.dim, device="meta")))
    assert found.shape == (1, 16, 128, 128)
