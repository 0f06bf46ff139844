"""``dive-fast probe``: what it learns, prints, writes, goes on with and refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from command import Said, assert_refused, call, words
from tiny import NAMES

from dive_fast import DiffusionClassifier
from dive_fast.core.head import Head
from dive_fast.evaluation import read_records


def quarters(n: int, seed: int) -> dict[str, np.ndarray]:
    """Images uint8 [n, 8, 8] whose quarter ``label`` is bright."""
    images = np.random.default_rng(seed).integers(0, 60, (n, 8, 8), dtype=np.uint8)
    labels = np.arange(n) % len(NAMES)
    for image, label in zip(images, labels, strict=True):
        row, column = 4 * (label // 2), 4 * (label % 2)
        image[row : row + 4, column : column + 4] += 150
    return {"images": images, "labels": labels}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("data")
    for name, n in (("train", 40), ("test", 13)):
        np.savez(folder / f"{name}.npz", **quarters(n, seed=n))
    return folder / "train.npz", folder / "test.npz"


@pytest.fixture
def probe(capsys, dit_dir: Path, data, tmp_path: Path):
    """The command on the bright quarters, with more options; a later --data or --test counts."""

    def run(*more: object, out: str = "run") -> Said:
        train, test = data
        common = ("--model", dit_dir, "--data", train, "--test", test, "--out", tmp_path / out)
        return call(capsys, "probe", *common, "--timestep", 20, "--probes", 4, *more)

    return run


def test_it_learns_measures_and_writes(probe, dit_dir: Path, data, tmp_path: Path) -> None:
    said = probe()
    assert said.code == 0, said.err
    run = tmp_path / "run"
    figures = json.loads((run / "probe.json").read_text())
    head = Head.load(run / "head.safetensors")
    classifier = DiffusionClassifier.from_pretrained(dit_dir)
    # The figures are those of the files, counted here.
    with np.load(data[1]) as test:
        scores = classifier.head_scores(head, test["images"])
        right = (scores.argmax(dim=1).numpy() == test["labels"]).mean()
    assert figures["accuracy"] == right == 1.0
    assert figures["standard_error"] == 0
    assert (figures["n"], figures["trained_on"], figures["held_out"]) == (13, 40, 8)
    assert (figures["layer"], figures["timestep"], figures["grid"]) == (head.layer, 20, head.grid)
    records = read_records(run / "generative").values()
    assert len(records) == 13
    hits = sum(record["index"] == record["truth"] for record in records)
    assert figures["generative"]["accuracy"] == hits / 13
    lines = said.out.splitlines()
    assert lines[0].startswith("mean 1 / rank by a ridge on 4 x 4 cells")
    assert sum(line.startswith("transformer_blocks.") for line in lines) == len(classifier.layers)
    assert any(line.split() == ["linear", "100.00%", "+-", "0.00%", "1"] for line in lines)
    assert lines[-1].startswith("generative")


def test_it_goes_on_where_it_stopped_and_refuses_another_run(
    probe, tmp_path: Path, monkeypatch
) -> None:
    def stop(*args: object, **rest: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(DiffusionClassifier, "head_scores", stop)
        said = probe("--json")
    assert said.code == 130 and "run again to go on" in said.err
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*.npy")}
    first = probe("--json")
    assert first.code == 0, first.err
    assert len(before) > 5
    assert {path: path.stat().st_mtime_ns for path in before} == before
    second = probe("--json")
    figures = [json.loads(said.out) for said in (first, second)]
    for summary in figures:
        summary["generative"].pop("fill_rate")
    assert figures[0] == figures[1]
    assert_refused(probe("--head", "attention"), "holds a run of another configuration: learned")


def test_heads_of_losses_need_no_labels(probe, tmp_path: Path) -> None:
    said = probe("--head", "losses", "--layer", "transformer_blocks.1", "--limit", 5)
    assert said.code == 0, said.err
    assert "mean 1 / rank" in said.out and "  5 test images" in said.out
    assert Head.load(tmp_path / "run" / "head.safetensors").kind == "losses"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layer", "nowhere"], "expected a layer of .* got 'nowhere'"),
        (["--timestep", "1000"], "timestep must be at most 999"),
        (["--timestep", "-1"], "timestep must be at least 0"),
        (["--timestep", "x"], "--timestep: expected a whole number, got 'x'"),
        (["--grid", "0"], "--grid: expected a whole number of at least 1"),
        (["--grid", "65"], "grid must be at most 64, got 65"),
        (["--head", "deep"], "--head: invalid choice"),
        (["--data", "nowhere.npz"], "nothing is there"),
        (["--test", "nowhere.npz"], "nothing is there"),
        (["--strategy", "none"], "expected a strategy of"),
        (["--limit", "0"], "at least 1"),
        (["--train-limit", "1"], "images to train on and others to choose by, got 1"),
    ],
    ids=words,
)
def test_bad_options_are_refused(probe, options: list[str], message: str) -> None:
    assert_refused(probe(*options), message)


def test_what_it_learned_from_is_no_test(probe, data) -> None:
    assert_refused(probe("--test", data[0]), "expected other images to measure on than to learn")


def test_damaged_images_are_told(probe, tmp_path: Path) -> None:
    for name in NAMES:
        (tmp_path / "images" / name).mkdir(parents=True)
        (tmp_path / "images" / name / "a.png").write_bytes(b"no image")
    assert_refused(probe("--data", tmp_path / "images"), "a.png")


def test_without_scikit_learn_it_says_what_to_install(probe, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert_refused(probe(), r"pip install 'dive_fast\[probe\]'")


def test_evaluate_refuses_heads_that_it_cannot_use(
    capsys, probe, dit_dir: Path, data, tmp_path: Path
) -> None:
    assert probe("--layer", "transformer_blocks.0").code == 0
    head, out = tmp_path / "run" / "head.safetensors", tmp_path / "evaluated"
    common = ("evaluate", "--model", dit_dir, "--data", data[1], "--out", out)
    said = call(capsys, *common, "--strategy", "enumerate", "--head", head)
    assert_refused(said, "'enumerate' does not use a head")
    said = call(capsys, "evaluate", "--data", "scenes", "--out", out, "--head", head)
    assert_refused(said, "--head is for classifiers")
    assert not out.exists()
