"""Sana as classifier: the network is asked what diffusers' pipeline asks it."""

from __future__ import annotations

import inspect
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from command import assert_refused, call
from diffusers import (
    AutoencoderDC,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SanaPipeline,
    SanaTransformer2DModel,
)
from feature_checks import check_features, flow, plain
from PIL import Image
from pipelines import (
    change_json,
    check_gradient,
    check_half_precision,
    intercept,
    make_gemma,
    make_gemma_tokenizer,
    save,
)
from tiny_sd import make_vae

from dive_fast import DiffusionClassifier, Schedule
from dive_fast.models import load_model
from dive_fast.models.autoencoder import image_shape, latent_channels
from dive_fast.models.transformers.sana import Sana
from dive_fast.strategies import resolve_strategy

CLASSES = ["cat", "big dog"]
PROMPTS = ["a photo of a cat.", "a photo of a big dog."]
PIXELS = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), dtype=np.uint8)
INSTRUCTION = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"]


def make_autoencoder(channels: int = 4) -> AutoencoderDC:
    """RGB 32 x 32 to latents of 8 x 8."""
    return AutoencoderDC(
        latent_channels=channels, attention_head_dim=2, scaling_factor=1.5,
        encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(4, 8, 8), decoder_block_out_channels=(4, 8, 8),
        encoder_layers_per_block=(1, 1, 1), decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), (5,)), decoder_qkv_multiscales=((), (), (5,)),
    ).eval()  # fmt: skip


def make_network(**changes: object) -> SanaTransformer2DModel:
    """Weights scaled so that the prompt moves the result."""
    options = dict(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16,
        caption_channels=16, sample_size=8, patch_size=1,
    )  # fmt: skip
    network = SanaTransformer2DModel(**(options | changes)).eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "attn2" in name and parameter.ndim == 2:
                parameter.mul_(3)
    return network


def make_sana(scheduler: object, **network: object) -> SanaPipeline:
    tokenizer = make_gemma_tokenizer()
    return SanaPipeline(
        tokenizer, make_gemma(tokenizer), make_autoencoder(), make_network(**network), scheduler
    )


def dpm_solver() -> DPMSolverMultistepScheduler:
    """The published configuration."""
    return DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )


@pytest.fixture(scope="module")
def sana(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(lambda: make_sana(dpm_solver()), tmp_path_factory.mktemp("sana") / "model")


@pytest.fixture(scope="module")
def euler(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another scheduler, normalised queries and keys, and a time of another unit."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    return save(
        lambda: make_sana(scheduler, qk_norm="rms_norm_across_heads", timestep_scale=0.5),
        tmp_path_factory.mktemp("sana") / "model",
    )


@pytest.fixture()
def copy(sana: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sana, tmp_path / "model"))


@pytest.mark.parametrize(
    ("which", "times"), [("sana", [999, 899, 749, 499]), ("euler", [500, 333.5, 167, 0.5])]
)
def test_the_network_is_asked_what_the_pipeline_asks(which: str, times: list, request) -> None:
    directory = request.getfixturevalue(which)
    pipeline = SanaPipeline.from_pretrained(directory)
    model = load_model(directory, classes=CLASSES)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    asked = intercept(
        pipeline, pipeline.transformer, prompt=PROMPTS, latents=latents, num_inference_steps=4,
        guidance_scale=1.0, height=32, width=32, use_resolution_binning=False,
    )  # fmt: skip
    assert [float(call.given["timestep"][0]) for call in asked] == times
    for call_ in asked:
        t = (call_.given["timestep"] / pipeline.transformer.config.timestep_scale).long() - 1
        found = model.predict(call_.given["hidden_states"], t, model.vocabulary.table)
        torch.testing.assert_close(found, call_.output, rtol=1e-5, atol=1e-5)
    assert (asked[0].output[0] - asked[0].output[1]).abs().max() > 1e-3  # the prompt is seen


def test_no_condition_is_what_guidance_leaves_out(sana: Path) -> None:
    """The empty prompt without the instruction that is before every prompt."""
    pipeline = SanaPipeline.from_pretrained(sana)
    model = load_model(sana, classes=CLASSES)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    asked = intercept(
        pipeline, pipeline.transformer, prompt=PROMPTS[:1], latents=latents, guidance_scale=4.5,
        num_inference_steps=1, height=32, width=32, use_resolution_binning=False,
    )[0]  # fmt: skip
    rows = torch.stack([model.vocabulary.unconditional, model.vocabulary.table[0]])
    t = asked.given["timestep"].long() - 1
    found = model.predict(asked.given["hidden_states"], t, rows)
    torch.testing.assert_close(found, asked.output, rtol=1e-5, atol=1e-5)
    assert (rows[0] != model.text.encode([""], torch.device("cpu"))[0]).any()


def predict(pipeline: SanaPipeline, x_t: torch.Tensor, sigma: float, prompt: str) -> torch.Tensor:
    sequence, mask, _, _ = pipeline.encode_prompt(
        prompt, do_classifier_free_guidance=False, complex_human_instruction=INSTRUCTION.default
    )
    return pipeline.transformer(
        x_t, encoder_hidden_states=sequence, encoder_attention_mask=mask,
        timestep=torch.tensor([sigma * 1000]),
    ).sample  # fmt: skip


def test_losses_are_those_of_flow_matching(sana: Path) -> None:
    """The training's loss, || eps - x0 - f ||^2, at x_t = (1 - sigma) x0 + sigma eps."""
    clf = DiffusionClassifier.from_pretrained(sana, classes=CLASSES)
    probes = clf.probe_list(resolve_strategy("enumerate", None, {}), 3)
    found = clf.losses(PIXELS, probes=probes)
    pipeline = SanaPipeline.from_pretrained(sana)
    images = torch.tensor(PIXELS).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        x0 = pipeline.vae.encode(images).latent * 1.5
        for c, prompt in enumerate(PROMPTS):
            for k, t in enumerate(probes.timesteps.tolist()):
                sigma, eps = (t + 1) / 1000, probes.noise[probes.noise_index[k]][None]
                predicted = predict(pipeline, (1 - sigma) * x0 + sigma * eps, sigma, prompt)
                expected = (eps - x0 - predicted).square().mean()
                torch.testing.assert_close(found[0, c, k], expected, rtol=1e-4, atol=1e-5)


def test_features_are_what_the_blocks_give(sana: Path) -> None:
    pipeline = SanaPipeline.from_pretrained(sana)
    check_features(
        DiffusionClassifier.from_pretrained(sana, classes=CLASSES),
        pipeline.transformer,
        lambda x_t, t, c: predict(pipeline, x_t, (t + 1) / 1000, PROMPTS[c]),
        flow,
        {"transformer_blocks.0": plain, "transformer_blocks.1": plain},
    )


def test_the_gradient_is_that_of_finite_differences(sana: Path) -> None:
    check_gradient(load_model(sana, classes=CLASSES))


@pytest.mark.parametrize("strategy", ["auto", "enumerate", "invert"])
def test_it_answers(sana: Path, strategy: str) -> None:
    clf = DiffusionClassifier.from_pretrained(sana, classes=[*CLASSES, "bird"])
    answer = clf(PIXELS[0], strategy=strategy, probes=4)[0]
    assert answer.label in clf.names and answer.log_posterior.isfinite().any()


def test_half_precision_is_near_float32(sana: Path) -> None:
    check_half_precision(sana, PIXELS, CLASSES)


def test_the_published_configuration() -> None:
    """Sana_1600M_1024px and its autoencoder dc-ae-f32c32, without weights."""
    with torch.device("meta"):
        network = SanaTransformer2DModel(
            attention_bias=False, attention_head_dim=32, caption_channels=2304,
            cross_attention_dim=2240, cross_attention_head_dim=112, in_channels=32, mlp_ratio=2.5,
            norm_elementwise_affine=False, norm_eps=1e-6, num_attention_heads=70,
            num_cross_attention_heads=20, num_layers=20, out_channels=32, patch_size=1,
            sample_size=32,
        )  # fmt: skip
        vae = AutoencoderDC(
            attention_head_dim=32, in_channels=3, latent_channels=32, scaling_factor=0.41407,
            encoder_block_types=("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
            decoder_block_types=("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
            encoder_block_out_channels=(128, 256, 512, 512, 1024, 1024),
            encoder_layers_per_block=(2, 2, 2, 3, 3, 3),
            encoder_qkv_multiscales=((), (), (), (5,), (5,), (5,)),
            downsample_block_type="Conv", upsample_block_type="interpolate",
        )  # fmt: skip
        latent = vae.encode(torch.empty(1, 3, 1024, 1024)).latent
    Sana.check_network(network, Path("model"))
    assert Sana.latents(network) == (32, 32, 32) == tuple(latent.shape[1:])
    assert latent_channels(vae) == 32
    assert image_shape((32, 32, 32), vae) == (3, 1024, 1024)
    tokenizer = make_gemma_tokenizer()
    pipeline = SanaPipeline(tokenizer, make_gemma(tokenizer, 2304), vae, network, None)
    parts = Sana.encode_prompts(pipeline, ["a cat"], torch.device("cpu"))
    shapes = {name: tuple(part.shape) for name, part in parts.items()}
    assert shapes == {"sequence": (1, 300, 2304), "mask": (1, 300)}
    schedule = Schedule.flow()
    with torch.device("meta"):
        model = object.__new__(Sana)
        model.network, model.schedule = network, schedule
        found = model.run(
            torch.empty(1, 32, 32, 32), torch.zeros(1, dtype=torch.int64),
            {name: part.to("meta") for name, part in parts.items()},
        )  # fmt: skip
    assert found.shape == (1, 32, 32, 32)


def test_the_command_line_classifies(sana: Path, tmp_path: Path, capsys) -> None:
    Image.fromarray(PIXELS[0]).save(tmp_path / "photo.png")
    said = call(
        capsys, "classify", tmp_path / "photo.png", "--model", sana, "--classes", "cat,dog",
        "--probes", 4,
    )  # fmt: skip
    assert said.code == 0 and ("cat" in said.out or "dog" in said.out), said


# -- what is refused --------------------------------------------------------------------------


def sprint(directory: Path) -> None:
    shutil.rmtree(directory / "transformer")
    make_network(guidance_embeds=True).save_pretrained(directory / "transformer")


def no_text_encoder(directory: Path) -> None:
    change_json(directory / "model_index.json", text_encoder=[None, None])


def other_text(directory: Path) -> None:
    change_json(directory / "model_index.json", text_encoder=["transformers", "T5EncoderModel"])


def no_tokenizer_files(directory: Path) -> None:
    for path in (directory / "tokenizer").iterdir():
        path.unlink()


def narrow_text(directory: Path) -> None:
    make_gemma(make_gemma_tokenizer(), 8).save_pretrained(directory / "text_encoder")


def betas(directory: Path) -> None:
    DDIMScheduler().save_pretrained(directory / "scheduler")


def ordinary_vae(directory: Path) -> None:
    change_json(directory / "model_index.json", vae=["diffusers", "AutoencoderKL"])
    shutil.rmtree(directory / "vae")
    make_vae().save_pretrained(directory / "vae")


def other_channels(directory: Path) -> None:
    shutil.rmtree(directory / "vae")
    make_autoencoder(8).save_pretrained(directory / "vae")


def uneven_channels(directory: Path) -> None:
    shutil.rmtree(directory / "transformer")
    make_network(out_channels=6).save_pretrained(directory / "transformer")


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (sprint, "expected guidance_embeds to be false .* not supported"),
        (no_text_encoder, "expected text_encoder in .*, found none"),
        (other_text, "text_encoder do not fit its config.json: 20 missing keys"),
        (no_tokenizer_files, "tokenizer"),
        (narrow_text, "takes the part 'sequence' of width 16, but its text encoders give 8"),
        (betas, "expected a schedule with the target 'flow' for the Sana.*, got 'epsilon'"),
        (ordinary_vae, "expected vae in .* to be a AutoencoderDC, got 'AutoencoderKL'"),
        (other_channels, "takes 4 channels, but its VAE gives 8"),
        (uneven_channels, "expected 4 or 8 output channels of the transformer .*, got 6"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_bad_directories_are_one_sentence(copy: Path, tmp_path: Path, capsys, break_it, message):
    break_it(copy)
    Image.fromarray(PIXELS[0]).save(tmp_path / "photo.png")
    said = call(capsys, "classify", tmp_path / "photo.png", "--model", copy, "--classes", "cat,dog")
    assert_refused(said, message)
