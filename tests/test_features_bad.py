"""What is asked of features and cannot be had: one sentence, before anything is computed."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from feature_checks import answered
from networks import CLASSES, SIDE, PatchTransformer
from tiny_transformer import make_dit
from torch import Tensor, nn
from toy_model import ToyModel

from dive_fast import DiffusionClassifier, DiveFastError, ImageError, ModelError, Schedule
from dive_fast.core.probes import low_discrepancy_probes
from dive_fast.core.requests import Features

X0 = torch.zeros(2, 2, 4, 4)
LAYERS = (
    r"expected a layer of dit as an index in \[-2, 2\) or one of transformer_blocks.0 to "
    r"transformer_blocks.1, or another module of its network in dots, got "
)


@pytest.fixture(scope="module")
def clf() -> DiffusionClassifier:
    return DiffusionClassifier(make_dit())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"layer": "transformer_blocks.2"}, LAYERS + "'transformer_blocks.2'"),
        ({"layer": "transformer_blocks"}, LAYERS + "'transformer_blocks'"),  # the list itself
        ({"layer": ""}, LAYERS + "''"),
        ({"layer": 2}, LAYERS + "2"),
        ({"layer": np.int64(-3)}, LAYERS + "-3"),
        ({"layer": True}, "a layer by its name or its index, got True"),
        ({"layer": 1.0}, "a layer by its name or its index, got 1.0"),
        ({"layer": [0, 1]}, r"a layer by its name or its index, got \[0, 1\]"),
        ({"layer": {}}, "a layer by its name or its index, got {}"),
        ({"pool": "max"}, "a pool of 'mean', 'attention' or None, got 'max'"),
        ({"pool": 3}, "a pool of 'mean', 'attention' or None, got 3"),
        ({"pool": ["mean"]}, r"a pool of 'mean', 'attention' or None, got \['mean'\]"),
        ({"timestep": 1000}, "timestep must be at most 999, got 1000"),
        ({"timestep": -1}, "timestep must be at least 0, got -1"),
        ({"timestep": 0.05}, "timestep must be a whole number of at least 0, got 0.05"),
        ({"timestep": True}, "timestep must be a whole number of at least 0, got True"),
        ({"timestep": "low"}, "timestep must be a whole number of at least 0, got 'low'"),
        ({"condition": "class"}, "a condition 'mean', 'null' or the index .*, got 'class'"),
        ({"condition": 5}, "condition must be at most 4, got 5"),
        ({"condition": -1}, "condition must be at least 0, got -1"),
        ({"condition": 1.0}, "a condition 'mean', 'null' or the index of a class, got 1.0"),
        ({"condition": None}, "a condition 'mean', 'null' or the index of a class, got None"),
        ({"condition": torch.zeros(16)}, "a condition 'mean', 'null' or the index of a class"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"seed": math.nan}, "seed must be a whole number of at least 0, got nan"),
        ({"noises": 0}, "noises must be at least 1, got 0"),
        ({"noises": 10**9}, "noises must be at most 1000000, got 1000000000"),
        ({"noises": "2"}, "noises must be a whole number of at least 1, got '2'"),
    ],
)
def test_arguments(clf: DiffusionClassifier, given: dict, message: str) -> None:
    with pytest.raises(DiveFastError, match=message) as caught:
        clf.features(**{"latents": X0} | given)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")
    assert clf.last_run.rows == 0


def test_images(clf: DiffusionClassifier) -> None:
    for given in ({}, {"images": np.zeros((4, 4)), "latents": X0}):
        with pytest.raises(DiveFastError, match="expected either images or latents"):
            clf.features(**given)
    with pytest.raises(
        ImageError, match=r"latents must have shape \[B, 2, 4, 4\], got \[2, 4, 4\]"
    ):
        clf.features(latents=X0[0])
    with pytest.raises(ImageError, match="latents must be finite"):
        clf.features(latents=X0 / 0)
    with pytest.raises(ImageError, match="expected at least one image, got none"):
        clf.features(latents=X0[:0])


def test_requests_of_a_search(clf: DiffusionClassifier) -> None:
    probes = low_discrepancy_probes(3, 1000, (2, 4, 4))
    for layer, pool, message in (
        ("mid_block", "mean", LAYERS + "'mid_block'"),
        (7, None, LAYERS + "7"),
        (None, "mean", "a layer by its name or its index, got None"),
        (0, "sum", "a pool of 'mean', 'attention' or None, got 'sum'"),
    ):
        with pytest.raises(DiveFastError, match=message):
            request = Features(torch.tensor([0]), torch.arange(3), layer, pool)
            answered(clf, X0, probes, request)
    for conditions, ids in ((torch.tensor([5]), [0]), (torch.tensor([0]), [])):
        request = Features(conditions, torch.tensor(ids, dtype=torch.int64), 0)
        with pytest.raises(DiveFastError, match="a request"):
            answered(clf, X0, probes, request)


def test_no_condition_where_there_is_none() -> None:
    clf = DiffusionClassifier.from_network(
        net := Odd(), schedule=Schedule.linear(), embeddings=net.labels, shape=(1, SIDE, SIDE)
    )
    with pytest.raises(ModelError, match="learned what no condition is for 'null', got the"):
        clf.features(latents=torch.zeros(1, 1, SIDE, SIDE), condition="null")


def test_a_model_that_does_not_state_its_network() -> None:
    clf = DiffusionClassifier(ToyModel())
    message = "expected a model with an attribute 'network' for its layers, got toy"
    with pytest.raises(ModelError, match=message):
        _ = clf.layers
    with pytest.raises(ModelError, match=message):
        clf.features(latents=torch.zeros(1, 2, 3, 3), layer=0)


class Odd(PatchTransformer):
    """With modules that give what are no activations, and one that is not run."""

    def __init__(self) -> None:
        super().__init__()
        self.odd = nn.ModuleDict({name: Gives(name) for name in GIVEN})
        self.idle = nn.Linear(2, 2)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        for module in self.odd.values():
            module(x)
        return super().forward(x, t, y)


class Gives(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> object:
        return GIVEN[self.name][0](x)


GIVEN = {
    "vector": (lambda x: x.flatten(1), r"float32 \[2, 64\]"),
    "whole": (lambda x: x.long(), r"int64 \[2, 1, 8, 8\]"),
    "sum": (lambda x: x.sum(dim=0, keepdim=True), r"float32 \[1, 1, 8, 8\]"),
    "nothing": (lambda x: None, "'NoneType'"),
    "empty": (lambda x: (None, "x"), "'tuple'"),
    "dict": (lambda x: {"sample": x}, "'dict'"),
}


@pytest.mark.parametrize("name", GIVEN)
def test_layers_that_give_no_activations(name: str) -> None:
    clf = own_odd()
    with pytest.raises(ModelError) as caught:
        clf.features(latents=torch.zeros(2, 1, SIDE, SIDE), layer=f"odd.{name}")
    assert str(caught.value).startswith(
        f"expected odd.{name} of the given network to give floats [2, D, h, w] or [2, tokens, D]"
    )
    with pytest.raises(ModelError, match=GIVEN[name][1]):
        clf.features(latents=torch.zeros(2, 1, SIDE, SIDE), layer=f"odd.{name}")


def test_layers_that_do_not_run_and_activations_that_are_no_numbers() -> None:
    clf = own_odd()
    x0 = torch.zeros(2, 1, SIDE, SIDE)
    with pytest.raises(ModelError, match="a layer that the given network runs, got idle"):
        clf.features(latents=x0, layer="idle")
    clf.model.network.out.bias.fill_(math.inf)
    with pytest.raises(ModelError, match="expected finite activations from the given network"):
        clf.features(latents=x0, layer="out")
    clf.model.network.odd = None
    with pytest.raises(ModelError, match="'predict' of the given network failed with"):
        clf.features(latents=x0, layer="out")


def own_odd() -> DiffusionClassifier:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Odd()
    return DiffusionClassifier.from_network(
        network, schedule=Schedule.linear(), embeddings=network.labels, shape=(1, SIDE, SIDE),
        names=[f"kind {i}" for i in range(CLASSES)],
    )  # fmt: skip
