"""A layout drawn beside x_t: cell by cell, from tokens and from their embeddings."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler

from dive_fast.core.layouts import LayoutFormat
from dive_fast.errors import ModelError
from dive_fast.models import load_model
from dive_fast.models.layout_to_image.raster import LayoutRaster, drawn_tokens
from dive_fast.models.layout_to_image.transformer import (
    LayoutTransformerModel,
    build_layout_transformer,
    denoise,
)
from dive_fast.training.layout_network import start_tokens

FORM = LayoutFormat.compact(("cat", "dog", "owl"), max_objects=3, grid=9)
SIZES = {
    "sample_size": 16,
    "in_channels": 3,
    "patch_size": 4,
    "channels": 16,
    "layers": 1,
    "heads": 2,
    "width": 16,
    "encoder_layers": 1,
    "encoder_heads": 2,
}


def tokens_of(*objects: tuple[int, list[int]]) -> torch.Tensor:
    classes = torch.tensor([c for c, _ in objects]).long()
    return FORM.write(classes, torch.tensor([box for _, box in objects]).long().view(-1, 4))


def by_hand(objects: list[tuple[int, list[int]]], weights: dict[int, list[float]]) -> torch.Tensor:
    """Channels on the grid's 8 x 8 cells, cell by cell."""
    found = torch.zeros(5, 8, 8)
    for y in range(8):
        for x in range(8):
            clear, no_edge = [1.0] * 3, 1.0
            for i, (_, (left, top, right, bottom)) in enumerate(objects):
                if not (left <= x < right and top <= y < bottom):
                    continue
                for c, w in enumerate(weights[i]):
                    clear[c] *= 1 - w
                found[4, y, x] += 0.5
                deep = left < x < right - 1 and top < y < bottom - 1
                no_edge *= 1.0 if deep else 0.0
            found[:3, y, x] = 1 - torch.tensor(clear)
            found[3, y, x] = 1 - no_edge
    return found


SCENE = [(0, [0, 0, 4, 3]), (2, [2, 1, 8, 8]), (2, [1, 1, 5, 6])]
ONE_HOT = {i: [float(c == k) for k in range(3)] for i, (c, _) in enumerate(SCENE)}


@pytest.fixture
def parts():
    torch.manual_seed(0)
    transformer, encoder = build_layout_transformer(FORM, **SIZES, raster=True)
    start_tokens(encoder, FORM)
    for weights in transformer.parameters():  # the output starts as 0
        weights.data += 0.05 * torch.randn_like(weights)
    return transformer.eval().requires_grad_(False), encoder.eval().requires_grad_(False)


def test_tokens_are_drawn_cell_by_cell() -> None:
    tokens = tokens_of(*SCENE)
    drawn = drawn_tokens(FORM, torch.stack([tokens, tokens_of()]), 16)
    assert drawn.shape == (2, 5, 16, 16) and not drawn[1].any()
    expected = by_hand(SCENE, ONE_HOT).repeat_interleave(2, 1).repeat_interleave(2, 2)
    assert torch.allclose(drawn[0], expected)
    nameless = tokens.clone()
    nameless[3] = -1
    weights = ONE_HOT | {1: [1 / 3] * 3}
    assert torch.allclose(drawn_tokens(FORM, nameless[None], 8)[0], by_hand(SCENE, weights))


def test_embeddings_are_drawn_as_their_tokens(parts) -> None:
    _, encoder = parts
    table = encoder.token_embedding.weight.detach()
    tokens = torch.stack([tokens_of(*SCENE), tokens_of((1, [3, 0, 4, 8])), tokens_of()])
    raster = LayoutRaster(FORM, table)
    for dtype in (torch.float32, torch.bfloat16):
        found = raster(table[tokens].to(dtype), 16)
        assert torch.allclose(found, drawn_tokens(FORM, tokens, 16), atol=0.02)
    mean = table[tokens[:1]].clone()
    mean[0, 3] = table[slice(*FORM.class_range)].mean(dim=0)
    expected = by_hand(SCENE, ONE_HOT | {1: [1 / 3] * 3})
    assert torch.allclose(raster(mean, 8)[0], expected, atol=1e-3)


def test_between_rows_there_is_a_gradient(parts) -> None:
    _, encoder = parts
    table = encoder.token_embedding.weight.detach()
    a, b = (table[tokens_of((0, [2, 2, right, 6]))] for right in (5, 7))
    v = ((a + b) / 2).clone().requires_grad_()
    drawn = LayoutRaster(FORM, table)(v[None], 8)
    drawn.sum().backward()
    assert v.grad.isfinite().all() and v.grad[:3].abs().sum() > 0
    assert drawn[0, 0, 3, 5] > 0.1 and drawn[0, 0, 3, 5] < 0.9  # half of it is there


def test_a_model_of_such_a_network(parts, tmp_path: Path) -> None:
    transformer, encoder = parts
    model = LayoutTransformerModel(transformer, encoder, DDPMScheduler(prediction_type="sample"))
    assert model.latent_shape == model.image_shape == (3, 16, 16)
    tokens = torch.stack([tokens_of(*SCENE), tokens_of()])
    x_t, t = torch.randn(2, 3, 16, 16), torch.tensor([10, 900])
    found = model.predict(x_t, t, model.embed(tokens))
    x = torch.cat([x_t, drawn_tokens(FORM, tokens, 16)], dim=1)
    expected = denoise(transformer, x, t, encoder(encoder.token_embedding(tokens)))
    assert found.shape == (2, 3, 16, 16) and torch.allclose(found, expected, atol=1e-3)
    other = denoise(
        transformer,
        torch.cat([x_t, 0 * x[:, 3:]], dim=1),
        t,
        model.encode_layout(model.embed(tokens)),
    )
    assert not torch.allclose(found[0], other[0], atol=1e-3)  # the drawing counts
    model.save_pretrained(tmp_path / "model")
    again = load_model(tmp_path / "model")
    assert torch.allclose(again.predict(x_t, t, again.embed(tokens)), found, atol=1e-5)
    assert again.identity() == model.identity()
    half = load_model(tmp_path / "model", dtype=torch.bfloat16)
    assert half.predict(x_t, t, half.embed(tokens)).dtype == torch.bfloat16


def test_classes_that_cannot_be_told_apart() -> None:
    table = torch.randn(FORM.vocabulary_size, 16)
    table[1] = table[0]
    with pytest.raises(ModelError, match="linearly independent, got rows of width 16"):
        LayoutRaster(FORM, table)
