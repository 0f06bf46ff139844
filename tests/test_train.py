"""Making a zoo model: resumed training gives the same weights, and the result is a model."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from command import assert_refused, call
from cut_off import cut_off
from PIL import Image

from dive_fast.data import digits
from dive_fast.errors import DataError, RunError
from dive_fast.models import load_model
from dive_fast.training import dit as training
from dive_fast.training.dit import (
    TrainingConfig,
    augment_images,
    build_transformer,
    train_transformer,
)
from dive_fast.training.zoo import write_model

CONFIG = TrainingConfig(
    sample_size=8, num_classes=10, patch_size=4, width=8, heads=1, layers=1, batch_size=4, steps=3
)


@pytest.fixture(scope="module")
def train() -> digits.Digits:
    return digits.load_digits("train")


def test_training_that_was_cut_off_goes_on(
    train: digits.Digits, tmp_path: Path, monkeypatch
) -> None:
    """Bit for bit the weights of the uncut run."""
    config = dataclasses.replace(CONFIG, steps=6)
    uncut, cut = tmp_path / "uncut", tmp_path / "cut"
    for folder in (uncut, cut):
        folder.mkdir()
    expected = train_transformer(*train, config, uncut, progress=False)
    calls = itertools.count(1)
    with cut_off() as ctrl_c, monkeypatch.context() as patch:

        def augment(*arguments) -> torch.Tensor:
            if next(calls) == 4:
                ctrl_c()
            return augment_images(*arguments)

        patch.setattr(training, "augment_images", augment)
        train_transformer(*train, config, cut, progress=False)
    assert torch.load(cut / "training.pt", weights_only=True)["step"] == 4
    found = train_transformer(*train, config, cut, progress=False)
    for name, weight in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], weight), name
    assert not torch.equal(found.proj_out_2.weight, torch.zeros_like(found.proj_out_2.weight))
    with pytest.raises(RunError, match="training run with another configuration"):
        train_transformer(*train, dataclasses.replace(config, seed=1), cut, progress=False)


def test_bf16(train: digits.Digits, tmp_path: Path) -> None:
    """Weights stay float32, and other ones come out, though not by much."""
    found = []
    for bf16 in (False, True):
        out = tmp_path / str(bf16)
        out.mkdir()
        config = dataclasses.replace(CONFIG, bf16=bf16)
        found.append(train_transformer(*train, config, out, progress=False).proj_out_2.weight)
    assert found[0].dtype == found[1].dtype == torch.float32
    assert not torch.equal(*found)
    torch.testing.assert_close(*found, atol=1e-3, rtol=0)


def test_the_seed_decides(train: digits.Digits, tmp_path: Path) -> None:
    def weights(seed: int, name: str) -> torch.Tensor:
        config = dataclasses.replace(CONFIG, seed=seed)
        (tmp_path / name).mkdir()
        return train_transformer(*train, config, tmp_path / name, progress=False).proj_out_1.weight

    first = weights(0, "first")
    assert torch.equal(weights(0, "again"), first)
    assert not torch.equal(weights(1, "other"), first)


def test_what_is_written_can_classify(train: digits.Digits, tmp_path: Path, capsys) -> None:
    transformer = train_transformer(*train, CONFIG, tmp_path, progress=False)
    model = tmp_path / "model"
    write_model(model, transformer, digits.NAMES)
    Image.fromarray(train.images[0]).save(tmp_path / "digit.png")
    said = call(capsys, "classify", tmp_path / "digit.png", "--model", model, "--probes", 2)
    assert (said.code, said.err) == (0, "")
    assert said.out.split()[1] in digits.NAMES


def test_checkpoints_are_models(train: digits.Digits, tmp_path: Path) -> None:
    final = train_transformer(
        *train,
        CONFIG,
        tmp_path,
        progress=False,
        checkpoints=(1, 3),
        keep=lambda step, model: write_model(tmp_path / f"checkpoint-{step}", model, digits.NAMES),
    )
    first, last = (load_model(tmp_path / f"checkpoint-{step}") for step in (1, 3))
    assert first.identity()["weights"] != last.identity()["weights"]
    assert torch.equal(last.network.proj_out_2.weight, final.proj_out_2.weight)


def test_blocks_start_as_the_identity() -> None:
    """adaLN-Zero: whatever the class and the time, an untrained network predicts zero."""
    model = build_transformer(dataclasses.replace(CONFIG, layers=2))
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        prediction = model(x, torch.tensor([1, 900]), torch.tensor([0, 10])).sample
    assert torch.equal(prediction, torch.zeros_like(x))


class TestBadInput:
    def test_out_is_a_file(self, tmp_path: Path, capsys) -> None:
        (tmp_path / "file").write_text("")
        said = call(capsys, "train", "digits", "--out", tmp_path / "file")
        assert_refused(said, "file cannot be made a directory")

    def test_out_holds_a_model(self, tmp_path: Path, capsys) -> None:
        write_model(tmp_path, build_transformer(CONFIG), digits.NAMES)
        said = call(capsys, "train", "digits", "--out", tmp_path)
        assert_refused(said, "holds a model already; choose another --out")

    def test_mnist_needs_its_file(self, tmp_path: Path, capsys) -> None:
        said = call(capsys, "train", "mnist", "--out", tmp_path / "out")
        assert_refused(said, "mnist is trained from a file: expected --data FILE.npz, got none")
        said = call(capsys, "train", "digits", "--out", tmp_path / "out", "--data", "x.npz")
        assert_refused(said, "expected no --data, got x.npz")
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("option", [["--steps", "0"], ["--seed", "-1"]], ids=" ".join)
    def test_options(self, option: list[str], tmp_path: Path, capsys) -> None:
        said = call(capsys, "train", "digits", "--out", tmp_path / "out", *option)
        assert_refused(said, f"{option[0]}: expected a whole number")
        assert not (tmp_path / "out").exists()

    def test_checkpoints_of_scenes(self, tmp_path: Path, capsys) -> None:
        said = call(capsys, "train", "scenes", "--out", tmp_path / "out", "--checkpoints", 2)
        assert_refused(said, "--checkpoints is for models that classify: expected none for scenes")
        assert not (tmp_path / "out").exists()

    def test_part(self) -> None:
        with pytest.raises(DataError, match="the parts 'train' and 'test', got 'validation'"):
            digits.load_digits("validation")


def test_the_split_is_fixed(train: digits.Digits) -> None:
    """The sizes, and the first digits of either part, as the zoo's model was trained on them."""
    held_out = digits.load_digits("test")
    assert (len(train.images), len(held_out.images)) == (1400, 397)
    both = np.concatenate([train.images, held_out.images])
    assert both.dtype == np.uint8 and both.shape[1:] == (8, 8)
    assert (both.min(), both.max()) == (0, 255)
    assert train.labels[:8].tolist() == [6, 6, 6, 2, 5, 6, 6, 2]
    assert held_out.labels[:8].tolist() == [2, 5, 7, 4, 5, 5, 2, 9]


def test_a_damaged_state_is_one_clear_sentence(train: digits.Digits, tmp_path: Path) -> None:
    (tmp_path / "training.pt").write_bytes(b"not a state")
    with pytest.raises(RunError, match=r"training\.pt is damaged and cannot be resumed from"):
        train_transformer(*train, CONFIG, tmp_path, progress=False)
