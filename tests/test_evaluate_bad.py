"""Data, options and directories that an evaluation cannot use."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from command import assert_refused, call, words
from evaluate_inputs import pixels, write_pictures

from dive_fast import DiffusionClassifier, DiveFastError, RunError
from dive_fast.data import DataSet, Example
from dive_fast.evaluation import evaluate


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_pictures(tmp_path / "data")


class TestBadInput:
    @pytest.mark.parametrize(
        ("data", "message"),
        [
            ("nowhere", "nowhere: expected 'digits', a folder by class, an .npz file, a table"),
            ("empty", "expected a sub-folder for each class, got none"),
            ("no images", "expected images in its sub-folders, got none"),
            ("unknown", "the model does not know the classes 'zebra'"),
            ("digits", "the model does not know the classes 'zero', 'one'"),
            ("text.npz", "text.npz: "),
            ("cut.npz", "unreadable, truncated or damaged"),
            ("keys.npz", "expected the arrays images and labels, or x_test and y_test"),
            ("shape.npz", r"expected images \[n, h, w\] .* got shape \(8, 8\)"),
            ("labels.npz", "expected labels 0 to 3, the model's classes, got 2 to 9"),
            ("lengths.npz", "got 2 images and 3 labels"),
        ],
    )
    def test_data(self, data: str, message: str, dit_dir: Path, tmp_path: Path, capsys) -> None:
        (tmp_path / "empty").mkdir()
        (tmp_path / "no images" / "star").mkdir(parents=True)
        (tmp_path / "unknown" / "zebra").mkdir(parents=True)
        (tmp_path / "text.npz").write_text("no archive")
        two = np.array([0, 1])
        np.savez(tmp_path / "keys.npz", pictures=pixels(2), labels=two)
        np.savez(tmp_path / "shape.npz", images=pixels(1)[0], labels=two)
        np.savez(tmp_path / "labels.npz", images=pixels(2), labels=np.array([2, 9]))
        np.savez(tmp_path / "lengths.npz", images=pixels(2), labels=np.array([0, 1, 2]))
        (tmp_path / "cut.npz").write_bytes((tmp_path / "labels.npz").read_bytes()[:200])
        out = tmp_path / "run"
        spec = data if data == "digits" else tmp_path / data
        said = call(capsys, "evaluate", "--model", dit_dir, "--data", spec, "--out", out)
        assert_refused(said, message)
        assert not out.exists()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--strategy", "guess"], "expected a strategy of"),
            (["--preset", "guess"], "expected a preset of"),
            (["--preset", "dive-paper", "--probes", "4"], "multiple of the batch of 25, got 4"),
            (["--preset", "diffusion-classifier", "--probes", "4"], "take 500 probes, got 4"),
            (["--limit", "0"], "--limit: expected a whole number of at least 1"),
            (["--seed", "-1"], "--seed: expected a whole number from 0"),
        ],
        ids=words,
    )
    def test_options(self, options, message, dit_dir, folder, tmp_path, capsys) -> None:
        """Refused before the run directory is made, which would then be of no use."""
        out = tmp_path / "run"
        arguments = ("evaluate", "--model", dit_dir, "--data", folder, "--out", out)
        assert_refused(call(capsys, *arguments, *options), message)
        assert not out.exists()

    def test_out(self, dit_dir: Path, folder: Path, capsys) -> None:
        arguments = ("evaluate", "--model", dit_dir, "--data", folder, "--probes", 2, "--out")
        said = call(capsys, *arguments, folder)
        assert_refused(said, "expected an empty directory or one with a run.json")
        said = call(capsys, *arguments, folder / "star" / "02.png")
        assert_refused(said, "expected a directory, got a file")

    def test_python(self, dit_dir: Path, tmp_path: Path) -> None:
        clf = DiffusionClassifier.from_pretrained(dit_dir)
        data = DataSet("one", [Example("0", 0, lambda: pixels(1)[0])], None)
        with pytest.raises(DiveFastError, match="at least 1, got 0"):
            evaluate(clf, data, tmp_path / "run", probes=0)
        (tmp_path / "other").write_text("")
        with pytest.raises(RunError, match="got one with 'other'"):
            evaluate(clf, data, tmp_path, probes=1)
