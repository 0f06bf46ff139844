"""The transformer of the family layout-to-image: what it computes, gradients, directories."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, SD3Transformer2DModel
from tiny_layout import FORMAT, layouts, make_layout_model, make_layout_transformer

from dive_fast.core.layouts import LayoutFormat
from dive_fast.errors import ModelError
from dive_fast.models import load_model
from dive_fast.models.layout_to_image.encoder import LayoutEncoder
from dive_fast.models.layout_to_image.transformer import (
    LayoutTransformerModel,
    build_layout_transformer,
)
from dive_fast.models.protocol import Model, StagedModel
from dive_fast.predict.detector import LayoutDetector

SIZES = {
    "sample_size": 8,
    "in_channels": 1,
    "patch_size": 2,
    "channels": 16,
    "layers": 1,
    "heads": 2,
    "width": 12,
    "encoder_layers": 1,
    "encoder_heads": 2,
}


def inputs(model, m: int, seed: int = 0) -> tuple:
    generator = torch.Generator().manual_seed(seed)
    x_t = torch.randn(m, *model.latent_shape, generator=generator)
    t = torch.randint(1000, (m,), generator=generator)
    tokens = torch.stack([FORMAT.encode(layout) for layout in layouts()])
    return x_t, t, model.embed(tokens[torch.arange(m) % 3])


def test_it_is_the_network_of_sd3_with_an_empty_prompt():
    model = make_layout_transformer()
    assert isinstance(model, Model) and not isinstance(model, StagedModel)
    x_t, t, condition = inputs(model, 5)
    hidden = model.layout_encoder(condition.unflatten(1, (FORMAT.n_slots, 12)))
    expected = model.network(
        hidden_states=x_t,
        timestep=t,
        encoder_hidden_states=hidden,
        pooled_projections=torch.zeros(5, 1),
    ).sample
    assert torch.equal(model.predict(x_t, t, condition), expected)
    same = model.predict(x_t[:1].expand(3, -1, -1, -1), t[:1].expand(3), condition[:3])
    assert (same[0] - same[1]).abs().max() > 1e-2 < (same[1] - same[2]).abs().max()


def test_untrained_it_predicts_nothing_and_learns():
    """adaLN-Zero: the output starts at zero, and the first gradient is not."""
    transformer, encoder = build_layout_transformer(FORMAT, **SIZES)
    model = LayoutTransformerModel(transformer, encoder, DDPMScheduler())
    x_t, t, condition = inputs(model, 2)
    predicted = model.predict(x_t, t, condition)
    assert not predicted.any()
    predicted.sub(x_t).square().mean().backward()
    assert transformer.proj_out.weight.grad.abs().max() > 0


def test_gradient_of_the_whole_path():
    """dL/d(embedding) against central differences, in float64."""
    tiny = make_layout_transformer()
    # diffusers' RMSNorm computes in float32 whatever it is given: too coarse for differences.
    config = {**tiny.network.config, "qk_norm": None}
    network = SD3Transformer2DModel.from_config(config).eval().requires_grad_(False)
    network.load_state_dict(tiny.network.state_dict(), strict=False)
    model = LayoutTransformerModel(network, tiny.layout_encoder, tiny.scheduler)
    model.to("cpu", torch.float64)
    x_t, t, condition = (v.double() if v.is_floating_point() else v for v in inputs(model, 2))
    noise = torch.randn(x_t.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))

    def loss(c: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(model.predict(x_t, t, c), noise)

    condition.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(condition), condition)
    assert (gradient.unflatten(1, (8, 12)).abs().amax(dim=2) > 0).all()  # every slot
    step, generator = 1e-5, torch.Generator().manual_seed(6)
    with torch.no_grad():
        for _ in range(5):
            d = torch.randn(condition.shape, dtype=torch.float64, generator=generator)
            difference = (loss(condition + step * d) - loss(condition - step * d)) / (2 * step)
            torch.testing.assert_close((gradient * d).sum(), difference, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("vae", [None, "kl"])
def test_directory_round_trip(tmp_path, vae):
    model = make_layout_transformer(vae=vae)
    model.save_pretrained(tmp_path / "model")
    index = json.loads((tmp_path / "model" / "model_index.json").read_text())
    assert index["transformer"] == ["diffusers", "SD3Transformer2DModel"] and "unet" not in index
    loaded = load_model(tmp_path / "model")
    assert isinstance(loaded, LayoutTransformerModel) and loaded.identity() == model.identity()
    assert loaded.image_shape == (3, 8, 8) and loaded.latent_shape == model.latent_shape
    x_t, t, condition = inputs(loaded, 3)
    assert torch.equal(loaded.predict(x_t, t, condition), model.predict(x_t, t, condition))


@pytest.mark.parametrize("strategy", ["guided", "invert"])
def test_detects(strategy):
    picture = np.random.default_rng(0).integers(256, size=(8, 8, 3), dtype=np.uint8)
    detector = LayoutDetector(make_layout_transformer())
    settings = {"steps": 2, "starts": 1} if strategy == "invert" else {}
    (found,) = detector(picture, strategy=strategy, probes=4, **settings)
    assert detector.last_run.evaluations > 0
    assert (found.xyxy % 2 == 0).all()  # on the grid of 5 x 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 3}, "a sample_size that 3 divides, got 8"),
        ({"heads": 3}, "channels that 4 and 3 heads divide, got 16"),
        ({"encoder_heads": 5}, "a width that 5 heads divide, got 12"),
    ],
)
def test_sizes_that_do_not_fit(changes, message):
    with pytest.raises(ModelError, match=message):
        build_layout_transformer(FORMAT, **{**SIZES, **changes})


def test_parts_that_do_not_fit(tmp_path):
    model = make_layout_transformer()
    form: LayoutFormat = FORMAT
    wider = LayoutEncoder(form.vocabulary_size, form.n_slots, 24, 1, 2, 12, form.to_dict())
    with pytest.raises(ModelError, match="takes embeddings of 12, but its layout encoder gives 24"):
        LayoutTransformerModel(model.network, wider, model.scheduler)
    with pytest.raises(ModelError, match=r"expected \[N, 96\], got \[2, 95\]"):
        model.predict(torch.zeros(2, 3, 8, 8), torch.zeros(2).long(), torch.zeros(2, 95))
    make_layout_model().save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    index["transformer"] = index.pop("unet")
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="transformer"):
        load_model(tmp_path)
