"""``dive-fast fit`` of timesteps, and what ``evaluate`` makes of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from command import assert_refused, call
from tiny import read_json, write_model

from dive_fast import DiffusionClassifier
from dive_fast.core.timesteps import TimestepWeights

LOPSIDED = TimestepWeights(1000, (0, 3, 0, 1), (1, 2, 3, 4))


class TestCommand:
    @pytest.fixture
    def own_dit(self, tmp_path: Path) -> Path:
        return write_model(tmp_path / "model")

    @pytest.fixture
    def data(self, tmp_path: Path) -> Path:
        images = np.random.default_rng(0).integers(0, 256, (8, 8, 8), dtype=np.uint8)
        np.savez(tmp_path / "data.npz", images=images, labels=np.arange(8) % 4)
        return tmp_path / "data.npz"

    def test_fit_both(self, own_dit: Path, data: Path, capsys) -> None:
        said = call(capsys, "fit", "--data", data, "--model", own_dit, "--probes", 40)
        assert (said.code, said.err) == (0, "")
        assert "relative to uniform" in said.out and "expected calibration error" in said.out
        stored = read_json(own_dit / "dive_fast.json")
        clf = DiffusionClassifier.from_pretrained(own_dit)
        assert clf.model.timesteps.to_dict() == stored["timesteps"]
        assert clf.model.inverse_temperature == stored["beta"]

    def test_fit_without_data(self, own_dit: Path, capsys) -> None:
        said = call(capsys, "fit", "--generate", 4, "--model", own_dit)
        assert (said.code, said.err) == (0, "")
        assert "expected calibration error" not in said.out
        assert "timesteps" in read_json(own_dit / "dive_fast.json")

    def test_a_run_with_other_timesteps_is_refused(self, own_dit, data, tmp_path, capsys) -> None:
        clf = DiffusionClassifier.from_pretrained(own_dit)
        clf.model.timesteps = LOPSIDED
        clf.save_fitted()
        out = tmp_path / "run"
        arguments = ("evaluate", "--data", data, "--model", own_dit, "--probes", 2, "--out", out)
        assert call(capsys, *arguments).code == 0
        assert read_json(out / "run.json")["config"]["timesteps"] == LOPSIDED.to_dict()
        assert call(capsys, *arguments, "--timesteps", "learned").code == 0
        said = call(capsys, *arguments, "--timesteps", "uniform")
        assert_refused(said, "another configuration: timesteps is .* there and not set here")
        said = call(capsys, *arguments[:-1], tmp_path / "other", "--timesteps", "uniform")
        assert "timesteps" not in read_json(tmp_path / "other" / "run.json")["config"]

    def test_refused(self, own_dit: Path, data: Path, capsys) -> None:
        for arguments, message in [
            ((), "fitting timesteps and shortlist needs --data, --unlabelled or --generate"),
            (("--what", "beta"), "fitting beta needs --data"),
            (("--what", "timesteps,beta", "--generate", 3), "timesteps and beta needs --data"),
            (
                ("--what", "loss"),
                "some of weights, timesteps, shortlist, beta, search, got 'loss'",
            ),
            (("--generate", 0), "whole number of at least 1, got '0'"),
            (("--data", data, "--model", "digits"), "digits has no model directory"),
        ]:
            assert_refused(call(capsys, "fit", "--model", own_dit, *arguments), message)
        assert not (own_dit / "dive_fast.json").exists()
        said = call(capsys, "classify", data, "--model", own_dit, "--timesteps", "best")
        assert_refused(said, "invalid choice: 'best'")
