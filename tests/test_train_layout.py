"""Training a layout-to-image model: resuming, where tokens start, and the model that comes out."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command import assert_refused, call
from cut_off import cut_off

from dive_fast.data.scenes import SceneMaker
from dive_fast.errors import RunError
from dive_fast.models import load_model
from dive_fast.models.layout_to_image.transformer import LayoutTransformerModel
from dive_fast.training import scenes as train_layout
from dive_fast.training.layout import Batch, train_layout_model
from dive_fast.training.layout_losses import (
    LayoutTrainingConfig,
    draw_timesteps,
    noise_loss,
    to_x0,
)
from dive_fast.training.layout_network import build
from dive_fast.training.layout_tokens import empty, shuffle_objects, without_names
from dive_fast.training.scenes import SCENES_FORMAT, scene_batch, train_scenes

TINY = LayoutTrainingConfig(
    sample_size=32,
    in_channels=1,
    patch_size=8,
    channels=16,
    layers=2,
    heads=2,
    width=8,
    encoder_layers=1,
    encoder_heads=1,
    steps=6,
    batch_size=4,
    warmup_steps=2,
)


def train(
    out: Path,
    config: LayoutTrainingConfig = TINY,
    data: dict | None = None,
    at: Callable[[int], object] = lambda step: None,
) -> tuple[dict, dict[str, float]]:
    """All weights after training, and the losses of the held-out scenes."""
    out.mkdir(exist_ok=True)
    make = SceneMaker("train")

    def draw(step: int) -> Batch:
        at(step)
        return scene_batch(make(config.batch_size, (config.seed, step)))

    torch.manual_seed(config.seed)
    model = build(SCENES_FORMAT, config)
    losses = train_layout_model(model, draw, draw(10**6), SCENES_FORMAT, config, out, False, data)
    return model.state_dict(), losses


def test_training_that_was_cut_off_goes_on(tmp_path: Path) -> None:
    """Bit for bit the weights of the uncut run."""
    expected, losses = train(tmp_path / "uncut")
    with cut_off() as ctrl_c:
        train(tmp_path / "cut", at=lambda step: ctrl_c() if step == 3 else None)
    found, again = train(tmp_path / "cut")
    assert losses == again
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name
    with pytest.raises(RunError, match="training run with another configuration"):
        train(tmp_path / "cut", dataclasses.replace(TINY, seed=1))
    with pytest.raises(RunError, match="or other data"):
        train(tmp_path / "cut", data={"source": "others.json"})


def test_bf16(tmp_path: Path) -> None:
    """Weights stay float32, and other ones come out, though not by much."""
    full, losses = train(tmp_path / "full")
    half, found = train(tmp_path / "half", dataclasses.replace(TINY, bf16=True))
    assert {weight.dtype for weight in half.values()} == {torch.float32}
    assert any(not torch.equal(half[name], weight) for name, weight in full.items())
    assert found == pytest.approx(losses, rel=0.02)


def test_training_learns(tmp_path: Path) -> None:
    config = dataclasses.replace(TINY, steps=60, batch_size=16, learning_rate=3e-3)
    _, before = train(tmp_path / "before", dataclasses.replace(config, steps=1))
    _, after = train(tmp_path / "after", config)
    assert after["layout"] < 0.85 * before["layout"]


def test_objects_are_shuffled_whole() -> None:
    """Triples move as one, the crop's corners stay, and every order comes up."""
    tokens = torch.arange(11).expand(200, 11)
    shuffled = shuffle_objects(tokens, torch.Generator().manual_seed(0))
    assert torch.equal(shuffled[:, 9:], tokens[:, 9:])
    triples = shuffled[:, :9].view(200, 3, 3)
    assert torch.equal(triples - triples[:, :, :1], torch.arange(3).expand(200, 3, 3))
    orders = {tuple(row) for row in triples[:, :, 0].tolist()}
    assert len(orders) == 6 and {tuple(sorted(order)) for order in orders} == {(0, 3, 6)}


def test_an_empty_layout_keeps_the_crop() -> None:
    tokens = torch.arange(8)[None]
    assert empty(tokens, 99).tolist() == [[99] * 6 + [6, 7]]
    assert tokens.tolist() == [list(range(8))]


def test_images_become_x0() -> None:
    images = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8)
    x0 = to_x0(images)
    assert x0.dtype == torch.float32 and x0.min() >= -1 and x0.max() <= 1
    assert torch.equal(x0.add(1).mul(127.5).round().to(torch.uint8), images)


def test_timesteps() -> None:
    """Most in the middle, some anywhere, and none outside of the schedule."""
    config = dataclasses.replace(TINY, t_range=(0.2, 0.5), t_share=0.75)
    t = draw_timesteps(40_000, 1000, config, torch.Generator().manual_seed(0))
    focused, anywhere = t[:30_000], t[30_000:]
    assert focused.min() == 200 and focused.max() == 499
    assert anywhere.min() < 5 and 995 <= anywhere.max() < 1000
    assert abs(focused.double().mean() - 349.5) < 2 and abs(anywhere.double().mean() - 499.5) < 12


def test_near_corners_start_near() -> None:
    """Each corner's nearest other corner, by embedding, is a neighbour on the grid."""
    torch.manual_seed(0)
    encoder = build(SCENES_FORMAT, dataclasses.replace(TINY, width=32)).encoder
    start, stop = SCENES_FORMAT.coordinate_range
    table = encoder.token_embedding.weight.detach()
    corners = table[start:stop]
    distances = torch.cdist(corners, corners).fill_diagonal_(float("inf"))
    nearest, own = distances.argmin(dim=1), torch.arange(len(corners))
    grid = SCENES_FORMAT.grid
    steps = (nearest % grid - own % grid).abs() + (nearest // grid - own // grid).abs()
    assert steps.max() == 1
    # Of one size all over, and classes of about that size too.
    norms = corners.norm(dim=1)
    torch.testing.assert_close(norms, norms[:1].expand_as(norms))
    assert 0.5 < table[:start].norm(dim=1).mean() / norms[0] < 2


def test_a_width_that_four_does_not_divide() -> None:
    encoder = build(SCENES_FORMAT, dataclasses.replace(TINY, width=10)).encoder
    assert torch.isfinite(encoder.token_embedding.weight).all()


def test_scenes_end_to_end(tmp_path: Path, monkeypatch, capsys) -> None:
    """``dive-fast train scenes`` writes a model that loads, and does not overwrite it."""
    monkeypatch.setattr(train_layout, "SCENES", TINY)
    monkeypatch.setattr(train_layout, "N_HELD_OUT", 8)
    said = call(capsys, "train", "scenes", "--out", tmp_path / "model", "--steps", 2, "--bf16")
    assert said.code == 0
    assert "loss of held-out scenes" in said.out and "that of an empty canvas" in said.out
    model = load_model(tmp_path / "model")
    assert model.layout_format == SCENES_FORMAT and model.image_shape == (1, 32, 32)
    facts = json.loads((tmp_path / "model" / "dive_fast.json").read_text())
    assert (facts["config"]["steps"], facts["config"]["bf16"]) == (2, True)
    assert facts["expected"]["layout"] > 0
    assert_refused(
        call(capsys, "train", "scenes", "--out", tmp_path / "model"), "holds a model already"
    )


class TestBadInput:
    def test_data(self, tmp_path: Path, capsys) -> None:
        said = call(capsys, "train", "scenes", "--out", tmp_path / "out", "--data", "x.npz")
        assert_refused(said, "expected no --data, got x.npz")
        assert not (tmp_path / "out").exists()

    def test_out_is_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(RunError, match="file cannot be made a directory"):
            train_scenes(tmp_path / "file", progress=False)

    def test_damaged_state(self, tmp_path: Path) -> None:
        (tmp_path / "training.pt").write_bytes(b"not a state")
        with pytest.raises(RunError, match=r"training\.pt is damaged and cannot be resumed from"):
            train(tmp_path)


def test_weights_are_one_over_snr_and_bounded() -> None:
    """With them the loss is that of the predicted x0."""
    alpha_bar = torch.tensor([0.9, 0.5, 0.1, 0.001])
    x0, eps = torch.randn(2, 4, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    t = torch.arange(4)

    class Zero(torch.nn.Module):
        def forward(self, x_t, t, tokens):
            return torch.zeros_like(x_t)

    def loss(rows: list[int], max_weight: float | None) -> float:
        parts = (x0[rows], t[rows], eps[rows])
        config = LayoutTrainingConfig(in_channels=1, max_weight=max_weight)
        return float(noise_loss(Zero(), *parts, torch.zeros(len(rows), 3), alpha_bar, config))

    for row, weight in enumerate((1 / 9, 1.0, 9.0, 50.0)):
        assert loss([row], 50.0) == pytest.approx(weight * loss([row], None), rel=1e-5)
    a, s = alpha_bar[2].sqrt(), (1 - alpha_bar[2]).sqrt()
    predicted_x0 = (a * x0[2] + s * eps[2]) / a
    assert loss([2], 50.0) == pytest.approx(float((predicted_x0 - x0[2]).square().mean()), rel=1e-5)
    assert loss([0, 1, 2, 3], 50.0) == pytest.approx(
        sum(loss([row], 50.0) for row in range(4)) / 4, rel=1e-5
    )


@pytest.mark.parametrize("max_weight", [None, 50.0])
def test_what_predicts_x0_has_the_loss_of_the_noise_that_follows_from_it(max_weight) -> None:
    """eps = (x_t - a x0) / s, and w_t || eps - eps_theta ||^2 of it."""
    alpha_bar = torch.tensor([0.9, 0.5, 0.1, 0.001], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    x0, eps, x0_hat = torch.randn(3, 4, 2, 3, 3, generator=generator, dtype=torch.float64)
    t = torch.arange(4)
    a, s = (each.sqrt().view(-1, 1, 1, 1) for each in (alpha_bar, 1 - alpha_bar))
    eps_hat = (a * x0 + s * eps - a * x0_hat) / s
    losses = [
        float(
            noise_loss(
                lambda *_, given=given: given,
                x0,
                t,
                eps,
                torch.zeros(4, 3),
                alpha_bar,
                LayoutTrainingConfig(in_channels=2, max_weight=max_weight, predicts=predicts),
            )
        )
        for predicts, given in (("sample", x0_hat), ("epsilon", eps_hat))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


def test_classes_that_are_not_known() -> None:
    """-1 in the slots of classes of chosen rows, and the network sees the mean of all classes."""
    tokens = scene_batch(SceneMaker("train")(3, seed=0))[1]
    chosen = torch.tensor([True, False, True])
    nameless = without_names(tokens, SCENES_FORMAT, chosen)
    assert torch.equal(nameless[1], tokens[1])
    changed = (nameless != tokens)[chosen]
    class_ids, sides = SCENES_FORMAT.read(tokens)
    assert torch.equal(changed[:, 0::3], class_ids[chosen] >= 0) and not changed[:, 1::3].any()
    assert (nameless[chosen][changed] == -1).all()
    for raster in (False, True):
        net = build(SCENES_FORMAT, dataclasses.replace(TINY, raster=raster, width=16))
        for weights in net.transformer.parameters():
            weights.data += 0.05 * torch.randn_like(weights)
        table = net.encoder.token_embedding.weight
        x_t, t = torch.randn(3, 1, 32, 32), torch.tensor([1, 500, 900])
        model = LayoutTransformerModel(net.transformer.eval(), net.encoder.eval(), TINY.scheduler())
        embedded = table[nameless.clamp_min(0)].detach().clone()
        embedded[nameless < 0] = table[slice(*SCENES_FORMAT.class_range)].mean(dim=0).detach()
        with torch.no_grad():
            found = net(x_t, t, nameless)
            expected = model.predict(x_t, t, embedded.flatten(1))
        assert torch.allclose(found, expected, atol=2e-3)
        assert not torch.allclose(found, net(x_t, t, tokens), atol=2e-3)


@pytest.mark.parametrize("predicts", ["epsilon", "sample"])
def test_contrast_goes_on_where_it_was_cut_off(tmp_path: Path, predicts) -> None:
    config = dataclasses.replace(
        TINY, contrast=0.01, raster=True, nameless=0.5, max_weight=50.0, predicts=predicts
    )
    expected, losses = train(tmp_path / "uncut", config)
    assert 0 <= losses["told_apart"] <= 1
    with cut_off() as ctrl_c:
        train(tmp_path / "cut", config, at=lambda step: ctrl_c() if step == 3 else None)
    found, again = train(tmp_path / "cut", config)
    assert losses == again
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name
    assert expected["contrast.log_kappa"] != build(SCENES_FORMAT, config).contrast.log_kappa


def test_contrast_learns_to_tell_layouts_apart(tmp_path: Path) -> None:
    config = dataclasses.replace(
        TINY, contrast=0.01, raster=True, predicts="sample", max_weight=50.0, steps=60,
        batch_size=16, channels=32, warmup_steps=10, learning_rate=3e-3,
    )  # fmt: skip
    _, losses = train(tmp_path, config)
    assert losses["told_apart"] > 0.6 and losses["layout"] < losses["empty"]
