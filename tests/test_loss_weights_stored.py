"""Learned weights of a classifier on disk."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from tiny import read_json, write_json, write_model
from toy_model import ToyModel

from dive_fast import DiffusionClassifier, LossWeights, ModelError
from dive_fast.core.loss_weights import digest_of

HALVES = LossWeights(1000, (1.5, 0.5), 20.0)


def test_beside_the_model(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    clf = DiffusionClassifier.from_pretrained(model)
    assert clf.model.loss_weights is None
    clf.model.loss_weights = dataclasses.replace(
        HALVES, form="polynomial of degree 1, penalty 0.1", images=7, gain=0.25, error=0.5
    )
    clf.save_fitted()
    content = read_json(model / "dive_fast.json")
    assert content["loss_weights"]["weights"] == [1.5, 0.5]
    again = DiffusionClassifier.from_pretrained(model)
    assert again.model.loss_weights == clf.model.loss_weights
    clf.model.loss_weights = None
    clf.save_fitted()
    assert "loss_weights" not in read_json(model / "dive_fast.json")
    again.load_fitted(model)
    assert again.model.loss_weights is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": [1.0, 2.0]}, "mean 1"),
        ({"beta": None}, "beta must be"),
        ({"more": 1}, "must hold exactly"),
    ],
)
def test_damaged(change: dict, message: str, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    write_json(model / "dive_fast.json", {"loss_weights": HALVES.to_dict() | change})
    with pytest.raises(ModelError, match=f"loss_weights in .*dive_fast.json cannot.*{message}"):
        DiffusionClassifier.from_pretrained(model)


def test_of_another_schedule(tmp_path: Path) -> None:
    clf = DiffusionClassifier(ToyModel())
    clf.model.loss_weights = LossWeights(50, (1.0,), 1.0)
    clf.save_fitted(tmp_path)
    with pytest.raises(ModelError, match="1000 timesteps, but these were learned for 50"):
        DiffusionClassifier(ToyModel()).load_fitted(tmp_path)


def test_a_shortlist_says_of_which_weights(tmp_path: Path) -> None:
    clf = DiffusionClassifier(ToyModel(spread=0.4))
    x0, _ = clf.model.toy.sample(12, torch.Generator().manual_seed(3))
    clf.model.loss_weights = HALVES
    clf.model.shortlist = clf.fit_shortlist(latents=x0, probes=8)
    clf.save_fitted(tmp_path)
    other = DiffusionClassifier(ToyModel(spread=0.4))
    other.load_fitted(tmp_path)
    assert other.model.shortlist.weights == digest_of(HALVES)
    stored = read_json(tmp_path / "dive_fast.json")
    stored["shortlist"]["weights"] = 3
    write_json(tmp_path / "dive_fast.json", stored)
    with pytest.raises(ModelError, match="a shortlist needs the digest of its weights, got 3"):
        other.load_fitted(tmp_path)
