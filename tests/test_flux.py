"""FLUX.1 as classifier: the network is asked what diffusers' pipeline asks it."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from feature_checks import check_features, flow, second
from flow_families import (
    CLASSES,
    DAMAGES,
    PROMPTS,
    check_answers,
    check_losses,
    check_precisions,
    check_refused,
    check_size,
    edit,
    make_vae,
)
from pipelines import check_gradient, intercept, make_t5, make_t5_tokenizer, save
from tiny_sd import make_text_encoder, write_tokenizer
from transformers import CLIPTokenizer

from dive_fast import DiffusionClassifier
from dive_fast.core.condition import ConditionParts
from dive_fast.core.schedule import Schedule
from dive_fast.errors import ModelError
from dive_fast.models import load_model
from dive_fast.models.transformers.flux import Flux


def make_network(**changes: object) -> FluxTransformer2DModel:
    options = dict(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=16, pooled_projection_dim=12,
        axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    return FluxTransformer2DModel(**(options | changes)).eval()


def make_flux(folder: Path, *, guidance: bool) -> FluxPipeline:
    tokenizer = CLIPTokenizer.from_pretrained(write_tokenizer(folder / "clip"))
    t5_tokenizer = make_t5_tokenizer()
    return FluxPipeline(
        transformer=make_network(guidance_embeds=guidance),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=make_vae(),
        text_encoder=make_text_encoder(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=make_t5(t5_tokenizer),
        tokenizer_2=t5_tokenizer,
    )


@pytest.fixture(scope="module", params=[True, False], ids=["dev", "schnell"])
def flux(request, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flux")
    directory = save(lambda: make_flux(folder, guidance=request.param), folder / "model")
    edit(directory / "dive_fast.json", size=16)
    return directory


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dev")
    directory = save(lambda: make_flux(folder, guidance=True), folder / "model")
    edit(directory / "dive_fast.json", size=16)
    return directory


def pack(x: torch.Tensor) -> torch.Tensor:
    """[M, C, h, w] to tokens [M, h w / 4, 4 C]: squares of 2 x 2, channels first."""
    squares = torch.nn.functional.pixel_unshuffle(x, 2)  # the same order: channel, row, column
    return squares.flatten(2).transpose(1, 2)


def test_the_network_is_asked_what_the_pipeline_asks(flux: Path) -> None:
    pipeline = FluxPipeline.from_pretrained(flux)
    model = load_model(flux, classes=CLASSES)
    assert model.latent_shape == (4, 8, 8)
    assert model.text.parts.shapes == {"sequence": (512, 16), "pooled": (12,)}
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    asked = intercept(
        pipeline, pipeline.transformer, prompt=PROMPTS, latents=pack(latents),
        num_inference_steps=4, height=16, width=16,
    )  # fmt: skip
    assert [float(call.given["timestep"][0]) for call in asked] == [1, 0.75, 0.5, 0.25]
    torch.testing.assert_close(asked[0].given["hidden_states"], pack(latents))
    for call in asked:
        t = (call.given["timestep"] * 1000).round().long() - 1
        given = call.given["hidden_states"].transpose(1, 2).unflatten(2, (4, 4))
        x_t = torch.nn.functional.pixel_shuffle(given, 2)
        found = model.predict(x_t, t, model.vocabulary.table)
        torch.testing.assert_close(pack(found), call.output, rtol=1e-5, atol=1e-5)
    assert (asked[1].output[0] - asked[1].output[1]).abs().max() > 1e-4  # the prompt is seen


def predict(pipeline: FluxPipeline, x_t: torch.Tensor, sigma: float, prompt: str) -> torch.Tensor:
    """As train_dreambooth_lora_flux.py; its guidance_scale is 3.5 unless said."""
    sequence, pooled, text_ids = pipeline.encode_prompt(prompt, prompt)
    rows, columns = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")
    ids = torch.stack([torch.zeros(4, 4), rows, columns], dim=-1).view(16, 3)
    packed = pipeline.transformer(
        pack(x_t), timestep=torch.tensor([sigma]), encoder_hidden_states=sequence,
        pooled_projections=pooled, txt_ids=text_ids, img_ids=ids,
        guidance=torch.tensor([3.5]) if pipeline.transformer.config.guidance_embeds else None,
    ).sample  # fmt: skip
    return torch.nn.functional.pixel_shuffle(packed.transpose(1, 2).unflatten(2, (4, 4)), 2)


def test_losses_are_those_of_the_training(flux: Path) -> None:
    check_losses(flux, FluxPipeline.from_pretrained(flux), predict)


def test_features_are_what_the_blocks_give(flux: Path) -> None:
    pipeline = FluxPipeline.from_pretrained(flux)
    clf = DiffusionClassifier.from_pretrained(flux, classes=CLASSES)
    check_features(
        clf,
        pipeline.transformer,
        lambda x_t, t, c: predict(pipeline, x_t, (t + 1) / 1000, PROMPTS[c]),
        flow,
        {"transformer_blocks.0": second, "single_transformer_blocks.0": second},
    )


def test_the_gradient_is_that_of_finite_differences(flux: Path) -> None:
    check_gradient(load_model(flux, classes=CLASSES))


def test_it_answers(flux: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check_answers(flux, tmp_path, capsys)


def test_other_precisions(flux: Path) -> None:
    check_precisions(flux)


def test_other_sizes(dev: Path, tmp_path: Path) -> None:
    check_size(dev, tmp_path)


def test_the_guidance_may_be_stated(dev: Path, tmp_path: Path) -> None:
    told = tmp_path / "told"
    shutil.copytree(dev, told)
    edit(told / "dive_fast.json", guidance=1)
    models = [load_model(path, classes=CLASSES) for path in (dev, told)]
    assert [model.guidance for model in models] == [3.5, 1.0]
    assert models[0].identity() != models[1].identity()
    x_t, t = torch.zeros(1, 4, 8, 8), torch.tensor([500])
    found = [model.predict(x_t, t, model.vocabulary.table[:1]) for model in models]
    assert (found[0] - found[1]).abs().max() > 1e-5


@pytest.mark.parametrize("what", [*DAMAGES])
def test_refused(dev: Path, tmp_path: Path, what: str, capsys: pytest.CaptureFixture[str]) -> None:
    check_refused(dev, tmp_path, what, capsys)


@pytest.mark.parametrize("guidance", ["much", True, -1, None])
def test_a_guidance_that_is_none(dev: Path, tmp_path: Path, guidance: object) -> None:
    told = tmp_path / "told"
    shutil.copytree(dev, told)
    edit(told / "dive_fast.json", guidance=guidance)
    with pytest.raises(
        ModelError, match=f"guidance in .* must be a number from 0, got {guidance!r}"
    ):
        load_model(told, classes=CLASSES)


@pytest.mark.parametrize(
    "changes, message",
    [
        # FLUX.1 Canny and Depth take the latents of a control image beside the others.
        ({"in_channels": 32, "out_channels": 16}, "got 32 channels in and 16 out"),
        ({"in_channels": 18}, "got 18 channels in and 18 out"),
        ({"joint_attention_dim": 8}, "'sequence' of width 8, but its text encoders give 16"),
        ({"pooled_projection_dim": 8}, "'pooled' of width 8, but its text encoders give 12"),
    ],
    ids=["control", "odd", "sequence", "pooled"],
)
def test_networks_that_do_not_fit(dev: Path, tmp_path: Path, changes: dict, message: str) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(dev, broken)
    make_network(**changes).save_pretrained(broken / "transformer")
    with pytest.raises(ModelError, match=message):
        load_model(broken, classes=CLASSES)


def test_the_published_configuration_on_the_meta_device() -> None:
    with torch.device("meta"):
        network = FluxTransformer2DModel(
            patch_size=1, in_channels=64, num_layers=19, num_single_layers=38,
            attention_head_dim=128, num_attention_heads=24, joint_attention_dim=4096,
            pooled_projection_dim=768, guidance_embeds=True,
        )  # fmt: skip
    Flux.check_network(network, Path("flux"))
    assert Flux.latents(network) == (16, 128, 128)
    assert 128 in Flux.sides(network)
    parts = ConditionParts({"sequence": (512, 4096), "pooled": (768,)})
    assert parts.dim == 2_097_920
    model = Flux.__new__(Flux)
    model.network, model.schedule = network, Schedule.flow()
    model.text = SimpleNamespace(pipeline=FluxPipeline)
    x_t, t = torch.empty(1, 16, 128, 128, device="meta"), torch.zeros(1, dtype=torch.int64)
    found = model.run(x_t, t.to("meta"), parts.unpack(torch.empty(1, parts.dim, device="meta")))
    assert found.shape == (1, 16, 128, 128)
