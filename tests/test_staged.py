"""Networks in parts: the parts together are the network, values and gradients."""

from __future__ import annotations

import pytest
import torch
from tiny_transformer import CHANNELS, N_CLASSES, SIZE, make_transformer
from toy_model import ToyModel

from dive_fast.core.schedule import Schedule, make_betas
from dive_fast.models import load_model
from dive_fast.models.dit.model import DiT
from dive_fast.models.protocol import StagedModel

SCHEDULE = Schedule.from_betas(make_betas("linear", 1000))
# The same fp32 operations; a gathered row of a linear layer may be summed in another order.
ROUNDING = {"rtol": 1e-5, "atol": 1e-5}


def make_model(tied: bool = True, learned_sigma: bool = True, **options) -> DiT:
    transformer = make_transformer(tied=tied, learned_sigma=learned_sigma, **options)
    return DiT(transformer, None, SCHEDULE, tuple("abcde"), tied=tied)


def inputs(m: int, channels: int = CHANNELS, size: int = SIZE) -> tuple:
    generator = torch.Generator().manual_seed(3)
    x_t = torch.randn(m, channels, size, size, generator=generator)
    return x_t, torch.randint(1000, (m,), generator=generator)


def in_parts(model: StagedModel, x_t, t, condition) -> torch.Tensor:
    projected = model.project(condition)
    return model.decoder(model.encoder(model.prefix(x_t, t), projected), projected)


def test_who_is_staged():
    assert isinstance(make_model(), StagedModel)
    assert not isinstance(ToyModel(), StagedModel)


@pytest.mark.parametrize("learned_sigma", [True, False])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("blocks", [0, 1, 2])
def test_the_parts_together_are_the_network(tied, learned_sigma, blocks):
    model = make_model(tied, learned_sigma)
    assert model.encoder_blocks == 1
    model.encoder_blocks = blocks
    for m in (1, 3, 7):
        x_t, t = inputs(m)
        condition = model.vocabulary.table[torch.arange(m) % N_CLASSES]
        expected = model.predict(x_t, t, condition)
        torch.testing.assert_close(in_parts(model, x_t, t, condition), expected, **ROUNDING)


def test_odd_channels_and_a_longer_side():
    model = make_model(channels=3, size=6)
    x_t, t = inputs(5, 3, 6)
    condition = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    expected = model.predict(x_t, t, condition)
    torch.testing.assert_close(in_parts(model, x_t, t, condition), expected, **ROUNDING)


@pytest.mark.parametrize("tied", [True, False])
def test_gradients_through_the_parts_are_the_networks(tied):
    model = make_model(tied)
    x_t, t = inputs(4)
    gradients = []
    for predict in (model.predict, lambda *a: in_parts(model, *a)):
        condition = model.vocabulary.table[:4].clone().requires_grad_()
        prediction = predict(x_t, t, condition)
        gradients.append(torch.autograd.grad(prediction.square().sum(), condition)[0])
    # Sums of squares in the hundreds.
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-3)


def test_rows_of_a_state_can_be_gathered():
    """One prefix per (x_t, t), one projection per class, any pairs of them."""
    model = make_model(tied=False)
    x_t, t = inputs(3)
    pair, c = torch.tensor([2, 0, 2, 1, 1, 0, 2]), torch.tensor([0, 4, 1, 1, 3, 0, 2])
    prefix = tuple(x[pair] for x in model.prefix(x_t, t))
    projected = tuple(x[c] for x in model.project(model.vocabulary.table))
    found = model.decoder(model.encoder(prefix, projected), projected)
    expected = model.predict(x_t[pair], t[pair], model.vocabulary.table[c])
    torch.testing.assert_close(found, expected, **ROUNDING)


def test_the_prefix_knows_no_condition_and_the_encoder_does():
    model = make_model()
    x_t, t = inputs(2)
    prefix = model.prefix(x_t, t)
    a, b = (model.encoder(prefix, model.project(model.vocabulary.table[i : i + 2])) for i in (0, 2))
    assert not torch.allclose(a[0], b[0], atol=1e-3)
    torch.testing.assert_close(a[1], prefix[1], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_of_the_zoo(dtype):
    model = load_model("digits", dtype=dtype, device="cpu")
    x_t, t = inputs(9, 1, 8)
    condition = model.vocabulary.table[torch.arange(9)]
    expected, found = model.predict(x_t, t, condition), in_parts(model, x_t, t, condition)
    assert found.dtype == expected.dtype == dtype
    # The same kernels in the same order: in bfloat16 a few roundings of its 8 bits.
    tolerance = ROUNDING if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(found, expected, **tolerance)
