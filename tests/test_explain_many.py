"""``dive-fast explain`` on many images: it goes on where it stopped, and keeps what it has."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from command import Said, assert_refused, call
from pictures import noise_picture
from PIL import Image

from dive_fast import DiffusionClassifier
from dive_fast.data.images import read_image
from dive_fast.evaluation import read_records

ROOT = Path(__file__).parent.parent
MANY = 9


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / "images" / f"{i}.png" for i in range(MANY)]
    paths[0].parent.mkdir()
    for i, path in enumerate(paths):
        noise_picture((8 + i, 12), 20 + 10 * i).save(path)
    return paths


@pytest.fixture
def explain(capsys, dit_dir: Path, tmp_path: Path, images):
    def run(*more: object, given: object = images[0].parent, out: str = "maps") -> Said:
        common = ("--model", dit_dir, "--probes", 4, "--strategy", "enumerate")
        return call(capsys, "explain", given, *common, "--out", tmp_path / out, *more)

    return run


def numbers(out: Path) -> tuple[list[dict], dict[str, np.ndarray]]:
    with np.load(out / "maps.npz") as file:
        return json.loads((out / "maps.json").read_text())["maps"], dict(file)


def test_many_at_once_are_as_one_by_one(explain, dit_dir: Path, images, tmp_path: Path) -> None:
    """Batches of the engine hold several images; the answers and maps are each image's own."""
    said = explain("--batch-size", 6)
    assert said.code == 0 and len(said.out.splitlines()) == MANY
    rows, maps = numbers(tmp_path / "maps")
    assert [row["id"] for row in rows] == [str(path) for path in images]
    clf = DiffusionClassifier.from_pretrained(dit_dir)
    for i, (path, row) in enumerate(zip(images, rows, strict=True)):
        (found,) = clf.explain(read_image(path), probes=4, strategy="enumerate")
        assert (row["a"], row["b"]) == (found.a, found.b)
        np.testing.assert_allclose(maps["difference"][i], found.difference, atol=1e-5)
        np.testing.assert_allclose(maps["standard_error"][i], found.standard_error, atol=1e-5)
        with np.load((tmp_path / "maps" / row["drawn"]).with_suffix(".npz")) as own:
            assert np.array_equal(own["difference"], maps["difference"][i])


def test_what_is_done_is_not_done_again(explain, images, tmp_path: Path) -> None:
    assert explain(given=images[2]).code == 0
    out = tmp_path / "maps"
    first, drawn = (out / "results.jsonl").read_bytes(), next(out.glob("2-*.png"))
    drawn.write_bytes(b"kept")
    said = explain()
    assert said.code == 0 and len(said.out.splitlines()) == MANY - 1
    assert drawn.read_bytes() == b"kept"
    assert (out / "results.jsonl").read_bytes().startswith(first)
    rows, maps = numbers(out)
    assert [row["id"] for row in rows] == [str(path) for path in images]
    assert len(maps["difference"]) == MANY and rows[2]["drawn"] == drawn.name
    explain(out="whole")
    whole, expected = numbers(tmp_path / "whole")
    for name in ("difference", "standard_error"):
        np.testing.assert_allclose(maps[name], expected[name], atol=1e-5)
    assert [(row["a"], row["b"]) for row in rows] == [(row["a"], row["b"]) for row in whole]


def test_after_a_kill(explain, dit_dir: Path, images, tmp_path: Path) -> None:
    out = tmp_path / "maps"
    command = [sys.executable, "-m", "dive_fast", "explain", images[0].parent, "--model", dit_dir]
    command += ["--probes", 400, "--strategy", "enumerate", "--batch-size", 8, "--out", out]
    process = subprocess.Popen(
        list(map(str, command)),
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    results, end = out / "results.jsonl", time.monotonic() + 240
    while not (results.exists() and results.read_bytes().count(b"\n") >= 2):
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = results.read_bytes()
    before = before[: before.rfind(b"\n") + 1]
    n = before.count(b"\n")
    assert 2 <= n < MANY and not (out / "maps.json").exists()
    said = explain("--probes", 400)
    assert said.code == 0 and len(said.out.splitlines()) == MANY - n
    assert results.read_bytes().startswith(before)
    assert len(read_records(out)) == MANY == results.read_bytes().count(b"\n")
    assert len({row["drawn"] for row in numbers(out)[0]}) == MANY


def test_failures_are_tried_again(explain, images, tmp_path: Path) -> None:
    content = images[4].read_bytes()
    images[4].write_text("none")
    said = explain()
    assert said.code == 2 and len(said.err.splitlines()) == 1 and "4.png" in said.err
    assert len(numbers(tmp_path / "maps")[0]) == MANY - 1
    images[4].write_bytes(content)
    said = explain()
    assert (said.code, said.err) == (0, "") and len(said.out.splitlines()) == 1
    assert [row["id"] for row in numbers(tmp_path / "maps")[0]] == [str(p) for p in images]


def test_one_without_another_class_stops_nobody(explain, images, tmp_path: Path) -> None:
    assert explain(out="first").code == 0
    answers = [row["a"] for row in numbers(tmp_path / "first")[0]]
    same = answers.count(answers[0])
    said = explain("--against", answers[0])
    assert said.code == 2 and len(said.err.splitlines()) == same
    assert len(said.out.splitlines()) == MANY - same
    content = json.loads((tmp_path / "maps" / "maps.json").read_text()) if same < MANY else None
    assert content is None or len(content["failed"]) == same


def test_another_question_wants_another_folder(explain, images) -> None:
    assert explain("--class", "star", given=images[0]).code == 0
    assert explain("--class", "2", given=images[1]).code == 0  # the same class
    said = explain("--class", "cross", given=images[0])
    assert_refused(said, "another configuration: explained.a is 2 there and 3 here")
    said = explain("--class", "star", "--seed", 1, given=images[0])
    assert_refused(said, "another configuration: seed is 0 there and 1 here")


def test_numbers_that_are_gone(explain, images, tmp_path: Path) -> None:
    assert explain(given=images[0]).code == 0
    next((tmp_path / "maps").glob("0-*.npz")).write_bytes(b"")
    assert_refused(explain(given=images[0]), "expected the numbers of a map")


def test_a_folder_of_something_else(explain, images, tmp_path: Path) -> None:
    (tmp_path / "maps").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "maps" / "mine.png")
    assert_refused(explain(given=images[0]), "expected an empty directory")
