"""The default batch size: by the network's parameters on the CPU, unless a number is given."""

from __future__ import annotations

import pytest
import torch
from toy_model import ToyModel

from dive_fast import DiffusionClassifier
from dive_fast.engine import Engine
from dive_fast.engine.batch_size import rows_per_batch
from dive_fast.errors import DiveFastError
from dive_fast.predict.sampling import sample


def model_of(parameters: int, device: str = "cpu") -> ToyModel:
    """The toy with a network of that size, of which nothing is allocated."""
    model = ToyModel()
    model.network = torch.nn.Linear(parameters, 1, bias=False, device="meta")
    model.device = torch.device(device)
    return model


@pytest.mark.parametrize(
    ("parameters", "rows"),
    [
        (720_000, 256),  # digits
        (1 << 25, 256),
        ((1 << 25) + 1, 128),
        (675_000_000, 8),  # DiT-XL/2
        (859_520_964, 8),  # SD 1.5
        (865_910_724, 8),  # SD 2.1
        (2_567_463_684, 2),  # SDXL
        (1 << 34, 1),
    ],
)
def test_rows_by_parameters(parameters: int, rows: int) -> None:
    model = model_of(parameters)
    assert rows_per_batch(model) == rows
    assert DiffusionClassifier(model).batch_size == Engine(model).batch_size == rows
    assert (
        rows_per_batch(model, 100) == DiffusionClassifier(model, batch_size=100).batch_size == 100
    )
    assert rows_per_batch(model_of(parameters, "cuda")) == 256


def test_models_without_a_network() -> None:
    assert rows_per_batch(ToyModel()) == 256


def test_the_default_is_what_runs() -> None:
    model = model_of(1 << 32)
    sample(model, [0, 1, 2], steps=1)
    assert model.rows == [2, 1]
    model.rows.clear()
    DiffusionClassifier(model)(latents=torch.zeros(1, 2, 3, 3), strategy="enumerate", probes=5)
    assert max(model.rows) == 2 and sum(model.rows) == 6 * 5


@pytest.mark.parametrize("batch_size", [0, -3])
def test_bad_input(batch_size: int) -> None:
    with pytest.raises(DiveFastError, match=f"batch_size must be at least 1, got {batch_size}"):
        rows_per_batch(ToyModel(), batch_size)
