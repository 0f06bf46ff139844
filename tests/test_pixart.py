"""PixArt-alpha and PixArt-Sigma as classifiers: the network is asked what diffusers asks it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from command import assert_refused, call
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
)
from feature_checks import check_features, diffusion, plain
from PIL import Image
from pipelines import (
    change_json,
    check_gradient,
    check_half_precision,
    intercept,
    make_t5,
    make_t5_tokenizer,
    save,
)
from tiny_pixart import make_network, make_pixart

from dive_fast import DiffusionClassifier
from dive_fast.errors import ModelError
from dive_fast.models import load_model
from dive_fast.models.transformers.masked import masked
from dive_fast.models.transformers.pixart import PixArtAlpha, PixArtSigma
from dive_fast.strategies import resolve_strategy

CLASSES = ["cat", "big dog"]
PROMPTS = ["a photo of a cat.", "a photo of a big dog."]
ALPHA, SIGMA = PixArtAlphaPipeline, PixArtSigmaPipeline
PIXELS = np.random.default_rng(0).integers(0, 256, (1, 16, 16, 3), dtype=np.uint8)


@pytest.fixture(scope="module", params=["alpha", "alpha 1024", "sigma"])
def pixart(request, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The second is told the image's size, as all with a sample_size of 128 are."""
    kind = SIGMA if request.param == "sigma" else ALPHA
    sizes = {"sample_size": 128, "patch_size": 32} if "1024" in request.param else {}
    return save(lambda: make_pixart(kind, **sizes), tmp_path_factory.mktemp("p") / "model")


@pytest.fixture(scope="module")
def alpha(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(lambda: make_pixart(ALPHA), tmp_path_factory.mktemp("p") / "model")


@pytest.fixture()
def copy(alpha: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(alpha, tmp_path / "model"))


def read(directory: Path):
    name = json.loads((directory / "model_index.json").read_text())["_class_name"]
    return {kind.__name__: kind for kind in (ALPHA, SIGMA)}[name].from_pretrained(directory)


def test_the_network_is_asked_what_the_pipeline_asks(pixart: Path) -> None:
    pipeline = read(pixart)
    model = load_model(pixart, classes=CLASSES)
    channels, side, _ = model.latent_shape
    latents = torch.randn(2, channels, side, side, generator=torch.Generator().manual_seed(0))
    asked = intercept(
        pipeline, pipeline.transformer, prompt=PROMPTS, latents=latents, num_inference_steps=4,
        guidance_scale=1.0, height=2 * side, width=2 * side, use_resolution_binning=False,
    )  # fmt: skip
    assert [int(call.given["timestep"][0]) for call in asked] == [999, 749, 500, 250]
    for call_ in asked:
        found = model.predict(
            call_.given["hidden_states"], call_.given["timestep"], model.vocabulary.table
        )
        torch.testing.assert_close(found, call_.output, rtol=1e-5, atol=1e-5)
    assert found.shape == (2, 8, side, side)
    assert (asked[0].output[0] - asked[0].output[1]).abs().max() > 1e-3  # the prompt is seen
    sizes = asked[0].given["added_cond_kwargs"]["resolution"]
    assert (sizes is not None) == model.network.use_additional_conditions == (side == 128)


def predict(pipeline, x_t: torch.Tensor, t: int, prompt: str) -> torch.Tensor:
    """eps of x_t [1, C, h, w]; of 256 pixels, where the network is told the size."""
    sizes = {"resolution": None, "aspect_ratio": None}
    if pipeline.transformer.use_additional_conditions:
        sizes = {"resolution": torch.tensor([[256.0, 256]]), "aspect_ratio": torch.ones(1, 1)}
    sequence, mask, _, _ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False)
    return pipeline.transformer(
        x_t, encoder_hidden_states=sequence, encoder_attention_mask=mask,
        timestep=torch.tensor([t]), added_cond_kwargs=sizes,
    ).sample.chunk(2, dim=1)[0]  # fmt: skip


def test_losses_are_those_of_the_published_training(pixart: Path) -> None:
    """|| eps - eps_theta ||^2 at x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps; no variances."""
    clf = DiffusionClassifier.from_pretrained(pixart, classes=CLASSES)
    side = clf.model.image_shape[1]
    pixels = np.random.default_rng(0).integers(0, 256, (1, side, side, 3), dtype=np.uint8)
    probes = clf.probe_list(resolve_strategy("enumerate", None, {}), 3)
    found = clf.losses(pixels, probes=probes)
    pipeline = read(pixart)
    images = torch.tensor(pixels).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        x0 = pipeline.vae.encode(images).latent_dist.mean * 0.18215
        for k, t in enumerate(probes.timesteps.tolist()):
            eps = probes.noise[probes.noise_index[k]][None]
            a, s = diffusion(t)
            x_t = a * x0 + s * eps
            for c, prompt in enumerate(PROMPTS):
                predicted = predict(pipeline, x_t, t, prompt)
                expected = (eps - predicted).square().mean()
                torch.testing.assert_close(found[0, c, k], expected, rtol=1e-4, atol=1e-5)


def test_features_are_what_the_blocks_give(pixart: Path) -> None:
    pipeline = read(pixart)
    check_features(
        DiffusionClassifier.from_pretrained(pixart, classes=CLASSES),
        pipeline.transformer,
        lambda x_t, t, c: predict(pipeline, x_t, t, PROMPTS[c]),
        diffusion,
        {"transformer_blocks.0": plain, "transformer_blocks.1": plain},
    )


def test_the_gradient_is_that_of_finite_differences(pixart: Path) -> None:
    check_gradient(load_model(pixart, classes=CLASSES))


def test_padding_is_neither_seen_nor_compared(alpha: Path) -> None:
    """The rest of T5's 120 tokens: 0 in the table, and nothing to the network."""
    model = load_model(alpha, classes=CLASSES)
    parts = model.text.parts.unpack(model.vocabulary.table)
    lengths = [len(make_t5_tokenizer()(prompt).input_ids) for prompt in PROMPTS]
    assert parts["mask"].sum(dim=1).tolist() == lengths and lengths[0] < lengths[1]
    assert parts["sequence"].shape == (2, 120, 16)
    padding = parts["mask"] == 0
    assert not parts["sequence"][padding].any()
    parts["sequence"] = parts["sequence"] + 100 * padding.unsqueeze(-1)
    x_t, t = torch.randn(2, 4, 8, 8), torch.tensor([10, 900])
    torch.testing.assert_close(
        model.predict(x_t, t, model.text.parts.pack(parts)),
        model.predict(x_t, t, model.vocabulary.table),
        rtol=0,
        atol=0,
    )


def test_without_any_token_all_is_seen_alike(alpha: Path) -> None:
    """Attention over a mask of zeros is even: nothing of the sequence may be left out."""
    model = load_model(alpha, classes=CLASSES)
    sequence, mask = torch.randn(1, 120, 16), torch.zeros(1, 120, dtype=torch.int64)
    x_t, t = torch.randn(1, 4, 8, 8), torch.tensor([10])
    with torch.no_grad():
        expected = model.network(
            x_t, encoder_hidden_states=sequence, encoder_attention_mask=mask, timestep=t,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ).sample  # fmt: skip
    row = model.text.parts.pack(masked(sequence, mask))
    torch.testing.assert_close(model.predict(x_t, t, row), expected, rtol=1e-5, atol=1e-6)


def test_of_a_mean_every_token_is_seen(alpha: Path) -> None:
    """Prompts of two lengths: the mask is that of the longer one."""
    model = load_model(alpha, classes={"animal": PROMPTS, "bird": "bird"})
    sequence, mask, _, _ = read(alpha).encode_prompt(PROMPTS, do_classifier_free_guidance=False)
    x_t, t = torch.randn(1, 4, 8, 8), torch.tensor([10])
    with torch.no_grad():
        expected = model.network(
            x_t, encoder_hidden_states=(sequence * mask[:, :, None]).mean(dim=0, keepdim=True),
            encoder_attention_mask=mask.amax(dim=0, keepdim=True), timestep=t,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ).sample  # fmt: skip
    found = model.predict(x_t, t, model.vocabulary.table[:1])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("told", [False, True], ids=["", "with sizes"])
def test_another_size_is_what_the_pipeline_makes_of_it(tmp_path: Path, told: bool) -> None:
    """The network's places are scaled, and its sizes are those of the images."""
    sizes = {"sample_size": 128, "patch_size": 32} if told else {}
    directory = save(lambda: make_pixart(ALPHA, **sizes), tmp_path / "model")
    side = 192 if told else 12
    (directory / "dive_fast.json").write_text(json.dumps({"size": 2 * side}))
    pipeline, model = read(directory), load_model(directory, classes=CLASSES)
    assert model.image_shape == (3, 2 * side, 2 * side)
    asked = intercept(
        pipeline, pipeline.transformer, prompt=PROMPTS, latents=torch.randn(2, 4, side, side),
        num_inference_steps=2, guidance_scale=1.0, height=2 * side, width=2 * side,
        use_resolution_binning=False,
    )[0]  # fmt: skip
    found = model.predict(
        asked.given["hidden_states"], asked.given["timestep"], model.vocabulary.table
    )
    torch.testing.assert_close(found, asked.output, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("strategy", ["auto", "enumerate", "invert"])
def test_it_answers(alpha: Path, strategy: str) -> None:
    clf = DiffusionClassifier.from_pretrained(alpha, classes=[*CLASSES, "bird"])
    answer = clf(PIXELS[0], strategy=strategy, probes=4)[0]
    assert answer.label in clf.names and answer.log_posterior.isfinite().any()


def test_half_precision_is_near_float32(alpha: Path) -> None:
    check_half_precision(alpha, PIXELS, CLASSES)


def test_the_published_form_of_the_network_is_read(copy: Path, alpha: Path) -> None:
    """PixArt-XL-2 is published under the class that diffusers has split since."""
    change_json(copy / "model_index.json", transformer=["diffusers", "Transformer2DModel"])
    legacy = {"num_vector_embeds": None, "use_linear_projection": False, "only_cross_attention": 0}
    change_json(copy / "transformer" / "config.json", _class_name="Transformer2DModel", **legacy)
    found, expected = (
        DiffusionClassifier.from_pretrained(d, classes=CLASSES).losses(PIXELS, probes=2)
        for d in (copy, alpha)
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("kind", "side", "scale", "told", "tokens"),
    [
        (PixArtAlpha, 128, 0.18215, True, 120),
        (PixArtAlpha, 64, 0.18215, False, 120),
        (PixArtSigma, 128, 0.13025, False, 300),
    ],
)
def test_published_configurations(
    kind: type[PixArtAlpha], side: int, scale: float, told: bool, tokens: int
) -> None:
    """PixArt-XL-2-1024-MS, PixArt-XL-2-512x512 and PixArt-Sigma-XL-2-1024-MS, without weights."""
    with torch.device("meta"):
        network = PixArtTransformer2DModel(
            activation_fn="gelu-approximate", attention_bias=True, attention_head_dim=72,
            caption_channels=4096, cross_attention_dim=1152, in_channels=4,
            norm_elementwise_affine=False, norm_eps=1e-6, norm_type="ada_norm_single",
            num_attention_heads=16, num_embeds_ada_norm=1000, num_layers=28, out_channels=8,
            patch_size=2, sample_size=side,
            use_additional_conditions=False if kind is PixArtSigma else None,
        )  # fmt: skip
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), latent_channels=4, scaling_factor=scale,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        )  # fmt: skip
    kind.check_network(network, Path("model"))
    assert kind.latents(network) == (4, side, side)
    assert network.use_additional_conditions == told
    tokenizer = make_t5_tokenizer()
    pipeline = {PixArtAlpha: ALPHA, PixArtSigma: SIGMA}[kind](
        tokenizer, make_t5(tokenizer, 4096), vae, network, None
    )
    parts = kind.encode_prompts(pipeline, ["a cat"], torch.device("cpu"))
    assert {name: tuple(part.shape) for name, part in parts.items()} == {
        "sequence": (1, tokens, 4096), "mask": (1, tokens)
    }  # fmt: skip
    model = object.__new__(kind)
    model.network, model.image_shape = network, (3, 8 * side, 8 * side)
    x_t = torch.empty(1, 4, side, side, device="meta")
    parts = {name: part.to("meta") for name, part in parts.items()}
    found = model.run(x_t, torch.zeros(1, dtype=torch.int64, device="meta"), parts)
    assert found.shape == (1, 8, side, side)


def test_the_command_line_classifies(alpha: Path, tmp_path: Path, capsys) -> None:
    Image.fromarray(PIXELS[0]).save(tmp_path / "photo.png")
    said = call(
        capsys, "classify", tmp_path / "photo.png", "--model", alpha, "--classes", "cat,dog",
        "--probes", 4,
    )  # fmt: skip
    assert said.code == 0 and ("cat" in said.out or "dog" in said.out), said


# -- what is refused --------------------------------------------------------------------------


def no_text_encoder(directory: Path) -> None:
    change_json(directory / "model_index.json", text_encoder=[None, None])


def no_text_folder(directory: Path) -> None:
    shutil.rmtree(directory / "text_encoder")


def no_tokenizer_files(directory: Path) -> None:
    for path in (directory / "tokenizer").iterdir():
        path.unlink()


def narrow_text(directory: Path) -> None:
    shutil.rmtree(directory / "text_encoder")
    make_t5(make_t5_tokenizer(), 8).save_pretrained(directory / "text_encoder")


def few_tokens(directory: Path) -> None:
    shutil.rmtree(directory / "text_encoder")
    make_t5(["a", "b"]).save_pretrained(directory / "text_encoder")


def other_network(directory: Path) -> None:
    change_json(directory / "model_index.json", transformer=["diffusers", "SanaTransformer2DModel"])


def other_text(directory: Path) -> None:
    change_json(directory / "model_index.json", text_encoder=["transformers", "T6EncoderModel"])


def flow_schedule(directory: Path) -> None:
    FlowMatchEulerDiscreteScheduler().save_pretrained(directory / "scheduler")


def uneven_patches(directory: Path) -> None:
    change_json(directory / "transformer" / "config.json", sample_size=9)


def other_norm(directory: Path) -> None:
    change_json(directory / "transformer" / "config.json", norm_type="ada_norm_zero")


def sizes_for_sigma(directory: Path) -> None:
    shutil.rmtree(directory / "transformer")
    make_network(128, 32).save_pretrained(directory / "transformer")
    change_json(directory / "model_index.json", _class_name="PixArtSigmaPipeline")


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (no_text_encoder, "expected text_encoder in .*, found none"),
        (no_text_folder, "expected the folder text_encoder in"),
        (no_tokenizer_files, "tokenizer"),
        (narrow_text, "takes the part 'sequence' of width 16, but its text encoders give 8"),
        (few_tokens, "has 66 tokens, but its text encoder knows 2"),
        (other_network, "to be a PixArtTransformer2DModel or Transformer2DModel, got 'Sana"),
        (other_text, "expected a class of transformers for text_encoder .*, got 'T6EncoderModel'"),
        (flow_schedule, "expected a schedule with the target 'epsilon' .*, got 'flow'"),
        (uneven_patches, "patch_size 2 divides, got 9"),
        (other_norm, "cannot be loaded as PixArtTransformer2DModel"),
        (sizes_for_sigma, "use_additional_conditions to be false"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_bad_directories_are_one_sentence(copy: Path, tmp_path: Path, capsys, break_it, message):
    break_it(copy)
    Image.fromarray(PIXELS[0]).save(tmp_path / "photo.png")
    said = call(capsys, "classify", tmp_path / "photo.png", "--model", copy, "--classes", "cat,dog")
    assert_refused(said, message)


def test_classes_that_the_tokenizer_takes_for_one_are_refused(alpha: Path) -> None:
    with pytest.raises(ModelError, match="'Cat' and 'cat' are the same to the model's tokenizers"):
        load_model(alpha, classes=["Cat", "dog", "cat"])
