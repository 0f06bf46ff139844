"""AuraFlow as classifier: the network is asked what diffusers' pipeline asks it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler
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
    make_vae,
)
from pipelines import check_gradient, intercept, make_t5_tokenizer, save
from transformers import UMT5Config, UMT5EncoderModel

from dive_fast import DiffusionClassifier
from dive_fast.core.condition import ConditionParts
from dive_fast.core.schedule import Schedule
from dive_fast.errors import ModelError
from dive_fast.models import load_model
from dive_fast.models.transformers.aura_flow import AuraFlow


def make_network(**changes: object) -> AuraFlowTransformer2DModel:
    options = dict(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_mmdit_layers=1,
        num_single_dit_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, caption_projection_dim=16, pos_embed_max_size=64,
    )  # fmt: skip
    return AuraFlowTransformer2DModel(**(options | changes)).eval()


def make_aura_flow() -> AuraFlowPipeline:
    tokenizer = make_t5_tokenizer()
    config = UMT5Config(
        vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2
    )
    text_encoder = UMT5EncoderModel(config).eval()
    with torch.no_grad():
        text_encoder.shared.weight.mul_(3)
    return AuraFlowPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=make_vae(shift=None),
        transformer=make_network(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


@pytest.fixture(scope="module")
def aura_flow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(make_aura_flow, tmp_path_factory.mktemp("aura_flow") / "model")


def test_the_network_is_asked_what_the_pipeline_asks(aura_flow: Path) -> None:
    pipeline = AuraFlowPipeline.from_pretrained(aura_flow)
    prompts = ["a photo of a cat.", "a photo of a beetle."]
    model = load_model(aura_flow, classes=["cat", "beetle"])
    assert model.latent_shape == (4, 8, 8)
    assert model.text.parts.shapes == {"sequence": (256, 16), "mask": (256,)}
    # "a photo of a" are 4 tokens, "cat." and "beetle." 4 and 7, and one ends the prompt.
    assert model.vocabulary.table[:, -256:].sum(dim=1).tolist() == [9, 12]
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    asked = intercept(
        pipeline, pipeline.transformer, prompt=prompts, latents=latents, guidance_scale=1.0,
        sigmas=[1.0, 0.5, 0.25], num_inference_steps=3, height=16, width=16,
    )  # fmt: skip
    # The scheduler's shift of 3 only chooses among the sigmas of the training.
    assert [float(call.given["timestep"][0]) for call in asked] == [1, 0.75, 0.5]
    for call in asked:
        t = (call.given["timestep"] * 1000).round().long() - 1
        found = model.predict(call.given["hidden_states"], t, model.vocabulary.table)
        torch.testing.assert_close(found, call.output, rtol=1e-5, atol=1e-5)
    assert (asked[1].output[0] - asked[1].output[1]).abs().max() > 1e-3  # the prompt is seen


def predict(
    pipeline: AuraFlowPipeline, x_t: torch.Tensor, sigma: float, prompt: str
) -> torch.Tensor:
    sequence, *_ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False)
    return pipeline.transformer(
        x_t, encoder_hidden_states=sequence, timestep=torch.tensor([sigma])
    ).sample


def test_losses_are_those_of_flow_matching(aura_flow: Path) -> None:
    check_losses(aura_flow, AuraFlowPipeline.from_pretrained(aura_flow), predict, shift=0)


def test_features_are_what_the_blocks_give(aura_flow: Path) -> None:
    pipeline = AuraFlowPipeline.from_pretrained(aura_flow)
    clf = DiffusionClassifier.from_pretrained(aura_flow, classes=CLASSES)
    check_features(
        clf,
        pipeline.transformer,
        lambda x_t, t, c: predict(pipeline, x_t, (t + 1) / 1000, PROMPTS[c]),
        flow,
        {
            "joint_transformer_blocks.0": second,
            # The registers and the prompt, then the image.
            "single_transformer_blocks.0": lambda output: output[:, -16:],
        },
    )


def test_the_gradient_is_that_of_finite_differences(aura_flow: Path) -> None:
    check_gradient(load_model(aura_flow, classes=CLASSES))


def test_what_is_behind_a_prompt_stays_zero(aura_flow: Path) -> None:
    """As the network was trained: no search moves padding."""
    model = load_model(aura_flow, classes=CLASSES)
    row = model.vocabulary.table[:1].clone().requires_grad_()
    x_t, t = torch.zeros(1, 4, 8, 8), torch.tensor([500])
    model.predict(x_t, t, row).square().mean().backward()
    sequence = row.grad[0, :-256].view(256, 16)
    assert (sequence[:9] != 0).any(dim=1).all() and (sequence[9:] == 0).all()
    assert (row.grad[0, -256:] == 0).all()


def test_it_answers(aura_flow: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check_answers(aura_flow, tmp_path, capsys)


def test_other_precisions(aura_flow: Path) -> None:
    check_precisions(aura_flow)


def test_other_sizes(aura_flow: Path, tmp_path: Path) -> None:
    check_size(aura_flow, tmp_path)


@pytest.mark.parametrize("what", [*DAMAGES])
def test_refused(
    aura_flow: Path, tmp_path: Path, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    check_refused(aura_flow, tmp_path, what, capsys)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"sample_size": 18}, "a multiple of 4 pixels, at most 32, .*, got 36"),
        ({"sample_size": 7}, "patch_size 2 divides, got 7"),
        ({"joint_attention_dim": 8}, "'sequence' of width 8, but its text encoders give 16"),
        ({"out_channels": 3}, "expected 4 or 8 output channels .*, got 3"),
    ],
)
def test_sizes_that_do_not_fit(
    aura_flow: Path, tmp_path: Path, changes: dict, message: str
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(aura_flow, broken)
    make_network(**changes).save_pretrained(broken / "transformer")
    with pytest.raises(ModelError, match=message):
        load_model(broken, classes=CLASSES)


def test_the_published_configuration_on_the_meta_device() -> None:
    """AuraFlow v0.3."""
    with torch.device("meta"):
        network = AuraFlowTransformer2DModel(
            sample_size=64, patch_size=2, in_channels=4, out_channels=4, num_mmdit_layers=4,
            num_single_dit_layers=32, attention_head_dim=256, num_attention_heads=12,
            joint_attention_dim=2048, caption_projection_dim=3072, pos_embed_max_size=9216,
        )  # fmt: skip
    assert AuraFlow.latents(network) == (4, 64, 64)
    assert AuraFlow.sides(network) == range(2, 193, 2)  # up to 1536 pixels
    parts = ConditionParts({"sequence": (256, 2048), "mask": (256,)}, AuraFlow.constants)
    assert parts.dim == 524_544
    model = AuraFlow.__new__(AuraFlow)
    model.network, model.schedule = network, Schedule.flow()
    x_t, t = torch.empty(1, 4, 64, 64, device="meta"), torch.zeros(1, dtype=torch.int64)
    found = model.run(x_t, t.to("meta"), parts.unpack(torch.empty(1, parts.dim, device="meta")))
    assert found.shape == (1, 4, 64, 64)
