"""``dive-fast fit --what weights``, ``--weights`` and ``info --fitted``."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from command import assert_refused, call
from tiny import read_json, write_json, write_model

from dive_fast import DiffusionClassifier, LossWeights, TimestepWeights

HALVES = LossWeights(1000, (1.5, 0.5), 20.0, "polynomial of degree 1, penalty 0.1", 30, 0.25, 0.125)


@pytest.fixture
def own_dit(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    images = np.random.default_rng(0).integers(0, 256, (24, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "data.npz", images=images, labels=np.arange(24) % 4)
    return tmp_path / "data.npz"


def with_weights(model: Path) -> None:
    clf = DiffusionClassifier.from_pretrained(model)
    clf.model.loss_weights = HALVES
    clf.save_fitted()


def test_an_untrained_model_keeps_uniform_weights(own_dit: Path, data: Path, capsys) -> None:
    with_weights(own_dit)
    options = ("--what", "weights", "--probes", 64, "--limit", 20)
    said = call(capsys, "fit", "--data", data, "--model", own_dit, *options)
    assert (said.code, said.err) == (0, "")
    # The right class and the three others, on 64 probes.
    assert said.out.startswith("weights: 20 images of 256 evaluations each, 5,120 in all")
    assert "the weights stay uniform" in said.out and "right of 20" in said.out
    assert "loss_weights" not in read_json(own_dit / "dive_fast.json")


def test_what_is_fitted_after_refused_weights(own_dit: Path, data: Path, capsys) -> None:
    """Weights "learned" are then none: what was measured is not lost over it."""
    options = ("--what", "weights,beta", "--weights", "learned", "--probes", 64, "--limit", 20)
    said = call(capsys, "fit", "--data", data, "--model", own_dit, *options)
    assert (said.code, said.err) == (0, "") and "the weights stay uniform" in said.out
    assert "beta" in read_json(own_dit / "dive_fast.json")


def test_they_are_not_fitted_unless_named(own_dit: Path, data: Path, capsys) -> None:
    said = call(capsys, "fit", "--data", data, "--model", own_dit, "--probes", 64)
    assert said.code == 0 and "weights:" not in said.out


def test_beta_is_that_of_the_weights_in_use(own_dit: Path, data: Path, capsys) -> None:
    with_weights(own_dit)
    before = read_json(own_dit / "dive_fast.json")
    options = ("--what", "beta", "--probes", 4)
    assert call(capsys, "fit", "--data", data, "--model", own_dit, *options).code == 0
    after = read_json(own_dit / "dive_fast.json")
    assert after["beta"] == before["beta"] and after["loss_weights"]["beta"] != 20.0
    options += ("--weights", "uniform")
    assert call(capsys, "fit", "--data", data, "--model", own_dit, *options).code == 0
    last = read_json(own_dit / "dive_fast.json")
    assert last["beta"] != before["beta"] and last["loss_weights"] == after["loss_weights"]


def test_a_run_with_other_weights_is_refused(own_dit, data, tmp_path, capsys) -> None:
    with_weights(own_dit)
    out = tmp_path / "run"
    arguments = ("evaluate", "--data", data, "--model", own_dit, "--probes", 2, "--out", out)
    assert call(capsys, *arguments).code == 0
    config = read_json(out / "run.json")["config"]
    assert config["loss_weights"] == [1.5, 0.5] and config["beta"] == 20.0
    assert call(capsys, *arguments, "--weights", "learned").code == 0
    said = call(capsys, *arguments, "--weights", "uniform")
    assert_refused(said, "another configuration: beta is 20.0 there and 32.0 here")
    stored = read_json(own_dit / "dive_fast.json")
    stored["loss_weights"]["weights"] = [0.5, 1.5]
    write_json(own_dit / "dive_fast.json", stored)
    assert_refused(call(capsys, *arguments), r"loss_weights is \[1.5, 0.5\] there and \[0.5")
    plain = tmp_path / "plain"
    assert call(capsys, *arguments[:-1], plain, "--weights", "uniform").code == 0
    assert "loss_weights" not in read_json(plain / "run.json")["config"]


def test_other_commands_take_them(own_dit: Path, tmp_path: Path, capsys) -> None:
    from PIL import Image

    with_weights(own_dit)
    image = tmp_path / "grey.png"
    Image.new("L", (8, 8), 90).save(image)
    common = (image, "--model", own_dit, "--probes", 4, "--strategy", "enumerate")
    learned = call(capsys, "classify", *common, "--json", "--top", 4)
    uniform = call(capsys, "classify", *common, "--json", "--top", 4, "--weights", "uniform")
    scores = [json.loads(said.out)[0]["top"] for said in (learned, uniform)]
    assert scores[0] != scores[1]
    out = tmp_path / "maps"
    assert call(capsys, "explain", *common, "--weights", "learned", "--out", out).code == 0
    assert read_json(out / "maps.json")["config"]["loss_weights"] == [1.5, 0.5]


def test_info(own_dit: Path, capsys) -> None:
    with_weights(own_dit)
    said = call(capsys, "info", "--fitted", own_dit)
    assert (said.code, said.err) == (0, "")
    assert "weights: w(t) over t = 0 to 1000: █▃" in said.out
    assert "relative to uniform: 1.5 0.5" in said.out
    assert "degree 1, penalty 0.1, from 30 images; beta 20; 0.250 +- 0.125 nats" in said.out
    assert "probes at even timesteps" in said.out and "no shortlist" in said.out
    said = call(capsys, "info", "--fitted", own_dit, "--json")
    assert json.loads(said.out)["loss_weights"] == HALVES.to_dict()
    clf = DiffusionClassifier.from_pretrained(own_dit)
    clf.model.timesteps, clf.model.loss_weights = TimestepWeights(1000, (1, 3), (3, 1)), None
    clf.save_fitted()
    said = call(capsys, "info", "--fitted", own_dit)
    assert "weights: uniform" in said.out and "relative to uniform: 0.5 1.5" in said.out


def test_info_of_the_zoo(capsys) -> None:
    from dive_fast.zoo import names

    assert "digits" in names()
    found = Path(__import__("dive_fast.zoo").zoo.__file__).parent / "weights" / "digits"
    said = call(capsys, "info", "--fitted", found)
    assert said.code == 0 and "shortlist: slope" in said.out and "weights: uniform" in said.out


def test_refused(own_dit: Path, data: Path, tmp_path: Path, capsys) -> None:
    for arguments, message in [
        (("--what", "weights"), "fitting weights needs --data"),
        (("--what", "weights", "--unlabelled", tmp_path), "fitting weights needs --data"),
        (("--what", "weights", "--generate", 30), "fitting weights needs --data"),
        (("--what", "weights", "--data", data, "--limit", 3), "20 images or more, got 3"),
        (("--what", "weights", "--data", data, "--probes", 9), "at least 2 probes in each of 20"),
        (("--what", "mass", "--data", data), "some of weights, timesteps, shortlist, beta"),
        (("--weights", "best", "--data", data), "invalid choice: 'best'"),
    ]:
        assert_refused(call(capsys, "fit", "--model", own_dit, *arguments), message)
    assert not (own_dit / "dive_fast.json").exists()
    said = call(capsys, "classify", data, "--model", own_dit, "--weights", "learned")
    assert said.code == 2
    said = call(capsys, "evaluate", "--data", data, "--model", own_dit, "--out", tmp_path / "run",
                "--weights", "learned")  # fmt: skip
    assert_refused(said, "has no learned weights; see fit_weights")
    options = ("--data", "scenes", "--weights", "learned", "--out", tmp_path / "run")
    assert_refused(call(capsys, "evaluate", *options), "--weights is for classifiers")
    said = call(capsys, "info", "--fitted", tmp_path / "nothing")
    assert_refused(said, "dive_fast.json")
    write_json(own_dit / "dive_fast.json", {"loss_weights": HALVES.to_dict() | {"beta": 0}})
    said = call(capsys, "info", "--fitted", own_dit)
    assert_refused(said, "loss_weights in .* cannot be used: beta must be above 0")
