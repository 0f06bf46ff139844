"""A family in a few lines: what ``LatentModel`` and ``Pipeline`` do for it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from tiny import make_vae

from dive_fast import DiffusionClassifier, ModelError, register_model_family
from dive_fast.core.schedule import Schedule
from dive_fast.core.vocabulary import Vocabulary
from dive_fast.models import load_model, source
from dive_fast.models.base import LatentModel
from dive_fast.models.files.checkpoint import fingerprint
from dive_fast.models.pipeline import Pipeline
from dive_fast.models.protocol import Model

WIDTH = 4 * 8  # of a UNet2DModel's time embedding, to which it adds what it is given


class Toy(LatentModel):
    """A UNet2DModel whose condition joins the time embedding; one unit vector per class."""

    family = "toy"

    def __init__(self, network, vae, schedule, **model) -> None:
        super().__init__(network, vae, schedule, **model)
        self.vocabulary = Vocabulary(torch.eye(3, WIDTH), "abc")

    def facts(self) -> dict:
        return {"width": WIDTH}

    def predict(self, x_t, t, condition):
        return self.network(x_t.to(self.dtype), t, class_labels=condition.to(self.dtype)).sample


def load(directory: Path, **asked) -> Toy:
    pipeline = Pipeline(directory, **asked)
    pipeline.check_parts({"unet": "UNet2DModel"})
    network = pipeline.component(UNet2DModel, "unet")
    return Toy(network, None, pipeline.schedule(), name=pipeline.name)


def make_network(channels: int = 1) -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        class_embed_type="identity",
    ).eval()


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    make_network().save_pretrained(tmp_path / "unet")
    DDPMScheduler().save_pretrained(tmp_path / "scheduler")
    index = {"_class_name": "ToyPipeline", "unet": ["diffusers", "UNet2DModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    monkeypatch.setattr(source, "FAMILIES", dict(source.FAMILIES))
    register_model_family("ToyPipeline", load)
    return tmp_path


def test_it_loads_and_classifies(directory):
    model = load_model(directory, device="cpu")
    assert isinstance(model, Model) and model.name == str(directory)
    assert model.latent_shape == model.image_shape == (1, 8, 8)
    assert model.inverse_temperature == 8 * 8 / 2 and model.timesteps is None
    assert model.identity() == {
        "family": "toy",
        "dtype": "float32",
        "width": WIDTH,
        "weights": fingerprint(model.network),
        "vae_weights": None,
        "schedule": Schedule.from_config({}).identity(),
    }
    images = torch.rand(2, 1, 8, 8) * 2 - 1
    assert torch.equal(model.encode(images.double()), images)
    classifier = DiffusionClassifier.from_pretrained(directory, device="cpu")
    (found,) = classifier(latents=images[:1], strategy="enumerate", probes=4)
    assert found.index in range(3) and found.evaluations == 12


def test_what_else_it_may_have():
    """A name, a shape of its own, a VAE, and more than the network in the network's precision."""

    class Two(Toy):
        def moved(self):
            return self.network, self.more

    vae = make_vae()
    model = Two(make_network(vae.config.latent_channels), vae, Schedule.from_config({}))
    model.more = torch.nn.Linear(2, 2)
    channels, side, _ = model.latent_shape
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    assert model.name == "toy"
    assert model.image_shape == (vae.config.in_channels, factor * side, factor * side)
    images = torch.rand(1, *model.image_shape) * 2 - 1
    expected = vae.encode(images).latent_dist.mean * vae.config.scaling_factor
    torch.testing.assert_close(model.encode(images), expected)
    assert model.to("cpu", torch.bfloat16) is model
    assert model.device == torch.device("cpu") and model.identity()["dtype"] == "bfloat16"
    assert model.network.dtype == model.more.weight.dtype == torch.bfloat16
    assert vae.dtype == torch.float32 and model.encode(images).dtype == torch.float32
    other = Toy(make_network(), None, Schedule.from_config({}), latent_shape=(1, 4, 6), name="n")
    assert other.name == "n" and other.inverse_temperature == math.prod((1, 4, 6)) / 2
    assert other.image_shape == (1, 4, 6) and channels == vae.config.latent_channels


def test_what_a_pipeline_refuses(directory):
    with pytest.raises(ModelError, match="timestep_embedding is for models of the family dit, got"):
        load_model(directory, device="cpu", timestep_embedding="original")
    index = json.loads((directory / "model_index.json").read_text())
    (directory / "model_index.json").write_text(json.dumps(index | {"unet": ["diffusers", "X"]}))
    with pytest.raises(ModelError, match="expected unet in .*json to be a UNet2DModel, got 'X'"):
        load_model(directory, device="cpu")
