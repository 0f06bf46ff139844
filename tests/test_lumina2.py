"""Lumina-Image 2.0 as classifier: the network is asked what diffusers' pipeline asks it."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from command import assert_refused, call
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
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
from tiny_sd import make_vae as make_plain_vae

from dive_fast import DiffusionClassifier, DiveFastError
from dive_fast.models import load_model
from dive_fast.models.autoencoder import image_shape, latent_channels
from dive_fast.models.transformers.lumina2 import Lumina2
from dive_fast.strategies import resolve_strategy

CLASSES = ["cat", "big dog"]
PROMPTS = ["a photo of a cat.", "a photo of a big dog."]
PIXELS = np.random.default_rng(0).integers(0, 256, (1, 16, 16, 3), dtype=np.uint8)


def make_network(**changes: object) -> Lumina2Transformer2DModel:
    """Weights scaled so that the prompt moves the result."""
    options = dict(
        sample_size=8, patch_size=2, in_channels=4, hidden_size=24, num_layers=2,
        num_refiner_layers=1, num_attention_heads=2, num_kv_heads=1, multiple_of=8,
        axes_dim_rope=(4, 4, 4), axes_lens=(300, 8, 8), cap_feat_dim=16,
    )  # fmt: skip
    network = Lumina2Transformer2DModel(**(options | changes)).eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.ndim == 2 and not name.startswith("norm_out"):
                parameter.mul_(2)
    return network


def make_vae(channels: int = 4) -> AutoencoderKL:
    """Shifted and scaled."""
    vae = make_plain_vae()
    vae.register_to_config(scaling_factor=1.5, shift_factor=0.06, latent_channels=channels)
    return vae


def make_lumina() -> Lumina2Pipeline:
    tokenizer = make_gemma_tokenizer()
    return Lumina2Pipeline(
        make_network(),
        FlowMatchEulerDiscreteScheduler(shift=1.0),
        make_vae(),
        make_gemma(tokenizer),
        tokenizer,
    )


@pytest.fixture(scope="module")
def lumina(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(make_lumina, tmp_path_factory.mktemp("lumina") / "model")


@pytest.fixture()
def copy(lumina: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(lumina, tmp_path / "model"))


def ask(pipeline: Lumina2Pipeline, prompts: list[str], **call: object) -> list:
    """The pipeline counts eight pixels to a latent, whatever its VAE does."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(len(prompts), 4, 8, 8, generator=generator)
    return intercept(
        pipeline, pipeline.transformer, prompt=prompts, latents=latents, height=64, width=64, **call
    )


def test_the_network_is_asked_what_the_pipeline_asks(lumina: Path) -> None:
    """The network's time is 1 - sigma, and the pipeline takes the negative of what it gives."""
    pipeline = Lumina2Pipeline.from_pretrained(lumina)
    model = load_model(lumina, classes=CLASSES)
    asked = ask(pipeline, PROMPTS, num_inference_steps=4, guidance_scale=1.0)
    assert [float(call.given["timestep"][0]) for call in asked] == [0, 0.25, 0.5, 0.75]
    for call_ in asked:
        t = (1000 * (1 - call_.given["timestep"])).round().long() - 1
        found = model.predict(call_.given["hidden_states"], t, model.vocabulary.table)
        torch.testing.assert_close(found, -call_.output, rtol=1e-5, atol=1e-5)
    assert (asked[0].output[0] - asked[0].output[1]).abs().max() > 1e-3  # the prompt is seen


def test_no_condition_is_what_guidance_leaves_out(lumina: Path) -> None:
    """The empty prompt without the system prompt that is before every prompt."""
    pipeline = Lumina2Pipeline.from_pretrained(lumina)
    model = load_model(lumina, classes=CLASSES)
    _, nothing = ask(pipeline, PROMPTS[:1], num_inference_steps=1, guidance_scale=4.0)
    found = model.predict(
        nothing.given["hidden_states"], torch.tensor([999]), model.vocabulary.unconditional[None]
    )
    torch.testing.assert_close(found, -nothing.output, rtol=1e-5, atol=1e-5)
    assert int(nothing.given["encoder_attention_mask"].sum()) == 1


def predict(pipeline: Lumina2Pipeline, x: torch.Tensor, tau: float, prompt: str) -> torch.Tensor:
    sequence, mask, _, _ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False)
    return pipeline.transformer(
        x, encoder_hidden_states=sequence, encoder_attention_mask=mask, timestep=torch.tensor([tau])
    ).sample


def test_losses_are_those_of_flow_matching(lumina: Path) -> None:
    """The training's loss || x0 - eps - f(x, tau) ||^2 at x = tau x0 + (1 - tau) eps."""
    clf = DiffusionClassifier.from_pretrained(lumina, classes=CLASSES)
    probes = clf.probe_list(resolve_strategy("enumerate", None, {}), 3)
    found = clf.losses(PIXELS, probes=probes)
    pipeline = Lumina2Pipeline.from_pretrained(lumina)
    images = torch.tensor(PIXELS).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        x0 = (pipeline.vae.encode(images).latent_dist.mean - 0.06) * 1.5
        for c, prompt in enumerate(PROMPTS):
            for k, t in enumerate(probes.timesteps.tolist()):
                tau, eps = 1 - (t + 1) / 1000, probes.noise[probes.noise_index[k]][None]
                predicted = predict(pipeline, tau * x0 + (1 - tau) * eps, tau, prompt)
                expected = (x0 - eps - predicted).square().mean()
                torch.testing.assert_close(found[0, c, k], expected, rtol=1e-4, atol=1e-5)


def test_a_prompt_does_not_depend_on_those_beside_it(lumina: Path) -> None:
    """The network cuts sequences to the tokens of the batch, also those of a mean."""
    model = load_model(lumina, classes=CLASSES)
    rows = torch.cat([model.vocabulary.table, model.vocabulary.mean()[None]])
    x_t, t = torch.randn(1, 4, 8, 8).expand(3, -1, -1, -1), torch.tensor([10, 500, 900])
    alone = torch.cat([model.predict(x_t[i : i + 1], t[i : i + 1], rows[[i]]) for i in range(3)])
    torch.testing.assert_close(model.predict(x_t, t, rows), alone, rtol=1e-5, atol=1e-5)


def test_features_are_what_the_blocks_give(lumina: Path) -> None:
    pipeline = Lumina2Pipeline.from_pretrained(lumina)
    joint = lambda output: output[:, -16:]  # noqa: E731 - alone, a row has no padding
    check_features(
        DiffusionClassifier.from_pretrained(lumina, classes=CLASSES),
        pipeline.transformer,
        lambda x_t, t, c: predict(pipeline, x_t, 1 - (t + 1) / 1000, PROMPTS[c]),
        flow,
        {"noise_refiner.0": plain, "layers.0": joint, "layers.1": joint},
    )


def test_blocks_that_see_the_prompt_alone_are_no_layers(lumina: Path) -> None:
    clf = DiffusionClassifier.from_pretrained(lumina, classes=CLASSES)
    with pytest.raises(DiveFastError, match="expected a layer of .* got 'context_refiner.0'"):
        clf.features(latents=torch.zeros(1, 4, 8, 8), layer="context_refiner.0")


def test_the_gradient_is_that_of_finite_differences(lumina: Path) -> None:
    check_gradient(load_model(lumina, classes=CLASSES))


@pytest.mark.parametrize("strategy", ["auto", "enumerate", "invert"])
def test_it_answers(lumina: Path, strategy: str) -> None:
    clf = DiffusionClassifier.from_pretrained(lumina, classes=[*CLASSES, "bird"])
    answer = clf(PIXELS[0], strategy=strategy, probes=4)[0]
    assert answer.label in clf.names and answer.log_posterior.isfinite().any()


def test_half_precision_is_near_float32(lumina: Path) -> None:
    check_half_precision(lumina, PIXELS, CLASSES)


def test_the_older_name_of_the_pipeline_is_read(copy: Path, lumina: Path) -> None:
    change_json(copy / "model_index.json", _class_name="Lumina2Text2ImgPipeline")
    found, expected = (
        DiffusionClassifier.from_pretrained(d, classes=CLASSES).losses(PIXELS, probes=2)
        for d in (copy, lumina)
    )
    assert torch.equal(found, expected)


def test_the_published_configuration() -> None:
    """Lumina-Image-2.0 and FLUX.1's VAE, without weights."""
    with torch.device("meta"):
        network = Lumina2Transformer2DModel(
            axes_dim_rope=(32, 32, 32), axes_lens=(300, 512, 512), cap_feat_dim=2304,
            hidden_size=2304, in_channels=16, multiple_of=256, norm_eps=1e-5,
            num_attention_heads=24, num_kv_heads=8, num_layers=26, num_refiner_layers=2,
            patch_size=2, sample_size=128, scaling_factor=1.0,
        )  # fmt: skip
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), latent_channels=16, scaling_factor=0.3611,
            shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        )  # fmt: skip
    Lumina2.check_network(network, Path("model"))
    assert Lumina2.latents(network) == (16, 128, 128)
    assert latent_channels(vae) == 16
    assert image_shape((16, 128, 128), vae) == (3, 1024, 1024)
    tokenizer = make_gemma_tokenizer()
    pipeline = Lumina2Pipeline(network, None, vae, make_gemma(tokenizer, 2304), tokenizer)
    parts = Lumina2.encode_prompts(pipeline, ["a cat"], torch.device("cpu"))
    shapes = {name: tuple(part.shape) for name, part in parts.items()}
    assert shapes == {"sequence": (1, 256, 2304), "mask": (1, 256)}


def test_the_command_line_classifies(lumina: Path, tmp_path: Path, capsys) -> None:
    Image.fromarray(PIXELS[0]).save(tmp_path / "photo.png")
    said = call(
        capsys, "classify", tmp_path / "photo.png", "--model", lumina, "--classes", "cat,dog",
        "--probes", 4,
    )  # fmt: skip
    assert said.code == 0 and ("cat" in said.out or "dog" in said.out), said


# -- what is refused --------------------------------------------------------------------------


def replace_network(directory: Path, **changes: object) -> None:
    shutil.rmtree(directory / "transformer")
    make_network(**changes).save_pretrained(directory / "transformer")


def short_axes(directory: Path) -> None:
    replace_network(directory, axes_lens=(256, 8, 8))


def small_axes(directory: Path) -> None:
    replace_network(directory, axes_lens=(300, 8, 3))


def uneven_patches(directory: Path) -> None:
    replace_network(directory, sample_size=9)


def other_text_width(directory: Path) -> None:
    replace_network(directory, cap_feat_dim=24)


def no_side(directory: Path) -> None:
    replace_network(directory, sample_size=None)


def betas(directory: Path) -> None:
    DDIMScheduler().save_pretrained(directory / "scheduler")


def no_text_encoder(directory: Path) -> None:
    change_json(directory / "model_index.json", text_encoder=[None, None])


def no_tokenizer(directory: Path) -> None:
    shutil.rmtree(directory / "tokenizer")


def other_network(directory: Path) -> None:
    index = directory / "model_index.json"
    change_json(index, transformer=["diffusers", "LuminaNextDiT2DModel"])


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (short_axes, "axes_lens of .* begin above the 256 tokens of a prompt, got 256"),
        (small_axes, "a multiple of 4 pixels, at most 12, .*, got 16"),
        (uneven_patches, "patch_size 2 divides, got 9"),
        (no_side, "expected the transformer in .* to state one sample_size .*, got None"),
        (other_text_width, "takes the part 'sequence' of width 24, but its text encoders give 16"),
        (betas, "expected a schedule with the target 'flow' for the Lumina2.*, got 'epsilon'"),
        (no_text_encoder, "expected text_encoder in .*, found none"),
        (no_tokenizer, "expected the folder tokenizer in"),
        (other_network, "to be a Lumina2Transformer2DModel, got 'LuminaNextDiT2DModel'"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_bad_directories_are_one_sentence(copy: Path, tmp_path: Path, capsys, break_it, message):
    break_it(copy)
    Image.fromarray(PIXELS[0]).save(tmp_path / "photo.png")
    said = call(capsys, "classify", tmp_path / "photo.png", "--model", copy, "--classes", "cat,dog")
    assert_refused(said, message)
