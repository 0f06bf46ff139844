"""Layout-to-image models: stages, gradients, directories."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from tiny_layout import FORMAT, layouts, make_layout_model, make_vae

from dive_fast.core.layouts import LayoutFormat
from dive_fast.core.schedule import Schedule, make_betas
from dive_fast.errors import ModelError
from dive_fast.models import load_model
from dive_fast.models.layout_to_image.base import read_format
from dive_fast.models.layout_to_image.encoder import LayoutEncoder
from dive_fast.models.layout_to_image.unet import (
    LayoutToImageModel,
    build_layout_model,
    check_unet,
)
from dive_fast.models.protocol import StagedModel

ROUNDING = {"rtol": 1e-4, "atol": 1e-5}  # the same fp32 operations in another grouping


def inputs(model, m: int, seed: int = 0) -> tuple:
    generator = torch.Generator().manual_seed(seed)
    x_t = torch.randn(m, *model.latent_shape, generator=generator)
    t = torch.randint(1000, (m,), generator=generator)
    tokens = torch.stack([FORMAT.encode(layout) for layout in layouts()])
    return x_t, t, model.embed(tokens[torch.arange(m) % 3])


def in_parts(model, x_t, t, condition) -> torch.Tensor:
    projected = model.project(condition)
    return model.decoder(model.encoder(model.prefix(x_t, t), projected), projected)


@pytest.mark.parametrize("space_to_depth", [1, 2])
def test_the_parts_together_are_the_network(space_to_depth):
    model = make_layout_model(space_to_depth=space_to_depth)
    assert isinstance(model, StagedModel)
    for m in (1, 3, 7):
        x_t, t, condition = inputs(model, m)
        expected = model.predict(x_t, t, condition)
        torch.testing.assert_close(in_parts(model, x_t, t, condition), expected, **ROUNDING)
    assert (expected[0] - expected[3]).abs().max() > 1e-3  # the layout and the image matter
    other = model.predict(x_t[:1].expand(3, -1, -1, -1), t[:1].expand(3), condition[:3])
    assert (other[0] - other[1]).abs().max() > 1e-2


def test_gradient_of_the_whole_path():
    """dL/d(embedding) against central differences, in float64, through the staged network."""
    model = make_layout_model()
    model.to("cpu", torch.float64)
    x_t, t, condition = (v.double() if v.is_floating_point() else v for v in inputs(model, 2))
    noise = torch.randn(x_t.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))

    def loss(c: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(in_parts(model, x_t, t, c), noise)

    condition.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(condition), condition)
    (whole,) = torch.autograd.grad(F.mse_loss(model.predict(x_t, t, condition), noise), condition)
    torch.testing.assert_close(gradient, whole, rtol=1e-9, atol=1e-14)
    assert (gradient.unflatten(1, (8, 12)).abs().amax(dim=2) > 0).all()  # every slot
    step, generator = 1e-5, torch.Generator().manual_seed(6)
    with torch.no_grad():
        for _ in range(5):  # random directions
            d = torch.randn(condition.shape, dtype=torch.float64, generator=generator)
            difference = (loss(condition + step * d) - loss(condition - step * d)) / (2 * step)
            torch.testing.assert_close((gradient * d).sum(), difference, rtol=1e-6, atol=1e-10)
        for i, j in [(0, 0), (0, 50), (1, 95)]:  # single entries: class, corner, crop
            d = torch.zeros_like(condition)
            d[i, j] = 1
            difference = (loss(condition + step * d) - loss(condition - step * d)) / (2 * step)
            torch.testing.assert_close(gradient[i, j], difference, rtol=1e-5, atol=1e-10)


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({}, (3, 8, 8)),
        ({"space_to_depth": 2}, (12, 4, 4)),
        ({"vae": "kl"}, (2, 4, 4)),
        ({"vae": "vq"}, (2, 4, 4)),
    ],
)
def test_directory_round_trip(tmp_path, options, shape):
    model = make_layout_model(**options)
    model.save_pretrained(tmp_path / "model")
    loaded = load_model(tmp_path / "model")
    assert loaded.layout_format == FORMAT and loaded.identity() == model.identity()
    assert loaded.latent_shape == shape and loaded.image_shape == (3, 8, 8)
    assert loaded.inverse_temperature == torch.tensor(shape).prod() / 2
    assert torch.equal(loaded.vocabulary.table, model.vocabulary.table)
    assert loaded.vocabulary.names[:4] == ("one", "two", "three", "(0, 0)")
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    torch.testing.assert_close(loaded.encode(images), model.encode(images), **ROUNDING)
    assert loaded.encode(images).shape == (2, *shape)
    x_t, t, condition = inputs(loaded, 3)
    assert torch.equal(loaded.predict(x_t, t, condition), model.predict(x_t, t, condition))
    loaded.save_pretrained(tmp_path / "again")
    assert load_model(tmp_path / "again").identity() == model.identity()


@pytest.mark.parametrize(
    "change",
    [
        {"prediction_type": "v_prediction"},
        {"beta_end": 0.021},
        {"num_train_timesteps": 999},
        {"beta_schedule": "scaled_linear"},
    ],
)
def test_another_schedule_is_another_model(tmp_path, change):
    """A run must not go on under it: its losses are others."""
    model = make_layout_model()
    model.save_pretrained(tmp_path)
    path = tmp_path / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert load_model(tmp_path).identity() != model.identity()


def test_encode_without_quantisation():
    model, images = make_layout_model(vae="vq"), torch.rand(1, 3, 8, 8)
    vae = model.vae
    expected = vae.quant_conv(vae.encoder(images)) * 0.5
    torch.testing.assert_close(model.encode(images), expected, **ROUNDING)
    distances = torch.cdist(expected[0].flatten(1).T, vae.quantize.embedding.weight)
    assert distances.min() > 1e-4


def test_space_to_depth_is_exact():
    model, images = make_layout_model(space_to_depth=2), torch.rand(2, 3, 8, 8)
    x0 = model.encode(images)
    assert torch.equal(F.pixel_shuffle(x0, 2), images)


def test_a_loaded_model_is_frozen(tmp_path):
    make_layout_model().save_pretrained(tmp_path)
    loaded = load_model(tmp_path, dtype="bfloat16")
    parameters = [*loaded.unet.parameters(), *loaded.layout_encoder.parameters()]
    assert not any(p.requires_grad for p in parameters)
    assert {p.dtype for p in parameters} == {torch.bfloat16}
    assert loaded.vocabulary.table.dtype == torch.float32
    assert loaded.predict(*inputs(loaded, 2)).dtype == torch.bfloat16


def test_training_reaches_every_weight():
    unet, encoder = build_layout_model(
        FORMAT, sample_size=8, in_channels=1, channels=(8, 16), width=12, encoder_layers=1,
        heads=2, layers_per_block=1, head_channels=4, norm_groups=4, space_to_depth=2,
    )  # fmt: skip
    tokens = torch.stack([FORMAT.encode(layout) for layout in layouts()])
    hidden = encoder(encoder.token_embedding(tokens))
    x_t = torch.randn(3, 4, 4, 4)
    unet(
        x_t, torch.tensor([1, 20, 300]), encoder_hidden_states=hidden
    ).sample.square().mean().backward()
    for module in (unet, encoder):
        assert [n for n, p in module.named_parameters() if p.grad is None] == []
    assert encoder.token_embedding.weight.grad[FORMAT.none].abs().max() > 0


def test_sizes_of_a_model_to_train():
    unet, encoder = build_layout_model(
        FORMAT, sample_size=32, in_channels=1, channels=(32, 64, 96), width=64, encoder_layers=3,
        heads=4, space_to_depth=2, attention=(True, False, True),
    )  # fmt: skip
    assert unet.config.in_channels == unet.config.out_channels == 4
    assert unet.config.sample_size == 16
    assert unet.config.attention_head_dim == (1, 2, 3)
    assert unet.config.down_block_types[1] == "DownBlock2D"
    assert unet.config.up_block_types[1] == "UpBlock2D"
    assert encoder.config.head_dim == 16 and len(encoder.blocks) == 3


GOOD = dict(
    sample_size=8, in_channels=1, channels=(32, 64), width=12, encoder_layers=1, heads=2
)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention": (True,)}, "attention in at least one of 2 levels, got .True"),
        ({"attention": (False, False)}, "attention in at least one"),
        ({"channels": (32, 48)}, "heads of 32 and 32 groups divide, got 48"),
        ({"heads": 5}, "a width that 5 heads divide"),
        ({"space_to_depth": 3}, "a sample_size that 3 divides, got 8"),
    ],
)
def test_sizes_that_do_not_fit(changes, message):
    with pytest.raises(ModelError, match=message):
        build_layout_model(FORMAT, **{**GOOD, **changes})


def test_parts_that_do_not_fit():
    model = make_layout_model()
    unet, encoder, schedule = model.unet, model.layout_encoder, model.scheduler
    wider = LayoutEncoder(FORMAT.vocabulary_size, FORMAT.n_slots, 14, 1, 2, 7, FORMAT.to_dict())
    with pytest.raises(ModelError, match="takes embeddings of 12, but its layout encoder gives 14"):
        LayoutToImageModel(unet, wider, schedule)
    bare = LayoutEncoder(10, 3, 12, 1, 2, 6)
    with pytest.raises(ModelError, match="expected the layout's format in .*, found none"):
        LayoutToImageModel(unet, bare, schedule)
    other = LayoutEncoder(10, 3, 12, 1, 2, 6, FORMAT.to_dict())
    with pytest.raises(ModelError, match="of 29 tokens and 8 slots for its layout, got 10 and 3"):
        LayoutToImageModel(unet, other, schedule)
    with pytest.raises(ModelError, match="a multiple of 4 channels, got a denoiser of 3"):
        LayoutToImageModel(unet, encoder, schedule, space_to_depth=2)
    with pytest.raises(ModelError, match="takes 3 channels, but its VAE gives 2"):
        LayoutToImageModel(unet, encoder, schedule, make_vae("vq"))
    deep = make_layout_model(space_to_depth=2)
    with pytest.raises(ModelError, match=r"a VAE or space_to_depth, got both \(2\)"):
        LayoutToImageModel(
            deep.unet, deep.layout_encoder, schedule, make_vae("kl"), space_to_depth=2
        )
    plain = UNet2DConditionModel(
        sample_size=8, in_channels=3, out_channels=1, block_out_channels=(8, 16),
        layers_per_block=1, norm_num_groups=4, cross_attention_dim=12, attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    with pytest.raises(ModelError, match="expected 3 or 6 output channels of the denoiser, got 1"):
        LayoutToImageModel(plain, encoder, schedule)


def test_bad_conditions_and_tokens():
    model = make_layout_model()
    x_t, t, condition = inputs(model, 2)
    with pytest.raises(
        ModelError, match=r"embeddings of 8 tokens, expected \[N, 96\], .*\[2, 12\]"
    ):
        model.predict(x_t, t, condition[:, :12])
    with pytest.raises(ModelError, match=r"tokens int64 of shape \[N, 8\], got .*\[8\]"):
        model.embed(torch.zeros(8, dtype=torch.int64))
    with pytest.raises(ModelError, match=r"tokens in \[0, 29\), got 0 to 29"):
        model.embed(torch.tensor([[0] * 7 + [29]]))
    with pytest.raises(
        ModelError, match=r"token embeddings of shape \[B, 8, 12\], got \[1, 7, 12\]"
    ):
        model.layout_encoder(torch.zeros(1, 7, 12))


def test_a_schedule_alone_serves_but_is_not_saved(tmp_path):
    model = make_layout_model()
    schedule = Schedule.from_betas(make_betas("linear", 1000))
    other = LayoutToImageModel(model.unet, model.layout_encoder, schedule)
    assert other.schedule is schedule
    # diffusers makes its betas in float32.
    torch.testing.assert_close(schedule.a, model.schedule.a, rtol=0, atol=1e-7)
    with pytest.raises(ModelError, match="made of a schedule alone cannot be saved"):
        other.save_pretrained(tmp_path)


def break_json(path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("model_index.json", {"vae": ["diffusers", "AutoencoderOobleck"]}, "or VQModel, got"),
        ("model_index.json", {"space_to_depth": "2"}, "space_to_depth must be a number"),
        ("layout_encoder/config.json", {"layout": None}, "the layout's format"),
        ("layout_encoder/config.json", {"layout": {"grid": 3}}, "must be given as .*None"),
        ("layout_encoder/config.json", {"width": 13}, "cannot be loaded as LayoutEncoder"),
        ("layout_encoder/config.json", {"layers": 3}, "missing keys"),
        ("scheduler/scheduler_config.json", {"_class_name": "VQModel"}, "of a diffusers scheduler"),
        ("scheduler/scheduler_config.json", {"prediction_type": "x"}, "expected a prediction_type"),
    ],
)
def test_broken_directories(tmp_path, file, changes, message):
    make_layout_model().save_pretrained(tmp_path)
    break_json(tmp_path / file, **changes)
    with pytest.raises(ModelError, match=message):
        load_model(tmp_path)


def test_options_for_other_families(tmp_path):
    make_layout_model().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="has classes of its own"):
        load_model(tmp_path, classes=["cat"])
    with pytest.raises(ModelError, match="timestep_embedding is for models of the family dit"):
        load_model(tmp_path, timestep_embedding="original")
    (tmp_path / "layout_encoder" / "config.json").unlink()
    with pytest.raises(ModelError, match="expected config.json in"):
        load_model(tmp_path)


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="file cannot be written"):
        make_layout_model().save_pretrained(tmp_path / "file")


def test_published_sizes_on_the_meta_device():
    with torch.device("meta"):
        encoder = LayoutEncoder(layout=LayoutFormat.latent_diffusion(["a"]).to_dict())
        unet, built = build_layout_model(
            LayoutFormat.latent_diffusion(["a"]), sample_size=64, in_channels=3,
            channels=(128, 256, 384, 512), width=512, encoder_layers=16, heads=8,
            transformer_depth=3,
        )  # fmt: skip
    assert encoder.state_dict().keys() == built.state_dict().keys()
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (encoder, built)]
    assert shapes[0] == shapes[1]
    check_unet(unet, built)
    assert read_format(built).n_slots == 92
