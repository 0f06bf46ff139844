"""SiT and other DiTs of a flow: what diffusers' pipeline asks, and SiT's own loss written out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from command import assert_refused, call
from diffusers import (
    DiTPipeline,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from pictures import noise_picture
from pipelines import check_gradient, intercept
from tiny import make_vae, read_json, write_json
from tiny_transformer import CHANNELS, N_CLASSES, SIZE, make_transformer

from dive_fast import DiffusionClassifier, ModelError, ProbeList
from dive_fast.models import load_model

SIT = {"time": "1 - sigma", "predicts": "data - noise"}
LABELS = torch.arange(N_CLASSES)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    DiTPipeline(make_transformer(), make_vae().eval(), scheduler).save_pretrained(tmp_path / "sit")
    return tmp_path / "sit"


def state(directory: Path, **extra: object) -> Path:
    write_json(directory / "dive_fast.json", extra)
    return directory


def test_the_network_is_asked_what_the_pipeline_asks(directory: Path) -> None:
    """1000 sigma and noise - data, by a sampler of flows that the DiT's pipeline can call."""
    scheduler = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=2.0
    )
    scheduler.save_pretrained(directory / "scheduler")
    index = read_json(directory / "model_index.json")
    index["scheduler"] = ["diffusers", "DPMSolverMultistepScheduler"]
    write_json(directory / "model_index.json", index)
    pipeline, model = DiTPipeline.from_pretrained(directory), load_model(directory)
    asked = intercept(
        pipeline, pipeline.transformer, class_labels=[1, 3], guidance_scale=1.0,
        num_inference_steps=4,
    )  # fmt: skip
    assert len(asked) == 4 and model.schedule.target == "flow"
    for step in asked:
        told = step.given["timestep"]
        t = told.long() - 1
        torch.testing.assert_close(1000 * model.schedule.s[t], told.float())
        given = step.given["hidden_states"]
        found = model.predict(given, t, model.vocabulary.table[[1, 3]])
        torch.testing.assert_close(found, step.output, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("frequencies", ["diffusers", "original"])
def test_losses_are_sit_s(frequencies: str, directory: Path) -> None:
    """Time t from noise to data: || f(t x1 + (1 - t) x0, t, y) - (x1 - x0) ||^2, x1 the data."""
    clf = DiffusionClassifier.from_pretrained(
        state(directory, timestep_embedding=frequencies, **SIT)
    )
    generator = torch.Generator().manual_seed(0)
    data, noise = torch.randn(2, 1, CHANNELS, SIZE, SIZE, generator=generator)
    probes = ProbeList(torch.tensor([99, 800]), noise.expand(2, -1, -1, -1), torch.arange(2))
    found = clf.losses(latents=data, probes=probes)
    transformer = make_transformer()
    if frequencies == "original":
        for block in transformer.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = 0
    for k, t in enumerate([0.9, 0.199]):
        velocity = transformer(
            (t * data + (1 - t) * noise).expand(N_CLASSES, -1, -1, -1),
            timestep=torch.full((N_CLASSES,), t), class_labels=LABELS,
        ).sample[:, :CHANNELS]  # fmt: skip
        expected = (velocity - (data - noise)).square().mean(dim=(1, 2, 3))
        torch.testing.assert_close(found[0, :, k], expected, rtol=1e-4, atol=1e-5)


def test_in_parts_it_is_the_same(directory: Path) -> None:
    model = load_model(state(directory, **SIT))
    x_t = torch.randn(N_CLASSES, CHANNELS, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    t, table = LABELS * 200 + 3, model.vocabulary.table
    with torch.no_grad():
        projected = model.project(table)
        parts = model.decoder(model.encoder(model.prefix(x_t, t), projected), projected)
        torch.testing.assert_close(parts, model.predict(x_t, t, table), rtol=1e-5, atol=1e-5)
    check_gradient(model)


@pytest.mark.parametrize("strategy", ["auto", "enumerate", "invert"])
def test_it_answers(directory: Path, strategy: str) -> None:
    for cache in ("off", "exact"):
        clf = DiffusionClassifier.from_pretrained(state(directory, **SIT), cache=cache)
        answer = clf(torch.rand(3, 8, 8), strategy=strategy, probes=4)[0]
        assert answer.label in clf.names


def test_half_precision_stays_close(directory: Path) -> None:
    x0 = torch.randn(1, CHANNELS, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    state(directory, **SIT)
    full = DiffusionClassifier.from_pretrained(directory).losses(latents=x0, probes=8)
    for dtype in ("bfloat16", "float16"):
        half = DiffusionClassifier.from_pretrained(directory, dtype=dtype)
        torch.testing.assert_close(half.losses(latents=x0, probes=8), full, rtol=0.1, atol=0.05)


def test_identity_tells_the_conventions_apart(directory: Path, dit_dir: Path) -> None:
    stated = [{}, SIT, {"time": "1 - sigma"}, {"predicts": "data - noise"}, {"time": "sigma"}]
    found = {str(load_model(state(directory, **extra)).identity()) for extra in stated}
    assert len(found) == len(stated)
    assert "time" not in load_model(dit_dir).identity()  # as it was before there were flows


@pytest.mark.parametrize(
    ("extra", "change", "message"),
    [
        ({"time": "seconds"}, {}, "expected time to be one of t, .* got 'seconds'"),
        ({"predicts": "velocity"}, {}, "expected predicts to be one of .* got 'velocity'"),
        ({"predicts": "epsilon"}, {}, "'epsilon' needs a schedule of the kind variance-preserving"),
        ({}, {"prediction_type": "epsilon"}, "a flow's, but its prediction_type is 'epsilon'"),
        ({}, {"_class_name": EDMEulerScheduler.__name__}, "or a flow's, .* got EDMEulerScheduler"),
    ],
)
def test_what_cannot_be_used(directory: Path, extra, change, message, capsys) -> None:
    path = state(directory, **extra) / "scheduler" / "scheduler_config.json"
    write_json(path, read_json(path) | change)
    noise_picture((9, 9), 80).save(directory / "photo.png")
    said = call(capsys, "classify", directory / "photo.png", "--model", directory)
    assert_refused(said, message)


def test_a_flow_beside_a_network_that_is_told_whole_timesteps(sd: Path, tmp_path: Path) -> None:
    """Stable Diffusion and its like were not trained with one."""
    for path in sd.iterdir():
        if path.name != "scheduler":
            (tmp_path / path.name).symlink_to(path)
    FlowMatchEulerDiscreteScheduler().save_pretrained(tmp_path / "scheduler")
    with pytest.raises(ModelError, match="was trained with, got the flow of a FlowMatchEuler"):
        load_model(tmp_path, classes=["cat", "dog"])
