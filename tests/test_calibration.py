"""Temperature and calibration error: what they compute, what they refuse, how they are stored."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from command import assert_refused, call
from tiny import read_json, write_json, write_model
from toy_model import ToyModel

from dive_fast import DiffusionClassifier, DiveFastError, ModelError
from dive_fast.predict.calibration import (
    calibrate,
    expected_calibration_error,
    fit_beta,
    fit_beta_with_lapses,
)

NAN, INF = math.nan, math.inf


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(n: int, beta: float, c: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses [n, c], and labels drawn from softmax(-beta losses)."""
    g = generator()
    losses = 0.1 + 0.02 * torch.rand(n, c, generator=g)
    return losses, torch.multinomial((-beta * losses).softmax(1), 1, generator=g)[:, 0]


class TestExpectedCalibrationError:
    @pytest.mark.parametrize(("n", "bins"), [(1, 15), (7, 3), (400, 15), (63, 1)])
    def test_against_a_direct_loop(self, n: int, bins: int) -> None:
        confidence = torch.rand(n, generator=generator(n), dtype=torch.float64)
        correct = torch.rand(n, generator=generator(n + 1)) < 0.7
        expected = 0.0
        for m in range(bins):
            low, high = m / bins, (m + 1) / bins
            inside = [i for i in range(n) if low < confidence[i] <= high]
            if inside:
                accuracy = sum(bool(correct[i]) for i in inside) / len(inside)
                mean = sum(confidence[i].item() for i in inside) / len(inside)
                expected += len(inside) / n * abs(accuracy - mean)
        found = expected_calibration_error(confidence, correct, bins)
        assert found == pytest.approx(expected, abs=1e-12)

    def test_borders_belong_to_the_lower_bin(self) -> None:
        # 0.5 lies in (0, 0.5] with 0.1: one bin of accuracy 1/2 and confidence 0.3.
        assert expected_calibration_error([0.5, 0.1], [True, False], 2) == pytest.approx(0.2)
        assert expected_calibration_error([0.0, 1.0], [False, True]) == 0
        assert expected_calibration_error([1.0], [False]) == 1

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (([], []), r"n >= 1, got \[0\]"),
            (([0.5], [True, False]), r"got \[1\] and \[2\]"),
            (([[0.5]], [[True]]), r"got \[1, 1\]"),
            (([1.1], [True]), r"lie in \[0, 1\]"),
            (([NAN], [True]), r"lie in \[0, 1\]"),
            (([0.5], [2]), "true or false"),
            (([0.5], [True], 0), "bins must be at least 1, got 0"),
        ],
    )
    def test_bad_input(self, arguments: tuple, message: str) -> None:
        with pytest.raises(DiveFastError, match=message):
            expected_calibration_error(*arguments)


class TestFitBeta:
    def test_finds_the_temperature_that_drew_the_labels(self) -> None:
        assert fit_beta(*drawn(4000, 150.0)) == pytest.approx(150, rel=0.1)

    @pytest.mark.parametrize(("n", "c"), [(1, 2), (40, 3), (300, 10)])
    def test_the_slope_of_the_likelihood_is_0_there(self, n: int, c: int) -> None:
        losses, labels = drawn(n, 150.0, c)
        energy = losses.double() - losses.double().mean()
        target = torch.full((n, c), 1 / (n + 2) / (c - 1), dtype=torch.float64)
        target[range(n), labels] = (n + 1) / (n + 2)

        def slope(beta: float) -> float:
            return ((target - (-beta * energy).softmax(dim=1)) * energy).sum().item()

        low, high = 1e-3, 1e7  # it rises with beta, and stays at a border if it never is 0
        for _ in range(200):
            middle = math.sqrt(low * high)
            low, high = (low, middle) if slope(middle) > 0 else (middle, high)
        assert fit_beta(losses, labels) == pytest.approx(low, rel=1e-5)

    def test_losses_that_favour_wrong_answers(self) -> None:
        assert fit_beta(torch.eye(4), torch.arange(4)) == pytest.approx(1e-3, rel=1e-5)

    def test_losses_that_say_nothing(self) -> None:
        assert fit_beta(torch.full((3, 4), 0.3), [0, 1, 2]) == pytest.approx(1e7, rel=1e-5)

    def test_stays_finite_where_every_answer_is_right(self) -> None:
        losses = torch.eye(4) * -0.1 + 0.5
        assert 1 < fit_beta(losses, torch.arange(4)) < 1000

    def test_classes_without_a_measurement_take_no_part(self) -> None:
        losses, labels = drawn(2000, 150.0, c=3)
        wider = torch.cat([losses, torch.full((2000, 4), NAN)], dim=1)
        assert fit_beta(wider, labels) == pytest.approx(fit_beta(losses, labels), rel=1e-6)

    def test_an_image_whose_label_was_not_measured_has_no_say(self) -> None:
        losses, labels = drawn(300, 150.0)
        lost = losses[:50].clone()
        lost[torch.arange(50), labels[:50]] = NAN
        both = fit_beta(torch.cat([losses, lost]), torch.cat([labels, labels[:50]]))
        assert both == pytest.approx(fit_beta(losses, labels), rel=1e-6)

    @pytest.mark.parametrize(
        ("losses", "labels", "message"),
        [
            (torch.eye(4), torch.arange(3), r"labels must have shape \[4\], .* got \[3\]"),
            (torch.eye(4), torch.arange(4) + 1, r"lie in \[0, 4\), got 1 to 4"),
            (torch.eye(4), torch.arange(4) - 1, "got -1 to 2"),
            (torch.eye(2), [0.0, 1.0], "whole numbers, got torch.float32"),
            (torch.eye(2), None, "whole numbers, one for each of 2 images"),
            (torch.eye(2), ["a", "b"], "whole numbers"),
            (torch.zeros(4), torch.arange(4), r"losses \[B, C\]"),
            (torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), "at least one image"),
            (torch.tensor([[1.0, INF]]), [0], "got infinity"),
            (torch.tensor([[NAN, NAN]]), [0], "one without any"),
            (torch.tensor([[1.0, NAN]]), [0], "beside another class, got none"),
            (torch.tensor([[1.0, 2.0, NAN]]), [2], "beside another class, got none"),
        ],
    )
    def test_bad_input(self, losses: torch.Tensor, labels: object, message: str) -> None:
        with pytest.raises(DiveFastError, match=message):
            fit_beta(losses, labels)


class TestRecord:
    def test_figures_against_the_definition(self) -> None:
        losses, labels = drawn(500, 150.0)
        record = calibrate(losses, labels, 20.0)
        for beta, ece, nll in (
            (20.0, record.ece_before, record.nll_before),
            (record.beta_after, record.ece_after, record.nll_after),
        ):
            p = (-beta * losses.double()).softmax(dim=1)
            best, index = p.max(dim=1)
            assert ece == pytest.approx(expected_calibration_error(best, index == labels))
            assert nll == pytest.approx(-p.gather(1, labels[:, None]).log().mean().item())
        assert record.ece_after < record.ece_before and record.nll_after < record.nll_before
        assert (record.beta_before, record.n, record.unmeasured) == (20.0, 500, 0)
        assert "expected calibration error" in str(record) and "not measured" not in str(record)

    def test_a_label_that_was_not_measured_counts_as_wrong(self) -> None:
        losses = torch.tensor([[0.1, 0.2, NAN], [0.1, 0.2, NAN]])
        record = calibrate(losses, [0, 2], 10.0)
        p = 1 / (1 + math.exp(-1))
        assert record.unmeasured == 1 and "label not measured" in str(record)
        assert record.nll_before == pytest.approx((-math.log(p) - math.log(1e-6)) / 2)
        assert record.ece_before == pytest.approx(abs(0.5 - p))

    def test_the_answer_need_not_have_the_lowest_loss(self) -> None:
        losses = torch.tensor([[0.1, 0.2], [0.1, 0.2]])
        record = calibrate(losses, [0, 0], 10.0, torch.tensor([1, 1]))
        assert record.ece_before == pytest.approx(1 / (1 + math.e))


class TestClassifier:
    @pytest.fixture
    def toy_and_60_images(self) -> tuple[DiffusionClassifier, torch.Tensor, torch.Tensor]:
        model = ToyModel(n_classes=6, spread=0.4)
        return DiffusionClassifier(model), *model.toy.sample(60, generator(3))

    @pytest.mark.parametrize("strategy", ["enumerate", "race", "invert"])
    def test_probabilities_become_likelier(self, toy_and_60_images: tuple, strategy: str) -> None:
        clf, x0, labels = toy_and_60_images
        clf.model.inverse_temperature = 1.0
        record = clf.calibrate(latents=x0, labels=labels, strategy=strategy, probes=40)
        assert record.beta_before == 1.0 and clf.model.inverse_temperature == record.beta_after
        assert record.nll_after < record.nll_before
        answers = clf(latents=x0, strategy=strategy, probes=40)
        correct = [a.index == y for a, y in zip(answers, labels.tolist(), strict=True)]
        ece = expected_calibration_error([a.probability for a in answers], correct)
        assert ece == pytest.approx(record.ece_after, abs=1e-4)

    def test_bad_input(self, toy_and_60_images: tuple) -> None:
        clf, x0, labels = toy_and_60_images
        before = clf.model.inverse_temperature
        for arguments, message in [
            ({"labels": labels}, "either images or latents"),
            ({"latents": x0}, "whole numbers"),
            ({"latents": x0, "labels": labels[:3]}, r"shape \[60\], .* got \[3\]"),
            ({"latents": x0, "labels": labels + 6}, r"lie in \[0, 6\)"),
            ({"latents": x0, "labels": labels, "strategy": "guess"}, "expected a strategy"),
            ({"latents": x0, "labels": labels, "probes": 0}, "at least 1, got 0"),
            ({"latents": x0[:0], "labels": labels[:0]}, "at least one"),
        ]:
            with pytest.raises(DiveFastError, match=message):
                clf.calibrate(**arguments)
        assert clf.model.inverse_temperature == before


class TestStored:
    @pytest.fixture
    def directory(self, tmp_path: Path) -> Path:
        write_model(tmp_path / "model")
        write_json(tmp_path / "model" / "dive_fast.json", {"beta": 3, "command": "made so"})
        return tmp_path / "model"

    def test_round_trip_keeps_other_entries(self, directory: Path) -> None:
        clf = DiffusionClassifier.from_pretrained(directory)
        assert clf.model.inverse_temperature == 3
        clf.model.inverse_temperature = 0.1 + 0.2
        assert clf.save_fitted() == directory / "dive_fast.json"
        assert read_json(directory / "dive_fast.json") == {"beta": 0.1 + 0.2, "command": "made so"}
        assert DiffusionClassifier.from_pretrained(directory).model.inverse_temperature == 0.1 + 0.2
        assert [p.name for p in directory.glob(".dive_fast*")] == []

    def test_another_directory(self, directory: Path, tmp_path: Path) -> None:
        clf = DiffusionClassifier(ToyModel())
        with pytest.raises(ModelError, match="toy has no model directory of yours .* give one"):
            clf.save_fitted()
        clf.save_fitted(tmp_path / "new" / "place")
        other = DiffusionClassifier.from_pretrained(directory)
        other.load_fitted(tmp_path / "new" / "place")
        assert other.model.inverse_temperature == clf.model.inverse_temperature
        with pytest.raises(ModelError, match="digits has no model directory of yours"):
            DiffusionClassifier.from_pretrained("digits").save_fitted()

    def test_what_cannot_be_read_or_written(self, directory: Path, tmp_path: Path) -> None:
        clf = DiffusionClassifier.from_pretrained(directory)
        path = directory / "dive_fast.json"
        with pytest.raises(ModelError, match="expected dive_fast.json in .*found none"):
            clf.load_fitted(tmp_path)
        for beta in (0, -1.0, "1", True, [1.0]):
            write_json(path, {"beta": beta})
            with pytest.raises(ModelError, match="beta in .* must be above 0"):
                clf.load_fitted(directory)
        path.write_text('{"beta": ')
        with pytest.raises(ModelError, match="cannot be read as JSON"):
            clf.save_fitted()
        assert path.read_text() == '{"beta": '
        (tmp_path / "file").write_text("")
        with pytest.raises(ModelError, match="cannot be written"):
            clf.save_fitted(tmp_path / "file")

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
    def test_a_read_only_directory(self, directory: Path) -> None:
        clf = DiffusionClassifier.from_pretrained(directory)
        directory.chmod(0o500)
        with pytest.raises(ModelError, match="cannot be written: Permission denied"):
            clf.save_fitted()


class TestCommand:
    @pytest.fixture
    def data(self, tmp_path: Path) -> Path:
        images = np.random.default_rng(0).integers(0, 256, (12, 8, 8), dtype=np.uint8)
        np.savez(tmp_path / "data.npz", x_train=images, y_train=np.arange(12) % 4)
        return tmp_path / "data.npz"

    def test_fit_writes_beside_the_model(self, data: Path, tmp_path: Path, capsys) -> None:
        model = write_model(tmp_path / "model")
        arguments = ("fit", "--what", "beta", "--data", data, "--model", model, "--probes", 5)
        said = call(capsys, *arguments)
        assert (said.code, said.err) == (0, "")
        assert "expected calibration error" in said.out
        assert said.out.endswith(f"written to {model / 'dive_fast.json'}\n")
        clf = DiffusionClassifier.from_pretrained(model)
        assert clf.model.inverse_temperature == read_json(model / "dive_fast.json")["beta"]
        assert read_json(model / "model_index.json")

        said = call(capsys, *arguments, "--limit", 6, "--out", tmp_path / "out")
        assert said.code == 0
        other = read_json(tmp_path / "out" / "dive_fast.json")["beta"]
        assert other != clf.model.inverse_temperature
        np.savez(tmp_path / "test.npz", images=np.load(data)["x_train"], labels=np.arange(12) % 4)
        said = call(
            capsys, "evaluate", "--data", tmp_path / "test.npz", "--model", model, "--probes", 2,
            "--fitted", tmp_path / "out", "--out", tmp_path / "run",
        )  # fmt: skip
        assert said.code == 0 and "calibration error" in said.out
        assert read_json(tmp_path / "run" / "run.json")["config"]["beta"] == other

    def test_refused(self, data: Path, tmp_path: Path, capsys) -> None:
        for arguments, message in [
            ((), "needs --data, --unlabelled or --generate"),
            (("--data", data), "digits has no model directory .* with --out"),
            (("--data", tmp_path, "--out", tmp_path), "expected a sub-folder for each class"),
            (("--data", data, "--fitted", tmp_path), "expected dive_fast.json in"),
            (("--data", data, "--strategy", "guess"), "expected a strategy"),
        ]:
            assert_refused(call(capsys, "fit", *arguments), message)


class TestLapses:
    def test_one_wrong_answer_does_not_decide(self) -> None:
        losses, labels = drawn(500, 150.0)
        clean = fit_beta_with_lapses(losses, labels, 0.05)
        assert clean == pytest.approx(fit_beta(losses, labels), rel=0.35)
        # Of ten images the losses favour a wrong class by far.
        losses, labels = losses.clone(), labels.clone()
        losses[:10] = 10.0
        losses[range(10), (labels[:10] + 1) % losses.shape[1]] = 0.0
        assert fit_beta_with_lapses(losses, labels, 0.05) == pytest.approx(clean, rel=0.35)
        assert fit_beta(losses, labels) < 0.2 * clean

    def test_finite_where_all_is_explained(self) -> None:
        found = fit_beta_with_lapses(torch.tensor([[0.0, 1.0]] * 9), [0] * 9, 0.05)
        assert 1 < found < 10

    def test_the_record_counts_them(self) -> None:
        losses, labels = drawn(100, 150.0)
        record = calibrate(losses, labels, 20.0, lapse=0.1)
        p = (-20.0 * losses.double()).softmax(dim=1).gather(1, labels[:, None])
        expected = -(0.9 * p + 0.1 / losses.shape[1]).log().mean().item()
        assert record.nll_before == pytest.approx(expected)
        assert record.beta_after == fit_beta_with_lapses(losses, labels, 0.1)

    @pytest.mark.parametrize(
        ("losses", "lapse", "said"),
        [
            (torch.tensor([[NAN, 1.0]]), 0.05, "losses must be finite"),
            (torch.eye(2)[:1], 0.0, r"lapse must lie in \(0, 1\), got 0.0"),
            (torch.eye(2)[:1], 1.0, r"lapse must lie in \(0, 1\), got 1.0"),
        ],
    )
    def test_bad_input(self, losses: torch.Tensor, lapse: float, said: str) -> None:
        with pytest.raises(DiveFastError, match=said):
            fit_beta_with_lapses(losses, [0], lapse)
