"""UNets of class labels: diffusers' own forward, its schedulers' own outputs, losses by hand."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from command import call
from diffusers import (
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    LDMPipeline,
    UNet2DModel,
    VQModel,
)
from PIL import Image
from pipelines import check_gradient, intercept
from tiny import write_json
from tiny_class_unet import CLASSES, SIZE, WIDTH, make_conditional, make_unet, write

from dive_fast import DiffusionClassifier, ProbeList, Schedule
from dive_fast.core.convention import Convention
from dive_fast.models import load_model
from dive_fast.models.class_unet.model import ClassUNet

LABELS = torch.arange(CLASSES)
EXACT = {"rtol": 2e-5, "atol": 2e-6}
VECTORS = torch.linspace(-2, 2, CLASSES * WIDTH).sin().view(CLASSES, WIDTH)
TOKENS = torch.linspace(-9, 9, CLASSES * 12).sin().view(CLASSES, 12)  # two of width 6


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def noisy(m: int = CLASSES, seed: int = 0) -> torch.Tensor:
    return torch.randn(m, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def images(n: int = 1) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, SIZE, SIZE, 3), dtype=np.uint8)


def make_vq() -> VQModel:
    """RGB 16 x 16 to three channels of 8 x 8."""
    return VQModel(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), norm_num_groups=4, sample_size=16, num_vq_embeddings=8,
        scaling_factor=0.7,
    ).eval()  # fmt: skip


# How the network is made, what dive_fast.json says, and what diffusers is called with for labels.
NETWORKS = {
    "table": (make_unet, {}, lambda: {"class_labels": LABELS}),
    "scale and shift, learned variance": (
        partial(make_unet, resnet_time_scale_shift="scale_shift", out_channels=6), {},
        lambda: {"class_labels": LABELS},
    ),
    "timestep": (
        partial(make_unet, class_embed_type="timestep", num_class_embeds=None),
        {"classes": list("abcd")}, lambda: {"class_labels": LABELS},
    ),
    "identity": (
        partial(make_unet, class_embed_type="identity", num_class_embeds=None),
        {"embeddings": VECTORS.tolist()}, lambda: {"class_labels": VECTORS},
    ),
    "learned time": (
        partial(make_unet, time_embedding_type="learned", num_train_timesteps=1000), {},
        lambda: {"class_labels": LABELS},
    ),
    "conditional": (
        partial(make_conditional, num_class_embeds=CLASSES, class_embeddings_concat=True), {},
        lambda: {"class_labels": LABELS, "encoder_hidden_states": None},
    ),
    "projection": (
        partial(make_conditional, class_embed_type="simple_projection",
                projection_class_embeddings_input_dim=WIDTH),
        {"embeddings": VECTORS.tolist()},
        lambda: {"class_labels": VECTORS, "encoder_hidden_states": None},
    ),
    "attending": (
        partial(make_conditional, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D")),
        {"embeddings": TOKENS.tolist()},
        lambda: {"encoder_hidden_states": TOKENS.view(CLASSES, 2, 6)},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "extra", "given"), NETWORKS.values(), ids=list(NETWORKS))
def test_a_row_of_the_table_is_the_label(make, extra, given, tmp_path: Path) -> None:
    unet = make()
    write(DDPMPipeline(unet, DDPMScheduler()), tmp_path, **extra)
    model = load_model(tmp_path)
    t = torch.arange(CLASSES) * 300 + 7
    with torch.no_grad():
        expected = unet(noisy(), t, **given()).sample
        found = model.predict(noisy(), t, model.vocabulary.table)
        same = noisy(1).expand(CLASSES, -1, -1, -1)
        seen = model.predict(same, torch.full_like(t, 500), model.vocabulary.table)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert seen.std(dim=0).max() > 1e-2  # the class is seen
    assert len(model.vocabulary) == CLASSES
    check_gradient(model)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline = DDPMPipeline(make_unet(), DDPMScheduler(beta_schedule="squaredcos_cap_v2"))
    labels = {"id2label": dict(enumerate(["cat", "dog", "bird", "fish"]))}
    return write(pipeline, tmp_path_factory.mktemp("unet") / "model", labels)


def test_the_network_is_asked_what_the_pipeline_asks(directory: Path) -> None:
    """The pipeline itself knows no labels: the network is given them here."""
    pipeline, model = DDPMPipeline.from_pretrained(directory), load_model(directory)
    unet = pipeline.unet
    unet.forward = partial(unet.forward, class_labels=LABELS[1:3])
    asked = intercept(pipeline, unet, batch_size=2, num_inference_steps=3)
    assert [int(step.given["timestep"]) for step in asked] == [666, 333, 0]
    for step in asked:
        t = step.given["timestep"].expand(2)
        found = model.predict(step.given["sample"], t, model.vocabulary.table[1:3])
        torch.testing.assert_close(found, step.output, rtol=1e-5, atol=1e-5)


def test_a_consistency_model_is_its_pipeline_s(tmp_path: Path) -> None:
    """Input, time and the denoised image, at sigmas near both ends and between."""
    scheduler = CMStochasticIterativeScheduler(clip_denoised=False, sigma_min=0.05)
    pipeline = ConsistencyModelPipeline(make_unet(), scheduler)
    write(pipeline, tmp_path)
    model = load_model(tmp_path)
    assert model.convention.sigma_min == 0.05 and model.convention.predicts == "consistency"
    for k in (0, 20, 38):
        sigma = float(pipeline.scheduler._convert_to_karras(np.array([k / 39]))[0])
        x, r = noisy(2) * (1 + sigma), math.hypot(sigma, 0.5)
        seen: list[torch.Tensor] = []
        asked = intercept(
            pipeline, pipeline.unet, batch_size=2, class_labels=[1, 3], timesteps=[k],
            num_inference_steps=None, latents=x / 80, output_type="np",
            callback=lambda i, t, sample, seen=seen: seen.append(sample),
        )  # fmt: skip
        assert float(asked[0].given["timestep"]) == pytest.approx(250 * math.log(sigma), rel=1e-5)
        torch.testing.assert_close(asked[0].given["sample"], x / r, rtol=1e-5, atol=1e-5)
        a, s = 0.5 / r, sigma / r
        schedule = Schedule(torch.tensor([a]), torch.tensor([s]), "v_prediction", 0.5)
        model.convention = dataclasses.replace(model.convention, schedule=schedule)
        t = torch.zeros(2, dtype=torch.int64)
        v = model.predict(x / r, t, model.vocabulary.table[[1, 3]])
        denoised = 0.5 * (a * x / r - s * v)
        torch.testing.assert_close(denoised, seen[0], rtol=1e-4, atol=1e-4)


def sigma_of(t: int, sigma_min: float, sigma_max: float) -> torch.Tensor:
    """The quantile of log sigma ~ N(-1.2, 1.2^2) between the two."""
    density = torch.distributions.Normal(-1.2, 1.2)
    ends = torch.tensor([sigma_min, sigma_max], dtype=torch.float64).log()
    low, high = density.cdf(ends)
    return density.icdf(low + (high - low) * (t + 0.5) / 1000).exp().float()


def losses_of(clf: DiffusionClassifier, timesteps: list[int]):
    """The losses found [C, K], and what they are of: x0, eps [K] and timesteps."""
    generator = torch.Generator().manual_seed(1)
    shape = clf.model.latent_shape
    eps = torch.randn(len(timesteps), *shape, generator=generator)
    listed = ProbeList(torch.tensor(timesteps), eps, torch.arange(len(timesteps)))
    return clf.losses(images(), probes=listed)[0], eps


X0 = torch.tensor(images()).permute(0, 3, 1, 2) / 127.5 - 1


def test_losses_of_a_consistency_model_are_weighted_as_edm_s(tmp_path: Path) -> None:
    unet = make_unet()
    scheduler = CMStochasticIterativeScheduler(sigma_min=0.05, sigma_max=3.0)
    write(ConsistencyModelPipeline(unet, scheduler), tmp_path)
    found, eps = losses_of(DiffusionClassifier.from_pretrained(tmp_path), [0, 500, 999])
    for k, t in enumerate([0, 500, 999]):
        sigma = sigma_of(t, 0.05, 3.0)
        assert 0.05 < sigma < 3.0
        x = X0 + sigma * eps[[k]]
        skip, out = scheduler.get_scalings_for_boundary_condition(sigma)
        told = 1000 * 0.25 * torch.log(sigma + 1e-44)[None]
        for c in range(CLASSES):
            with torch.no_grad():
                raw = unet(x / (sigma**2 + 0.25) ** 0.5, told, torch.tensor([c])).sample
            weight = (sigma**2 + 0.25) / (sigma * 0.5) ** 2
            expected = weight * (skip * x + out * raw - X0).square().mean()
            torch.testing.assert_close(found[c, k], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_edm_is_its_scheduler_s(prediction: str, tmp_path: Path) -> None:
    scheduler = EDMEulerScheduler(sigma_data=0.7, prediction_type=prediction)
    unet = make_unet()
    write(DDPMPipeline(unet, scheduler), tmp_path)
    clf = DiffusionClassifier.from_pretrained(tmp_path)
    scheduler.set_timesteps(3)
    model, usual = clf.model, clf.model.convention
    for t in scheduler.timesteps[:2]:
        x = noisy(2) * (1 + scheduler.sigmas[0])
        given = scheduler.scale_model_input(x, t)
        with torch.no_grad():
            raw = unet(given, t, LABELS[:2]).sample
        sigma = scheduler.sigmas[scheduler.step_index]
        denoised = scheduler.step(raw, t, x).pred_original_sample
        r = (sigma**2 + 0.49) ** 0.5
        schedule = Schedule((0.7 / r)[None], (sigma / r)[None], "v_prediction", 0.7)
        model.convention = dataclasses.replace(usual, schedule=schedule)
        v = model.predict(given, torch.tensor([0, 0]), model.vocabulary.table[:2])
        torch.testing.assert_close(
            0.7 * (schedule.a * given - schedule.s * v), denoised, rtol=1e-4, atol=1e-4
        )
    model.convention = usual
    found, eps = losses_of(clf, [30, 700])
    for k, t in enumerate([30, 700]):  # lambda(sigma) || D(x0 + sigma eps) - x0 ||^2
        sigma = sigma_of(t, 0.002, 80.0)
        x = X0 + sigma * eps[[k]]
        with torch.no_grad():
            given = scheduler.precondition_inputs(x, sigma)
            raw = unet(given, scheduler.precondition_noise(sigma)[None], LABELS[1:2]).sample
        weight = (sigma**2 + 0.49) / (sigma * 0.7) ** 2
        denoised = scheduler.precondition_outputs(x, raw, sigma)
        expected = weight * (denoised - X0).square().mean()
        torch.testing.assert_close(found[1, k], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_losses_are_those_of_the_training(prediction: str, tmp_path: Path) -> None:
    scheduler, unet = DDIMScheduler(prediction_type=prediction), make_unet(out_channels=6)
    write(DDIMPipeline(unet, scheduler), tmp_path)
    found, eps = losses_of(DiffusionClassifier.from_pretrained(tmp_path), [3, 500])
    for k, t in enumerate([3, 500]):
        timestep = torch.tensor([t])
        x_t = scheduler.add_noise(X0, eps[[k]], timestep)
        target = {
            "epsilon": eps[[k]], "sample": X0,
            "v_prediction": scheduler.get_velocity(X0, eps[[k]], timestep)
            if prediction == "v_prediction" else None,
        }[prediction]  # fmt: skip
        for c in range(CLASSES):
            with torch.no_grad():
                predicted = unet(x_t, timestep, torch.tensor([c])).sample[:, :3]
            expected = (predicted - target).square().mean()
            torch.testing.assert_close(found[c, k], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stated", [{}, {"time": "1 - sigma", "predicts": "data - noise"}])
def test_a_flow(stated: dict, tmp_path: Path) -> None:
    unet = make_unet()
    write(DDPMPipeline(unet, FlowMatchEulerDiscreteScheduler(shift=3.0)), tmp_path, **stated)
    found, eps = losses_of(DiffusionClassifier.from_pretrained(tmp_path), [250])
    sigma = 0.251
    told = torch.tensor([1 - sigma if stated else 1000 * sigma])
    target = (X0 - eps) if stated else (eps - X0)
    with torch.no_grad():
        predicted = unet((1 - sigma) * X0 + sigma * eps, told, LABELS[2:3]).sample
    torch.testing.assert_close(found[2, 0], (predicted - target).square().mean(), **EXACT)


def test_latents_of_a_vq_model(tmp_path: Path) -> None:
    vq = make_vq()
    write(LDMPipeline(vq, make_unet(), DDIMScheduler(beta_schedule="scaled_linear")), tmp_path)
    model = load_model(tmp_path)
    assert model.image_shape == (3, 16, 16) and model.latent_shape == (3, 8, 8)
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        expected = vq.encode(pixels).latents * 0.7
    torch.testing.assert_close(model.encode(pixels), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("strategy", ["auto", "enumerate", "invert", "race"])
def test_it_answers(directory: Path, strategy: str) -> None:
    clf = DiffusionClassifier.from_pretrained(directory)
    answer = clf(images(), strategy=strategy, probes=4)[0]
    assert answer.label in ("cat", "dog", "bird", "fish")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("scheduler", [DDPMScheduler, CMStochasticIterativeScheduler])
def test_half_precision_stays_close(scheduler: type, dtype: str, tmp_path: Path) -> None:
    write(DDPMPipeline(make_unet(), scheduler()), tmp_path)
    full, _ = losses_of(DiffusionClassifier.from_pretrained(tmp_path), [100, 500, 900])
    half, _ = losses_of(DiffusionClassifier.from_pretrained(tmp_path, dtype=dtype), [100, 500, 900])
    torch.testing.assert_close(half, full, rtol=0.05, atol=0.02)


def test_the_command_line(directory: Path, tmp_path: Path, capsys) -> None:
    Image.fromarray(images()[0]).save(tmp_path / "photo.png")
    said = call(capsys, "classify", tmp_path / "photo.png", "--model", directory, "--probes", "4")
    assert said.code == 0 and any(name in said.out for name in ("cat", "dog", "bird", "fish"))


def test_one_label_more_than_names_means_no_class(tmp_path: Path) -> None:
    unet = make_unet()
    write(DDPMPipeline(unet, DDPMScheduler()), tmp_path, classes=["cat", "dog", "bird"])
    vocabulary = load_model(tmp_path).vocabulary
    assert vocabulary.names == ("cat", "dog", "bird")
    torch.testing.assert_close(vocabulary.unconditional, unet.class_embedding.weight[3])


def test_identity_tells_tables_and_conventions_apart(tmp_path: Path) -> None:
    unet = make_unet(class_embed_type="identity", num_class_embeds=None)
    write(DDPMPipeline(unet, FlowMatchEulerDiscreteScheduler()), tmp_path)

    def identity(**extra) -> str:
        write_json(tmp_path / "dive_fast.json", {"embeddings": VECTORS.tolist()} | extra)
        return str(load_model(tmp_path).identity())

    found = {identity(), identity(time="sigma"), identity(predicts="data - noise"),
             identity(embeddings=(2 * VECTORS).tolist())}  # fmt: skip
    assert len(found) == 4 and identity() in found


def test_the_published_consistency_model_on_the_meta_device() -> None:
    """openai/diffusers-cd_imagenet64_l2: ADM's UNet of ImageNet at 64 x 64."""
    with torch.device("meta"):
        unet = UNet2DModel(
            sample_size=64, in_channels=3, out_channels=3, layers_per_block=3,
            num_class_embeds=1000, block_out_channels=(192, 384, 576, 768), attention_head_dim=64,
            down_block_types=("ResnetDownsampleBlock2D", *["AttnDownBlock2D"] * 3),
            up_block_types=(*["AttnUpBlock2D"] * 3, "ResnetUpsampleBlock2D"),
            resnet_time_scale_shift="scale_shift", attn_norm_num_groups=32,
            upsample_type="resnet", downsample_type="resnet",
        )  # fmt: skip
    assert tuple(unet.class_embedding.weight.shape) == (1000, 768)
    scheduler = {"_class_name": "CMStochasticIterativeScheduler", "num_train_timesteps": 40,
                 "sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5}  # fmt: skip
    convention = Convention.from_config(scheduler)
    model = ClassUNet(unet, None, convention, torch.zeros(1000, 768), list(map(str, range(1000))))
    assert model.latent_shape == model.image_shape == (3, 64, 64)
    x_t, t = torch.empty(2, 3, 64, 64, device="meta"), torch.zeros(2, dtype=torch.int64)
    found = model.predict(x_t, t.to("meta"), torch.empty(2, 768, device="meta"))
    assert found.shape == (2, 3, 64, 64) and len(model.schedule) == 1000
