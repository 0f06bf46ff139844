"""Two runs side by side: figures by hand, and runs that do not belong together."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
from command import assert_refused, call
from run_records import record

from dive_fast.errors import RunError
from dive_fast.evaluation import RunDirectory
from dive_fast.evaluation.comparison import compare
from dive_fast.evaluation.records import Form


def write_run(path: Path, records: list[dict], source: str = "photos", **facts: object) -> Path:
    with RunDirectory.open(path, {"data": {"source": source}}, facts=facts) as run:
        for one in records:
            run.append(one)
    return path


def probabilities(index: int, p: float = 0.8) -> list[float]:
    rest = (1 - p) / 2
    return [p if row == index else rest for row in range(3)]


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    """Ten images of class 0 that both have: 4 both right, 3 A alone, 1 B alone, 2 both wrong."""
    a = [0, 0, 0, 0, 0, 0, 0, 1, 1, 2]
    b = [0, 0, 0, 0, 1, 1, 2, 0, 1, 1]
    first = [record(f"i{k}", 0, probabilities(c), evaluations=10) for k, c in enumerate(a)]
    second = [
        record(f"i{k}", 0, probabilities(c, 0.6), evaluations=40, seconds=0.25)
        for k, c in enumerate(b)
    ]
    write_run(tmp_path / "a", [*first, record("more", 1, probabilities(1))])
    write_run(tmp_path / "b", [*second[::-1], {"id": "more", "truth": 1, "error": "no image"}])
    return tmp_path / "a", tmp_path / "b"


def test_by_hand(runs: tuple[Path, Path]) -> None:
    found = compare(*runs)
    assert (found.n, found.a_lacks, found.b_lacks) == (10, 0, 1)
    assert (found.accuracy.a, found.accuracy.b) == (0.7, 0.5)
    assert found.accuracy.difference == pytest.approx(-0.2)
    differences = np.array([0] * 6 + [-1] * 3 + [1])
    assert found.accuracy.standard_error == pytest.approx(differences.std(ddof=1) / math.sqrt(10))
    # 3.5 and 1.5 of 12.
    half = 1.959964 * math.sqrt(5 - 4 / 12) / 12
    assert found.accuracy_interval == pytest.approx((-2 / 12 - half, -2 / 12 + half), abs=1e-6)
    # The same answer: 4 of class 0 and 1 of class 1. Wilson: (p + z^2 / 2n +- ...) / (1 + z^2 / n).
    assert found.agreement == 0.5
    z2 = 1.959964**2 / 10
    half = math.sqrt(z2 * (0.25 + z2 / 4)) / (1 + z2)
    assert found.agreement_interval == pytest.approx((0.5 - half, 0.5 + half), abs=1e-6)
    # 3 to 1: at least as far from 2 to 2 are 0, 1, 3 and 4 of 4.
    assert (found.a_right, found.b_right) == (3, 1)
    assert found.mcnemar == pytest.approx((1 + 4 + 4 + 1) / 16)
    assert (found.evaluations.a, found.evaluations.b, found.evaluations.ratio) == (10, 40, 4)
    assert found.seconds.ratio == 0.5 and found.seconds.difference == -0.25
    p = np.array([0.8] * 7 + [0.1] * 3), np.array([0.6] * 4 + [0.2] * 3 + [0.6] + [0.2] * 2)
    assert found.truth_probability.difference == pytest.approx((p[1] - p[0]).mean(), rel=1e-5)
    error = (p[1] - p[0]).std(ddof=1) / math.sqrt(10)
    assert found.truth_probability.standard_error == pytest.approx(error, rel=1e-5)
    assert found.nll.a == pytest.approx(-np.log(p[0]).mean())
    assert found.nll.ratio == pytest.approx(np.log(p[1]).mean() / np.log(p[0]).mean())


def test_the_other_way_round(runs: tuple[Path, Path]) -> None:
    there, back = compare(*runs), compare(*runs[::-1])
    assert back.accuracy.difference == -there.accuracy.difference
    assert back.accuracy_interval == pytest.approx([-x for x in there.accuracy_interval[::-1]])
    assert (back.mcnemar, back.agreement) == (there.mcnemar, there.agreement)
    assert (back.a_lacks, back.b_lacks) == (there.b_lacks, there.a_lacks)


def test_a_run_with_itself(runs: tuple[Path, Path]) -> None:
    found = compare(runs[0], runs[0])
    assert (found.agreement, found.mcnemar, found.a_right) == (1, 1, 0)
    low, high = found.accuracy_interval
    assert low == -high and high > 0  # ten images are not all
    assert found.nll.difference == 0


def test_one_image(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", [record("x", 0, probabilities(0), seconds=0)])
    b = write_run(tmp_path / "b", [record("x", 0, probabilities(1))])
    found = compare(a, b)
    assert (found.n, found.accuracy.difference, found.mcnemar) == (1, -1, 1)
    assert found.accuracy.standard_error is None and found.seconds.ratio is None
    assert -1 <= found.accuracy_interval[0] < found.accuracy_interval[1] <= 1


class TestRefused:
    def test_no_image_in_common(self, runs: tuple[Path, Path], tmp_path: Path) -> None:
        other = write_run(tmp_path / "c", [record("z", 0, probabilities(0))])
        with pytest.raises(RunError, match="a and .*c have no answered image in common"):
            compare(runs[0], other)

    def test_nothing_answered(self, runs: tuple[Path, Path], tmp_path: Path) -> None:
        RunDirectory.open(tmp_path / "c", {}).close()
        with pytest.raises(RunError, match="no answered image in common"):
            compare(runs[0], tmp_path / "c")

    def test_other_truth(self, runs: tuple[Path, Path], tmp_path: Path) -> None:
        other = write_run(tmp_path / "c", [record("i3", 2, probabilities(0))])
        with pytest.raises(RunError, match="the image 'i3' of class 0 in .*a and 2 in .*c"):
            compare(runs[0], other)

    def test_other_number_of_classes(self, runs: tuple[Path, Path], tmp_path: Path) -> None:
        other = write_run(tmp_path / "c", [record("i3", 0, [0.6, 0.4])])
        with pytest.raises(RunError, match="the same classes, got 3 in .*a and 2 in .*c"):
            compare(runs[0], other)

    def test_other_names(self, runs: tuple[Path, Path], tmp_path: Path) -> None:
        names = ["c0", "dog", "c2"]
        other = write_run(tmp_path / "c", [record("i3", 0, probabilities(0))], names=names)
        with pytest.raises(RunError, match="got 'c1' as class 1 in .*a and 'dog' in .*c"):
            compare(runs[0], other)

    def test_other_data_are_warned_of(self, runs, tmp_path: Path, caplog) -> None:
        other = write_run(tmp_path / "c", [record("i3", 0, probabilities(0))], source="x")
        assert compare(runs[0], other).n == 1
        assert "is of the data 'photos' and" in caplog.text and "of 'x': images" in caplog.text

    def test_a_detector(self, runs: tuple[Path, Path], tmp_path: Path, capsys) -> None:
        RunDirectory.open(tmp_path / "c", {}, form=Form("detection")).close()
        said = call(capsys, "compare-runs", runs[0], tmp_path / "c")
        assert_refused(said, "expected a run of a classifier, got one of a detector")

    def test_no_run(self, runs: tuple[Path, Path], tmp_path: Path, capsys) -> None:
        assert_refused(call(capsys, "compare-runs", runs[0], tmp_path), "run.json: cannot be read")

    def test_csv_that_cannot_be_written(self, runs, tmp_path: Path, capsys) -> None:
        said = call(capsys, "compare-runs", *runs, "--csv", tmp_path / "no" / "x.csv")
        assert_refused(said, "x.csv: cannot be written")


class TestCommand:
    def test_text(self, runs: tuple[Path, Path], capsys) -> None:
        said = call(capsys, "compare-runs", *runs)
        assert (said.code, said.err) == (0, "")
        lines = {line[:22].strip(): line[22:].split() for line in said.out.splitlines()}
        assert lines["accuracy"][:3] == ["70.00%", "50.00%", "-20.00%"]
        assert lines["evaluations per image"] == ["10", "40", "4", "times", "A's"]
        assert lines["right in one alone"] == ["A", "3,", "B", "1"]
        assert lines["McNemar, exact"] == ["p", "=", "0.625"]
        assert " ".join(lines["images"]) == "10 (A lacks 0 of B's, B 1 of A's)"

    def test_json(self, runs: tuple[Path, Path], capsys) -> None:
        said = call(capsys, "compare-runs", *runs, "--json")
        found = json.loads(said.out)
        assert (said.code, found["n"], found["agreement"]) == (0, 10, 0.5)
        assert found["accuracy"]["a"] == 0.7 and len(found["agreement_interval"]) == 2

    def test_csv(self, runs: tuple[Path, Path], tmp_path: Path, capsys) -> None:
        assert call(capsys, "compare-runs", *runs, "--csv", tmp_path / "x.csv").code == 0
        with open(tmp_path / "x.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        assert [row["id"] for row in rows] == ["i4", "i5", "i6", "i7", "i9"]
        assert rows[0] == {
            "id": "i4", "truth": "0", "truth_name": "c0", "a_index": "0", "a_label": "c0",
            "a_correct": "1", "a_probability": "0.8", "a_truth_probability": "0.8",
            "b_index": "1", "b_label": "c1", "b_correct": "0", "b_probability": "0.6",
            "b_truth_probability": "0.2",
        }  # fmt: skip
