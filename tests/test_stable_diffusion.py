"""Stable Diffusion: the same numbers as the pipeline's own parts, and classification by prompts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers import UNet2DConditionModel as UNet
from tiny_sd import LENGTH, make_text_encoder, write_sd, write_sdxl, write_tokenizer
from transformers import CLIPTokenizer

from dive_fast import DiffusionClassifier
from dive_fast.core.probes import low_discrepancy_probes
from dive_fast.core.requests import Answer, Gradients
from dive_fast.core.schedule import Schedule
from dive_fast.engine import Engine, Job
from dive_fast.engine.objective import Objective
from dive_fast.models import load_model
from dive_fast.models.protocol import Model, StagedModel
from dive_fast.models.stable_diffusion import StagedStableDiffusion, check_unet
from dive_fast.models.text.prompts import ClassPrompts
from dive_fast.models.text.towers import PromptEncoder, TextTower

CLASSES = ("cat", "dog", "a zebra", "ship")
KINDS = ("sd", "v", "sdxl")


@pytest.fixture(scope="module")
def directories(sd, sdxl, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    v = write_sd(tmp_path_factory.mktemp("v"), target="v_prediction", euler=True, seed=1)
    return {"sd": sd, "v": v, "sdxl": sdxl}


def pictures(n: int = 2) -> torch.Tensor:
    return torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(3))


def inputs(model: Model, m: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    x_t = torch.randn(m, *model.latent_shape, generator=generator)
    return x_t, torch.tensor([3, 500, 999])[:m]


def reference(directory: Path, prompts: list[str]) -> tuple[torch.Tensor, dict, UNet]:
    """Embeddings, added conditions and UNet of the pipeline itself."""
    if directory.name != "sdxl":
        pipe = StableDiffusionPipeline.from_pretrained(directory)
        return pipe.encode_prompt(prompts, "cpu", 1, False)[0], {}, pipe.unet
    pipe = StableDiffusionXLPipeline.from_pretrained(directory, add_watermarker=False)
    text, _, pooled, _ = pipe.encode_prompt(
        prompts, device="cpu", do_classifier_free_guidance=False
    )
    ids = pipe._get_add_time_ids((16, 16), (0, 0), (16, 16), text.dtype, 10)
    added = {"text_embeds": pooled, "time_ids": ids.expand(len(prompts), -1)}
    return text, {"added_cond_kwargs": added}, pipe.unet


@pytest.mark.parametrize("kind", KINDS)
def test_vocabulary_and_prediction_are_the_pipelines(kind, directories):
    directory = directories[kind]
    model = load_model(directory, device="cpu", classes=CLASSES)
    assert isinstance(model, Model)
    text, added, unet = reference(directory, [f"a photo of a {name}." for name in CLASSES])
    table = model.vocabulary.table
    if kind == "sdxl":
        expected = torch.cat([text.flatten(1), added["added_cond_kwargs"]["text_embeds"]], dim=1)
        assert model.vocabulary.shape == (LENGTH * 28 + 10,)
    else:
        expected = text.flatten(1)
        assert model.vocabulary.shape == (LENGTH, 12)
    torch.testing.assert_close(table, expected, rtol=1e-5, atol=1e-6)

    x_t, t = inputs(model)
    rows = torch.tensor([2, 0, 3])
    if added:
        added = {"added_cond_kwargs": {k: v[rows] for k, v in added["added_cond_kwargs"].items()}}
    with torch.no_grad():
        expected = unet(x_t, t, encoder_hidden_states=text[rows], **added).sample
        found = model.predict(x_t, t, table[rows])
    assert found.std() > 0.05
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    # The prompt matters.
    with torch.no_grad():
        other = model.predict(x_t, t, table[[1, 1, 1]])
    assert (other - found).abs().max() > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_attributes(kind, directories):
    model = load_model(directories[kind], device="cpu", classes=CLASSES)
    assert model.latent_shape == (4, 8, 8) and model.image_shape == (3, 16, 16)
    assert model.schedule.target == ("v_prediction" if kind == "v" else "epsilon")
    assert model.schedule.a[-1] ** 2 == pytest.approx(0.0047, abs=1e-4)  # scaled_linear
    assert model.inverse_temperature == 128 and model.vocabulary.names == CLASSES
    identity = model.identity()
    assert identity["prompts"]["dog"] == ["a photo of a dog."]
    assert identity == load_model(directories[kind], device="cpu", classes=CLASSES).identity()
    model.set_classes(["cat", "dog"])
    assert model.identity() != identity


def test_latents_are_the_vaes(directories):
    clf = DiffusionClassifier.from_pretrained(directories["sd"], classes=CLASSES)
    vae = AutoencoderKL.from_pretrained(directories["sd"] / "vae")
    with torch.no_grad():
        expected = vae.encode(pictures() * 2 - 1).latent_dist.mean * vae.config.scaling_factor
    # Images pass through 8 bits on their way.
    torch.testing.assert_close(clf.encode(pictures()), expected, rtol=0, atol=0.02)


@pytest.mark.parametrize("zeros", [True, False])
def test_unconditional(zeros, directories, tmp_path):
    """The empty prompt, but zeros for an SDXL that was trained with them."""
    model = load_model(directories["sd"], device="cpu", classes=CLASSES)
    empty, _, _ = reference(directories["sd"], [""])
    torch.testing.assert_close(
        model.vocabulary.unconditional, empty.flatten(), rtol=1e-5, atol=1e-6
    )
    model = load_model(write_sdxl(tmp_path / "sdxl", zeros=zeros), device="cpu", classes=CLASSES)
    assert (model.vocabulary.unconditional == 0).all() == zeros


@pytest.mark.parametrize("strategy", ["enumerate", "race", "auto", "invert"])
@pytest.mark.parametrize("kind", KINDS)
def test_classification(kind, strategy, directories):
    """Every strategy runs, and what it measured is what enumeration measured."""
    clf = DiffusionClassifier.from_pretrained(directories[kind], classes=CLASSES, batch_size=50)
    full = clf(pictures(), strategy="enumerate", probes=24)
    for found, expected in zip(clf(pictures(), strategy=strategy, probes=24), full, strict=True):
        assert found.label in CLASSES and found.evaluations > 0
        if strategy != "invert":  # which ends in a local minimum on a network that means nothing
            assert found.index == expected.index
        complete = found.n_probes == 24
        assert strategy != "enumerate" or complete.all()
        torch.testing.assert_close(found.losses[complete], expected.losses[complete])


def test_published_inversion_runs_on_prompts(directories):
    clf = DiffusionClassifier.from_pretrained(directories["sd"], classes=CLASSES)
    (answer,) = clf(pictures(1), preset="dive-paper", loops=2, batch_size=5, probes=10)
    assert answer.evaluations == 2 * 3 * 10


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_against_finite_differences(kind, directories):
    model = load_model(directories[kind], device="cpu", classes=CLASSES)
    model.to(torch.device("cpu"), torch.float64)
    x_t, t = inputs(model, 2)
    v = model.vocabulary.mean().double().repeat(2, 1).requires_grad_()
    loss = model.predict(x_t, t, v).square().mean(dim=(1, 2, 3))
    (gradient,) = torch.autograd.grad(loss.sum(), v)
    assert gradient.abs().max() > 1e-5
    generator = torch.Generator().manual_seed(5)
    for _ in range(3):
        direction = torch.randn(v.shape, generator=generator, dtype=torch.float64)
        h = 1e-5
        with torch.no_grad():
            ends = [
                model.predict(x_t, t, v + s * h * direction).square().mean(dim=(1, 2, 3))
                for s in (1, -1)
            ]
        slope = (ends[0] - ends[1]) / (2 * h)
        torch.testing.assert_close((gradient * direction).sum(1), slope, rtol=1e-5, atol=1e-9)


def test_gradients_through_the_engine(directories):
    """The engine's gradient [D] is the one of the mean loss over the probes."""
    clf = DiffusionClassifier.from_pretrained(directories["sd"], classes=CLASSES, batch_size=4)
    model = clf.model
    x0 = clf.encode(pictures(1))[0]
    probes = low_discrepancy_probes(6, 1000, model.latent_shape, seed=0)
    got = []

    def search():
        got.append((yield Gradients(model.vocabulary.mean()[None], torch.arange(6))))
        return Answer(0, torch.zeros(4), torch.ones(4))

    list(Engine(model, 4).run([Job(0, x0, search())], probes, Objective()))
    v = model.vocabulary.mean().requires_grad_()
    total = 0
    for k in range(6):
        t = probes.timesteps[k : k + 1]
        a, s = model.schedule.a[t], model.schedule.s[t]
        noise = probes.noise[probes.noise_index[k]]
        error = model.predict((a * x0 + s * noise)[None], t, v[None])[0] - noise
        total = total + error.square().mean() / 6
    (expected,) = torch.autograd.grad(total, v)
    torch.testing.assert_close(got[0].gradients[0], expected, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stays_close(dtype, directories):
    full = DiffusionClassifier.from_pretrained(directories["sdxl"], classes=CLASSES)
    x0 = full.encode(pictures())
    half = DiffusionClassifier.from_pretrained(directories["sdxl"], classes=CLASSES, dtype=dtype)
    found, expected = (c.losses(latents=x0, probes=6) for c in (half, full))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.02)
    # The vocabulary is not rounded.
    assert torch.equal(half.model.vocabulary.table, full.model.vocabulary.table)


@pytest.mark.parametrize("kind", KINDS)
def test_stages_give_the_prediction(kind, directories):
    """Also where prefixes and projections are shared between rows."""
    model = load_model(directories[kind], device="cpu", classes=CLASSES)
    assert isinstance(model, StagedModel)
    model.to(torch.device("cpu"), torch.float64)
    x_t, t = inputs(model)
    v = model.vocabulary.table[[1, 3]].double().requires_grad_()
    image, condition = torch.tensor([0, 0, 1, 2, 2]), torch.tensor([0, 1, 1, 0, 1])
    expected = model.predict(x_t[image], t[image], v[condition])
    prefix = tuple(part[image] for part in model.prefix(x_t, t))
    projected = tuple(part[condition] for part in model.project(v))
    found = model.decoder(model.encoder(prefix, projected), projected)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    gradients = [torch.autograd.grad(p.square().sum(), v)[0] for p in (found, expected)]
    assert gradients[1].abs().max() > 1e-3
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
@pytest.mark.parametrize("average", ["embedding", "loss"])
def test_the_cache_changes_nothing(average, kind, directories):
    """Keys and values per class, prefixes per probe; also for classes of several prompts."""
    options = {"classes": CLASSES, "templates": ["a {}", "{}!"], "average": average}
    plain, cached = (
        DiffusionClassifier.from_pretrained(directories[kind], **options, cache=cache, batch_size=9)
        for cache in ("off", "exact")
    )
    x0 = plain.encode(pictures())
    expected = plain(latents=x0, strategy="enumerate", probes=8)
    found = cached(latents=x0, strategy="enumerate", probes=8)
    assert cached.last_run.cache_hits > 0
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.losses, b.losses, rtol=1e-4, atol=1e-6)
        assert a.evaluations == b.evaluations
    # Other classes are not taken for the ones before.
    for clf in (plain, cached):
        clf.model.set_classes(["fox", "owl"])
    found, expected = (
        c(latents=x0, strategy="enumerate", probes=8)[0].losses for c in (cached, plain)
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def big_text(widths: list[int], tmp_path: Path) -> PromptEncoder:
    """Text encoders of real width and length, cut to one layer and few tokens."""
    folder = write_tokenizer(tmp_path / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=77)
    towers = []
    for i, width in enumerate(widths):
        projection = width if i else None
        encoder = make_text_encoder(
            tokenizer, projection=projection, width=width, length=77, layers=1
        )
        towers.append(TextTower(tokenizer, encoder, 77))
    return PromptEncoder(towers)


BIG = {
    "1.5": (dict(cross_attention_dim=768), 64, [768], 859_520_964),
    "2.1": (
        dict(
            cross_attention_dim=1024,
            attention_head_dim=(5, 10, 20, 20),
            use_linear_projection=True,
        ),
        96,
        [1024],
        865_910_724,
    ),
    "xl": (
        dict(
            cross_attention_dim=2048,
            attention_head_dim=(5, 10, 20),
            use_linear_projection=True,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        ),
        128,
        [768, 1280],
        2_567_463_684,
    ),
}


@pytest.mark.parametrize("version", BIG)
def test_published_configurations(version, tmp_path):
    """Shapes of the real networks, without their weights (the meta device)."""
    config, size, widths, parameters = BIG[version]
    with torch.device("meta"):
        unet = UNet(sample_size=size, **config).requires_grad_(False)
    assert sum(p.numel() for p in unet.parameters()) == parameters
    text = big_text(widths, tmp_path)
    check_unet(unet, text, tmp_path)
    blocks = 4
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=(8,) * blocks,
        latent_channels=4,
        norm_num_groups=4,
    )
    schedule = Schedule.from_config({"beta_schedule": "scaled_linear"})
    model = StagedStableDiffusion(unet, vae, schedule, text, ClassPrompts.make(["cat", "dog"]))
    assert model.latent_shape == (4, size, size) and model.image_shape == (3, 8 * size, 8 * size)
    dim = 77 * sum(widths) + (1280 if version == "xl" else 0)
    assert model.vocabulary.dim == dim
    rows = torch.empty(2, dim, device="meta")
    x_t = torch.empty(2, 4, size, size, device="meta")
    t = torch.zeros(2, dtype=torch.int64, device="meta")
    assert model.predict(x_t, t, rows).shape == (2, 4, size, size)
    projected = model.project(rows)
    encoded = model.encoder(model.prefix(x_t, t), projected)
    assert model.decoder(encoded, projected).shape == (2, 4, size, size)
