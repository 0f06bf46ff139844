"""What lies in a run directory at the end: summary.json, results.csv; and groups of images."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import stat
from pathlib import Path

import numpy as np
import pytest
from command import assert_refused, call
from run_records import record
from tiny import NAMES, read_json

from dive_fast import DataError, DiffusionClassifier, RunError
from dive_fast.data import DataSet, Example
from dive_fast.evaluation import RunDirectory, evaluate, read_records
from dive_fast.evaluation.outputs import write_outputs

CONFIG = {"model": {"family": "dit", "weights": "abc"}, "data": {"source": "photos", "count": 4}}


def write_run(path: Path, records: list[dict], config: dict = CONFIG, **facts: object) -> Path:
    with RunDirectory.open(path, config, {"model": "tiny"}, facts=facts) as run:
        for one in records:
            run.append(one)
    return path


def table(path: Path) -> list[dict[str, str]]:
    with open(path / "results.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def examples(n: int = 6, **columns: list) -> list[Example]:
    pixels = np.random.default_rng(0).integers(0, 256, (n, 8, 8), dtype=np.uint8)
    return [
        Example(f"{i}", i % 4, lambda i=i: pixels[i], {k: v[i] for k, v in columns.items()})
        for i in range(n)
    ]


class TestFiles:
    def test_keys_of_clip_benchmark(self, tmp_path: Path) -> None:
        run = write_run(tmp_path, [record("a", 0, [0.7, 0.3]), record("b", 1, [0.6, 0.4])])
        summary = write_outputs(run)
        found = read_json(run / "summary.json")
        head = {key: found[key] for key in ("dataset", "model", "pretrained", "task", "language")}
        assert head == {
            "dataset": "photos",
            "model": "tiny",
            "pretrained": "abc",
            "task": "zeroshot_classification",
            "language": "en",
        }
        assert found["metrics"] == {"acc1": 0.5, "acc5": None, "mean_per_class_recall": 0.5}
        assert summary.to_dict().items() <= found.items()

    def test_a_run_that_tells_nothing(self, tmp_path: Path) -> None:
        RunDirectory.open(tmp_path, {"model": "own"}).close()
        write_outputs(tmp_path)
        found = read_json(tmp_path / "summary.json")
        assert (found["dataset"], found["model"], found["pretrained"]) == ("", "own", "")
        assert found["metrics"]["acc1"] is None and found["n"] == 0
        assert table(tmp_path) == []

    def test_rows(self, tmp_path: Path) -> None:
        groups = {"eye": "left", "age": 3}
        run = write_run(
            tmp_path,
            [
                record("a, b\n\"c\"", 1, [0.5, 0.3, 0.2], groups=groups),
                {"id": "bad", "truth": 1, "error": "no image"},
                record("one", 0, [1.0, 0.0, 0.0], evaluations=30),
            ],
            names=["x", "y", "z"],
        )  # fmt: skip
        write_outputs(run)
        first, second, failed = table(run)
        assert first == {
            "id": "a, b\n\"c\"", "truth": "1", "truth_name": "y", "index": "0", "label": "x",
            "correct": "0", "probability": "0.5", "truth_probability": "0.3", "truth_rank": "2",
            "margin": "0.2", "evaluations": "10", "seconds": "0.5", "group_eye": "left",
            "group_age": "3", "error": "",
        }  # fmt: skip
        assert (second["correct"], second["margin"], second["evaluations"]) == ("1", "1", "30")
        assert second["group_eye"] == ""
        assert failed["id"] == "bad" and failed["error"] == "no image" and not failed["truth"]

    def test_one_class_has_no_margin(self, tmp_path: Path) -> None:
        write_outputs(write_run(tmp_path, [record("a", 0, [1.0])]))
        assert table(tmp_path)[0]["margin"] == ""

    @pytest.mark.parametrize("name", ["\udcff.png", "\ud800", "a\0b", "=1+1", "é\u2028x"])
    def test_names_of_any_bytes(self, name: str, tmp_path: Path) -> None:
        run = write_run(tmp_path, [record(name, 0, [0.7, 0.3], groups={name: name})])
        write_outputs(run)
        escaped = name.encode("utf-8", "backslashreplace").decode()
        (row,) = table(run)
        assert row["id"] == escaped and row[f"group_{escaped}"] == escaped
        assert list(read_json(run / "summary.json")["groups"]) == [name]

    def test_only_the_images_that_count(self, tmp_path: Path) -> None:
        run = write_run(
            tmp_path,
            [
                record("a", 0, [0.7, 0.3], groups={"eye": "left"}),
                record("b", 1, [0.7, 0.3], groups={"eye": "right"}),
                {"id": "c", "error": "no image"},
            ],
        )
        summary = write_outputs(run, ids={"a"})
        assert (summary.n, summary.failed, summary.accuracy) == (1, 0, 1)
        assert list(summary.groups["eye"].figures) == ["left"]
        assert [row["id"] for row in table(run)] == ["a"]

    def test_a_group_of_each_image_is_left_out(self, tmp_path: Path, caplog) -> None:
        records = [record(f"{i}", 0, [0.7, 0.3], groups={"n": i, "a": 0}) for i in range(1001)]
        summary = write_outputs(write_run(tmp_path, records))
        assert list(summary.groups) == ["a"]
        assert "the groups of the column 'n' are left out" in caplog.text

    def test_old_ones_are_replaced_and_keep_their_permissions(self, tmp_path: Path) -> None:
        run = write_run(tmp_path, [record("a", 0, [0.7, 0.3])])
        (run / "summary.json").write_text("old")
        os.chmod(run / "summary.json", 0o600)
        write_outputs(run)
        assert read_json(run / "summary.json")["n"] == 1
        assert stat.S_IMODE((run / "summary.json").stat().st_mode) == 0o600
        assert {p.name for p in run.iterdir()} <= {
            ".lock", "run.json", "results.jsonl", "summary.json", "results.csv"
        }  # fmt: skip

    def test_cannot_be_written(self, tmp_path: Path) -> None:
        run = write_run(tmp_path, [record("a", 0, [0.7, 0.3])])
        (run / "results.csv").mkdir()
        with pytest.raises(RunError, match="results.csv: cannot be written"):
            write_outputs(run)

    def test_no_run(self, tmp_path: Path) -> None:
        with pytest.raises(RunError, match="cannot be read"):
            write_outputs(tmp_path)


class TestEvaluate:
    def test_files_lie_beside_and_the_run_goes_on(self, dit_dir: Path, tmp_path: Path) -> None:
        clf = DiffusionClassifier.from_pretrained(dit_dir)
        data = DataSet("six", examples(), None)
        before = evaluate(clf, data, tmp_path / "run", probes=2)
        assert read_json(tmp_path / "run" / "summary.json")["n"] == before.n == 6
        rows = table(tmp_path / "run")
        assert {row["truth_name"] for row in rows} == set(NAMES)
        again = evaluate(clf, data, tmp_path / "run", probes=2)
        assert again.accuracy == before.accuracy and again.fill_rate is None

    def test_groups(self, dit_dir: Path, tmp_path: Path) -> None:
        clf = DiffusionClassifier.from_pretrained(dit_dir)
        columns = {"eye": ["left", "right"] * 3, "bright": [True] * 6, "other": list(range(6))}
        data = DataSet("six", examples(**columns), None)
        found = evaluate(clf, data, tmp_path / "run", probes=2, group_by=("eye", "bright", "eye"))
        run = read_json(tmp_path / "run" / "run.json")
        assert run["config"]["group_by"] == ["eye", "bright"]
        records = read_records(tmp_path / "run")
        assert records["1"]["groups"] == {"eye": "right", "bright": True}
        for side, of in found.groups["eye"].figures.items():
            own = [r for r in records.values() if r["groups"]["eye"] == side]
            assert of.n == 3 and of.top1 == np.mean([r["index"] == r["truth"] for r in own])
        assert list(found.groups["bright"].figures) == ["True"]
        assert set(read_json(tmp_path / "run" / "summary.json")["groups"]) == {"eye", "bright"}
        with pytest.raises(RunError, match="another configuration: group_by"):
            evaluate(clf, data, tmp_path / "run", probes=2)

    def test_an_image_without_a_value(self, dit_dir: Path, tmp_path: Path) -> None:
        clf = DiffusionClassifier.from_pretrained(dit_dir)
        some = examples(4, eye=["left"] * 4)
        data = DataSet("four", [dataclasses.replace(some[0], facts={}), *some[1:]], None)
        found = evaluate(clf, data, tmp_path / "run", probes=2, group_by=["eye"])
        assert {v: f.n for v, f in found.groups["eye"].figures.items()} == {"": 1, "left": 3}
        assert read_records(tmp_path / "run")["0"]["groups"] == {}

    def test_an_image_that_fails_has_its_groups(self, dit_dir: Path, tmp_path: Path) -> None:
        clf = DiffusionClassifier.from_pretrained(dit_dir)
        bad = Example("bad", 0, _cannot, {"eye": "left"})
        data = DataSet("two", [*examples(1, eye=["left"]), bad], None)
        found = evaluate(clf, data, tmp_path / "run", probes=2, group_by=["eye"])
        assert (found.n, found.failed) == (1, 1) and found.groups["eye"].figures["left"].n == 1

    @pytest.mark.parametrize(
        ("columns", "group_by", "sentence"),
        [
            ({}, ["eye"], r"expected a column of the data to group by \(none\), got 'eye'"),
            ({"age": [1] * 6}, ["eye"], r"to group by \(the columns 'age'\), got 'eye'"),
            (
                {"eye": [None] * 6},
                ["eye"],
                "expected a text or a number in the column 'eye' of '0'",
            ),
            ({"eye": [float("nan")] * 6}, ["eye"], "expected a text or a number"),
            ({}, "eye", "expected the names of columns to group by, got 'eye'"),
            ({}, [3], "expected the names of columns"),
        ],
    )
    def test_bad_columns(self, columns, group_by, sentence, dit_dir: Path, tmp_path: Path) -> None:
        clf = DiffusionClassifier.from_pretrained(dit_dir)
        data = DataSet("six", examples(**columns), None)
        with pytest.raises(DataError, match=sentence):
            evaluate(clf, data, tmp_path / "run", probes=2, group_by=group_by)
        assert not (tmp_path / "run").exists()

    def test_a_value_of_its_own_for_each_image(self, dit_dir: Path, tmp_path: Path) -> None:
        clf = DiffusionClassifier.from_pretrained(dit_dir)
        data = DataSet("many", examples(1001, name=list(range(1001))), None)
        with pytest.raises(
            DataError, match="at most 1000 values to group by, got 'name' with more"
        ):
            evaluate(clf, data, tmp_path / "run", probes=2, group_by=["name"])

    @pytest.mark.parametrize("groups", [[], {"eye": None}, {"eye": ["left"]}, "left", None])
    def test_bad_groups_in_a_record(self, groups: object, dit_dir: Path, tmp_path: Path) -> None:
        clf = DiffusionClassifier.from_pretrained(dit_dir)
        data = DataSet("one", examples(1, eye=["left"]), None)
        evaluate(clf, data, tmp_path / "run", probes=2, group_by=["eye"])
        path = tmp_path / "run" / "results.jsonl"
        path.write_text(json.dumps({**json.loads(path.read_text()), "groups": groups}) + "\n")
        with pytest.raises(RunError, match="line 1: expected 'groups' to be an object of texts"):
            read_records(tmp_path / "run")


def _cannot() -> None:
    from dive_fast.errors import ImageError

    raise ImageError("bad: cannot be read.")


class TestCommand:
    def test_no_columns(self, tmp_path: Path, capsys) -> None:
        said = call(
            capsys, "evaluate", "--data", "digits", "--limit", 2, "--out", tmp_path / "run",
            "--group-by", "eye",
        )  # fmt: skip
        assert_refused(said, "expected a column of the data to group by")

    def test_a_detector_has_no_groups(self, tmp_path: Path, capsys) -> None:
        said = call(capsys, "evaluate", "--data", "scenes", "--out", tmp_path, "--group-by", "eye")
        assert_refused(said, "--group-by is for classifiers")

    def test_text(self, tmp_path: Path) -> None:
        from dive_fast.cli.evaluate import classifier_text

        records = [
            record(str(i), i % 2, [0.7, 0.3], groups={"site": f"s{i:02}"}) for i in range(24)
        ]
        text = classifier_text(write_outputs(write_run(tmp_path, records)))
        head, groups = text.split("\n\n")
        assert [line[:25].strip() for line in head.splitlines()] == [
            "accuracy", "mean per-class accuracy", "AUROC", "macro F1", "calibration error",
            "-log p(truth), nats", "Brier score", "images", "evaluations per image",
            "seconds per image",
        ]  # fmt: skip
        lines = groups.splitlines()
        assert lines[0].split() == ["site", "images", "accuracy", "calibration", "error"]
        assert lines[1].split() == ["s01", "1", "0.00%", "+-", "0.00%", "70.00%"]
        assert len(lines) == 22 and lines[-1] == "and 4 more in summary.json"
