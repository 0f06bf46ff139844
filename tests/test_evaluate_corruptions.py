"""``evaluate --corruption``: one run for each, a table of all, and going on after a kill."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command import Said, assert_refused, call
from evaluate_inputs import write_pictures
from tiny import NAMES

from dive_fast import DiffusionClassifier
from dive_fast.data import corrupted, open_dataset
from dive_fast.data.corruptions import Corruption
from dive_fast.errors import DiveFastError
from dive_fast.evaluation import evaluate, evaluate_corruptions, read_records
from dive_fast.report import write_report

ROOT = Path(__file__).parent.parent
FOLDERS = ["clean", "brightness-2", "brightness-3", "shot_noise-5"]
ASKED = ("--corruption", "brightness:2-3", "--corruption", "shot_noise:5")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("data"))


@pytest.fixture
def run(capsys, dit_dir: Path, folder: Path, tmp_path: Path):
    def command(*more: object, data: object = folder, out: str = "out") -> Said:
        given = ("--data", data, "--out", tmp_path / out, "--strategy", "enumerate", "--probes", 4)
        return call(capsys, "evaluate", "--model", dit_dir, *given, *more)

    return command


def answers(path: Path) -> dict[str, tuple]:
    return {key: (r["index"], tuple(r["losses"])) for key, r in read_records(path).items()}


def test_one_run_each_and_a_table(run, dit_dir: Path, folder: Path, tmp_path: Path) -> None:
    said = run(*ASKED)
    assert (said.code, said.err) == (0, "")
    out = tmp_path / "out"
    assert sorted(p.name for p in out.iterdir() if p.is_dir()) == sorted(FOLDERS)
    # Each run is that of the corrupted data set, evaluated by itself.
    classifier = DiffusionClassifier.from_pretrained(dit_dir)
    clean = open_dataset(folder, NAMES)
    data = corrupted(clean, "shot_noise", 5, image_shape=classifier.model.image_shape)
    evaluate(classifier, data, tmp_path / "own", strategy="enumerate", probes=4)
    assert answers(tmp_path / "own") == answers(out / "shot_noise-5")
    told = json.loads((out / "shot_noise-5" / "run.json").read_text())["config"]["data"]
    assert told["corruption"]["name"] == "shot_noise" and told["corruption"]["severity"] == 5
    assert (
        "corruption" not in json.loads((out / "clean" / "run.json").read_text())["config"]["data"]
    )

    # The table, from the records by hand.
    wrong = [
        {key: r["index"] != r["truth"] for key, r in read_records(out / name).items()}
        for name in FOLDERS
    ]
    errors = [sum(found.values()) / 12 for found in wrong]
    table = json.loads((out / "corruptions.json").read_text())
    assert [row["run"] for row in table["rows"]] == FOLDERS
    for row, error in zip(table["rows"], errors, strict=True):
        assert row["accuracy"]["value"] == pytest.approx(1 - error)
        assert row["relative"]["value"] == pytest.approx(error - errors[0])
    bright = (errors[1] + errors[2]) / 2
    assert table["errors"]["brightness"]["value"] == pytest.approx(bright)
    assert table["mean_error"]["value"] == pytest.approx((bright + errors[3]) / 2)
    per_image = [
        (wrong[1][key] / 2 + wrong[2][key] / 2 + wrong[3][key]) / 2 - wrong[0][key]
        for key in wrong[0]
    ]
    mean = sum(per_image) / 12
    assert table["mean_relative"]["value"] == pytest.approx(mean)
    spread = math.sqrt(sum((value - mean) ** 2 for value in per_image) / 11 / 12)
    assert table["mean_relative"]["standard_error"] == pytest.approx(spread)
    with open(out / "corruptions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["run"] for row in rows] == FOLDERS
    assert float(rows[3]["accuracy"]) == pytest.approx(1 - errors[3])
    assert "mean corruption error" in said.out and "brightness, mean" in said.out

    # Again, nothing is computed; more is added beside it.
    before = [(out / name / "results.jsonl").read_bytes() for name in FOLDERS]
    again = run(*ASKED, "--json")
    assert json.loads(again.out) == table
    assert [(out / name / "results.jsonl").read_bytes() for name in FOLDERS] == before
    assert run("--corruption", "contrast:1").code == 0
    assert (out / "contrast-1").is_dir()


def test_seed_and_readers(run, tmp_path: Path) -> None:
    """Reading in other processes gives the same pictures; another seed others."""
    assert run("--corruption", "gaussian_noise:4", "--readers", 0).code == 0
    assert run("--corruption", "gaussian_noise:4", "--readers", 2, out="read").code == 0
    here, there = (tmp_path / out / "gaussian_noise-4" for out in ("out", "read"))
    assert answers(here) == answers(there)
    said = run("--corruption", "gaussian_noise:4", "--seed", 1)
    assert_refused(said, "another configuration: .*seed is 0 there and 1 here")


def test_shards(run, capsys, tmp_path: Path) -> None:
    assert run("--corruption", "gaussian_noise:4").code == 0
    for number in (1, 2):
        said = run("--corruption", "gaussian_noise:4", "--shard", f"{number}/2", out="parts")
        assert said.code == 0 and said.out.count(" 6\n") == 2
    assert not (tmp_path / "parts" / "corruptions.json").exists()
    for name in ("clean", "gaussian_noise-4"):
        assert call(capsys, "merge", tmp_path / "parts" / name).code == 0
        assert answers(tmp_path / "parts" / name) == answers(tmp_path / "out" / name)
    assert run("--corruption", "gaussian_noise:4", out="parts").code == 0
    tables = [json.loads((tmp_path / o / "corruptions.json").read_text()) for o in ("out", "parts")]
    assert tables[0]["mean_error"] == pytest.approx(tables[1]["mean_error"])


def test_a_bad_image_is_told_in_each_run(run, tmp_path: Path) -> None:
    data = write_pictures(tmp_path / "data")
    (data / NAMES[0] / "00.png").write_text("none")
    said = run("--corruption", "contrast:1", data=data)
    assert said.code == 2 and "images that failed, in all runs: 2" in said.out
    assert len(said.err.splitlines()) == 2 and "Traceback" not in said.err
    table = json.loads((tmp_path / "out" / "corruptions.json").read_text())
    assert (table["n"], table["failed"], table["rows"][1]["n"]) == (11, 2, 11)


def test_no_image_can_be_read(run, tmp_path: Path) -> None:
    data = write_pictures(tmp_path / "data")
    for path in data.rglob("*.png"):
        path.write_text("none")
    said = run("--corruption", "contrast:1", data=data)
    assert said.code == 2 and "mean corruption error" in said.out
    table = json.loads((tmp_path / "out" / "corruptions.json").read_text())
    assert table["mean_error"] == {"value": None, "standard_error": None}


def test_after_a_kill(run, dit_dir: Path, folder: Path, tmp_path: Path) -> None:
    """Killed in the second run: nothing repeated, nothing lost, and the same answers."""
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "dive_fast", "evaluate", "--model", dit_dir, "--data", folder]
    command += ["--out", out, "--strategy", "enumerate", "--probes", 400, "--batch-size", 4]
    command += ["--corruption", "gaussian_noise:4"]
    process = subprocess.Popen(
        list(map(str, command)),
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    results, end = out / "gaussian_noise-4" / "results.jsonl", time.monotonic() + 240
    while not (results.exists() and results.read_bytes().count(b"\n") >= 2):
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = results.read_bytes()
    before = before[: before.rfind(b"\n") + 1]
    assert 2 <= before.count(b"\n") < 12 and not (out / "corruptions.json").exists()
    more = ("--corruption", "gaussian_noise:4", "--probes", 400)
    assert run(*more, out="killed").code == 0
    assert results.read_bytes().startswith(before) and results.read_bytes().count(b"\n") == 12
    assert run(*more, out="whole").code == 0
    found, whole = (answers(tmp_path / o / "gaussian_noise-4") for o in ("killed", "whole"))
    for key, (index, losses) in whole.items():
        assert found[key][0] == index and found[key][1] == pytest.approx(losses, rel=1e-4)


def test_a_report_shows_what_the_model_saw(run, folder: Path, tmp_path: Path) -> None:
    assert run("--corruption", "contrast:5").code == 0
    for name, path in (("grey.html", "contrast-5"), ("clean.html", "clean")):
        write_report([tmp_path / "out" / path], tmp_path / name)
    grey, clean = ((tmp_path / f"{n}.html").read_text() for n in ("grey", "clean"))
    assert "were not found" not in grey and "not the same" not in grey
    assert "data:image" in grey and "data:image" in clean
    thumbnails = [set(text.split('src="')[1:]) for text in (grey, clean)]
    assert thumbnails[0].isdisjoint(thumbnails[1])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--corruption", "mist"), "expected a corruption of .* got 'mist'"),
        (("--corruption", "fog:9"), "expected a severity of 1 to 5"),
        (("--corruption", "saturate:1"), "saturate changes nothing in grey pictures"),
    ],
)
def test_bad_options(run, more: tuple, message: str, tmp_path: Path) -> None:
    assert_refused(run(*more), message)
    assert not (tmp_path / "out").exists()


def test_bad_names_come_before_the_model(capsys, folder: Path, tmp_path: Path) -> None:
    said = call(
        capsys, "evaluate", "--model", "nowhere", "--data", folder, "--out", tmp_path / "out",
        "--corruption", "mist",
    )  # fmt: skip
    assert_refused(said, "got 'mist'")
    assert not (tmp_path / "out").exists()


def test_not_for_detectors(capsys, tmp_path: Path) -> None:
    given = ("--data", "scenes", "--out", tmp_path / "out", "--corruption", "fog:1")
    said = call(capsys, "evaluate", *given)
    assert_refused(said, "--corruption is for classifiers; scenes is for detectors")


def test_not_into_a_run(run, tmp_path: Path) -> None:
    assert run().code == 0
    assert_refused(run("--corruption", "contrast:1"), "out is a run itself")
    assert run("--corruption", "contrast:1", out="other").code == 0
    assert_refused(run(out="other"), "expected an empty directory or one with a run.json")


def test_the_names_are_listed(capsys) -> None:
    said = call(capsys, "evaluate", "--corruption", "list")
    assert said.code == 0 and said.err == ""
    assert said.out.splitlines()[0] == "noise    gaussian_noise, shot_noise, impulse_noise"
    assert len(said.out.splitlines()) == 6


@pytest.mark.parametrize("given", [[], ["fog"], "fog", None, [Corruption("fog", 1)] * 2])
def test_bad_arguments(given, dit_dir: Path, folder: Path, tmp_path: Path) -> None:
    classifier = DiffusionClassifier.from_pretrained(dit_dir)
    with pytest.raises(DiveFastError, match="expected (at least one Corruption|each corruption)"):
        evaluate_corruptions(classifier, open_dataset(folder, NAMES), tmp_path / "out", given)


def test_the_package_is_asked_for_by_name(run, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "imagecorruptions", None)
    assert_refused(run("--corruption", "fog:1"), r"pip install 'dive_fast\[corruptions\]'")


def test_out_is_a_file(run, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    assert_refused(run("--corruption", "contrast:1"), "out")
