"""Directories of class-conditional UNets that cannot be used: one sentence each."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import pytest
from command import assert_refused, call
from diffusers import (
    CMStochasticIterativeScheduler,
    DDPMPipeline,
    DDPMScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    ScoreSdeVeScheduler,
)
from pictures import noise_picture
from tiny import read_json, write_json
from tiny_class_unet import WIDTH, make_conditional, make_unet, write

from dive_fast import ModelError
from dive_fast.models import load_model

REFUSED = {
    "unconditional": (partial(make_unet, num_class_embeds=None), {}, {},
                      "is not conditioned on classes"),
    "vectors missing": (partial(make_unet, class_embed_type="identity"), {}, {},
                        "takes vectors for classes: expected embeddings .* of 32 numbers, found"),
    "vectors narrow": (partial(make_unet, class_embed_type="identity"), {},
                       {"embeddings": [[1.0, 2.0]]}, r"expected embeddings .* \[1, 2\]"),
    "vectors of text": (partial(make_unet, class_embed_type="identity"), {},
                        {"embeddings": "one-hot"}, "must be rows of 32 numbers"),
    "vectors ragged": (partial(make_unet, class_embed_type="identity"), {},
                       {"embeddings": [[1.0], [1.0, 2.0]]}, "must be rows of 32 numbers"),
    "vectors of NaN": (partial(make_unet, class_embed_type="identity"), {},
                       {"embeddings": [[math.nan] * WIDTH]}, "expected finite embeddings"),
    "vectors twice": (make_unet, {}, {"embeddings": [[1.0] * WIDTH]}, "has a table of its own"),
    "how many": (partial(make_unet, class_embed_type="timestep", num_class_embeds=None), {}, {},
                 "classes in dive_fast.json must say how many"),
    "names": (make_unet, {}, {"classes": ["a", "b"]}, "names of 4 classes .* got 2"),
    "names alike": (make_unet, {}, {"classes": list("abca")}, "that differ"),
    "names a mapping": (make_unet, {}, {"classes": {"a": "b"}}, "to be a list of names"),
    "labels": (make_unet, {"id2label": {"0": "a", "7": "b"}}, {}, "must name the classes 0 to 1"),
    "prompt and labels": (
        partial(make_conditional, num_class_embeds=4, mid_block_type="UNetMidBlock2DCrossAttn"),
        {}, {}, "takes a prompt and class labels"),
    "more than classes": (
        partial(make_conditional, num_class_embeds=4, time_cond_proj_dim=8), {}, {},
        "takes more than classes .time_cond_proj_dim."),
    "another network": (make_unet, {"unet": ["diffusers", "UNet1DModel"]}, {},
                        "to be one of UNet2DModel, UNet2DConditionModel, got 'UNet1DModel'"),
    "another vae": (make_unet, {"vqvae": ["diffusers", "AsymmetricAutoencoderKL"]}, {},
                    "expected vqvae .* got 'AsymmetricAutoencoderKL'"),
    "no vae": (make_unet, {"vqvae": ["diffusers", "VQModel"]}, {}, "expected the folder vqvae"),
    "side": (partial(make_unet, sample_size=9), {}, {}, "halved 1 times, got 9"),
    "sides": (partial(make_unet, sample_size=(8, 16)), {}, {}, "one sample_size for both sides"),
    "channels": (partial(make_unet, in_channels=4), {}, {}, "expected 4 or 8 output channels"),
    "fourier": (partial(make_unet, time_embedding_type="fourier"), {}, {}, "'fourier'"),
    "labels as timesteps": (
        partial(make_unet, time_embedding_type="learned", num_train_timesteps=1000,
                class_embed_type="timestep"), {}, {}, "embeds labels by its table of timesteps"),
    "number of text": (partial(make_unet, class_embed_type="timestep", num_class_embeds="ten"), {},
                       {}, "num_class_embeds .* must be a whole number, got 'ten'"),
    "consistency": (make_unet, {"_class_name": "ConsistencyModelPipeline"}, {},
                    "CMStochasticIterativeScheduler of a consistency .* got 'DDPMScheduler'"),
    "no side": (partial(make_unet, sample_size=0), {}, {}, "must be from 1 to 4096, got 0"),
    "few timesteps": (
        partial(make_unet, time_embedding_type="learned", num_train_timesteps=100), {}, {},
        "has a table of 100 timesteps, but is told t of 1000"),
    "time": (make_unet, {}, {"time": "seconds"}, "expected time to be one of .* got 'seconds'"),
    "predicts": (make_unet, {}, {"predicts": ["edm"]}, "expected predicts to be one of"),
    "another kind": (make_unet, {}, {"predicts": "noise - data"}, "kind flow, got variance-pres"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "index", "extra", "message"), REFUSED.values(), ids=list(REFUSED))
def test_what_cannot_be_used(make, index, extra, message, tmp_path: Path) -> None:
    write(DDPMPipeline(make(), DDPMScheduler()), tmp_path, index, **extra)
    with pytest.raises(ModelError, match=message) as error:
        load_model(tmp_path)
    assert "\n" not in str(error.value)


SCHEDULERS = {
    "score": (ScoreSdeVeScheduler(), {}, "states its betas, got ScoreSdeVeScheduler"),
    "edm sample": (EDMEulerScheduler(), {"prediction_type": "sample"}, "one of epsilon, v_pred"),
    "sigma": (EDMEulerScheduler(), {"sigma_data": 0}, "sigma_data of the scheduler .* got 0"),
    "sigmas": (CMStochasticIterativeScheduler(), {"sigma_min": 90.0},
               "expected a sigma_min below sigma_max .* got 90.0 and 80.0"),
    "flow": (FlowMatchEulerDiscreteScheduler(), {"prediction_type": "epsilon"},
             "a flow's, but its prediction_type is 'epsilon'"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("scheduler", "change", "message"), SCHEDULERS.values(), ids=list(SCHEDULERS)
)
def test_schedulers_that_cannot_be_used(scheduler, change, message, tmp_path: Path, capsys) -> None:
    write(DDPMPipeline(make_unet(), scheduler), tmp_path)
    path = tmp_path / "scheduler" / "scheduler_config.json"
    write_json(path, read_json(path) | change)
    noise_picture((9, 9), 80).save(tmp_path / "photo.png")
    said = call(capsys, "classify", tmp_path / "photo.png", "--model", tmp_path)
    assert_refused(said, message)
