"""``dive-fast detect`` on a small real layout-to-image model with random weights."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from command import assert_refused, call
from PIL import Image

from dive_fast import zoo
from dive_fast.data.scenes import NAMES

FAST = (
    "--set",
    "rough_probes=2",
    "--set",
    "step_probes=2",
    "--set",
    "final_probes=2",
    "--probes",
    "4",
)


@pytest.fixture
def pictures(tmp_path) -> list[Path]:
    paths = []
    for i, size in enumerate([(8, 8), (20, 10)]):
        paths.append(tmp_path / f"{i}.png")
        Image.new("L", size, 60 + 100 * i).save(paths[-1])
    return paths


def records(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def test_draws_and_records(layout_dir, pictures, tmp_path, capsys) -> None:
    out = tmp_path / "run"
    said = call(capsys, "detect", *pictures, "--model", layout_dir, "--out", out, *FAST)
    assert said.code == 0
    assert [line.partition(":")[0] for line in said.out.splitlines()] == [str(p) for p in pictures]
    found = {record["id"]: record for record in records(out)}
    assert set(found) == {str(path) for path in pictures}
    for record in found.values():
        assert (out / record["drawn"]).is_file() and record["evaluations"] > 0
    assert json.loads((out / "run.json").read_text())["config"]["strategy"]["name"] == "guided"


def test_json_and_resuming(layout_dir, pictures, tmp_path, capsys) -> None:
    arguments = ("--model", layout_dir, "--out", tmp_path / "run", *FAST, "--json")
    first = call(capsys, "detect", pictures[0], *arguments)
    seconds = json.loads(first.out)[0]["seconds"]
    again = json.loads(call(capsys, "detect", *pictures, *arguments).out)
    assert [record["id"] for record in again] == [str(path) for path in pictures]
    assert again[0]["seconds"] == seconds
    assert len(records(tmp_path / "run")) == 2


def test_pictures_of_one_name_are_all_kept(layout_dir, pictures, tmp_path, capsys) -> None:
    twin = tmp_path / "other" / "0.png"
    twin.parent.mkdir()
    twin.write_bytes(pictures[0].read_bytes())
    out = tmp_path / "run"
    assert (
        call(capsys, "detect", pictures[0], twin, "--model", layout_dir, "--out", out, *FAST).code
        == 0
    )
    assert sorted(p.name for p in (out / "drawn").iterdir()) == ["0-2.png", "0.png"]


def test_bad_pictures_do_not_stop_the_rest(layout_dir, pictures, tmp_path, capsys) -> None:
    bad = tmp_path / "bad.png"
    bad.write_text("no image")
    arguments = (bad, tmp_path / "missing.png", pictures[1])
    said = call(
        capsys, "detect", *arguments, "--model", layout_dir, "--out", tmp_path / "run", *FAST
    )
    assert said.code == 2
    assert said.out.startswith(str(pictures[1]))
    assert len(said.err.splitlines()) == 2 and "Traceback" not in said.err
    for path in arguments[:2]:  # mended: the next run reads them
        shutil.copy(pictures[0], path)
    said = call(
        capsys, "detect", *arguments, "--model", layout_dir, "--out", tmp_path / "run", *FAST
    )
    assert said.code == 0 and len(said.out.splitlines()) == 3
    assert len(records(tmp_path / "run")) == 5  # two errors, three answers


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--strategy", "race"), "expected a strategy for layouts of guided, invert, got 'race'"),
        (("--set", "rounds=none"), "rounds must be a whole number, got None"),
        (("--set", "starts=1.5"), "starts must be a whole number, got 1.5"),
        (("--set", "starts=TRUE"), "starts must be a whole number, got True"),
        (("--set", "margin=wide"), "margin must be a number, got 'wide'"),
        (
            ("--strategy", "invert", "--set", "settled=no"),
            "settled must be true or false, got 'no'",
        ),
        (("--set", "lines"), "expected --set NAME=VALUE, got 'lines'"),
    ],
)
def test_bad_options(layout_dir, pictures, tmp_path, capsys, arguments, expected) -> None:
    said = call(
        capsys, "detect", pictures[0], "--model", layout_dir, "--out", tmp_path / "run", *arguments
    )
    assert_refused(said, expected)
    assert not (tmp_path / "run").exists()


def test_a_model_without_a_layout(pictures, tmp_path, capsys) -> None:
    said = call(capsys, "detect", pictures[0], "--model", "digits", "--out", tmp_path / "run")
    assert_refused(said, "expected a layout-to-image model, got digits, which has no layout")


@pytest.mark.parametrize("option", ["--classes", "--template"])
def test_classes_for_a_model_with_its_own(layout_dir, pictures, tmp_path, capsys, option) -> None:
    arguments = ("--model", layout_dir, "--out", tmp_path / "run", option, "a {}, b")
    said = call(capsys, "detect", pictures[0], *arguments)
    name = {"--template": "templates"}.get(option, "classes")
    assert_refused(said, f"has classes of its own: {name} is for text-conditional models")


@pytest.fixture
def annotated(pictures, tmp_path) -> Path:
    """Both images and a missing one, with a box that is no box."""
    images = [
        {"id": i, "file_name": name, "width": size[0], "height": size[1]}
        for i, (name, size) in enumerate(
            [("0.png", (8, 8)), ("1.png", (20, 10)), ("2.png", (8, 8))]
        )
    ]
    boxes = [(0, [0, 0, 4, 4]), (1, [5, 0, 10, 10]), (1, [0, 0, 0, 3]), (2, [1, 1, 4, 4])]
    content = {
        "images": images,
        "annotations": [
            {"id": n, "image_id": i, "category_id": 9, "bbox": box}
            for n, (i, box) in enumerate(boxes, start=1)
        ],
        "categories": [{"id": 9, "name": "two"}],
    }
    path = tmp_path / "boxes.json"
    path.write_text(json.dumps(content))
    return path


def test_evaluate_gives_the_coco_numbers(layout_dir, annotated, tmp_path, capsys) -> None:
    arguments = ("--data", annotated, "--images", tmp_path, "--model", layout_dir)
    arguments += ("--out", tmp_path / "run", *FAST)
    said = call(capsys, "evaluate", *arguments, "--json")
    # The missing image makes the code 2, and stops nothing.
    assert said.code == 2 and "Traceback" not in said.err
    summary = json.loads(said.out)
    assert {"AP", "AP50", "AP75", "AP_small", "AR100"} <= set(summary)
    assert summary["n"] == 2 and summary["failed"] == 1
    assert "box of some size" in said.err and "2.png" in said.err
    text = call(capsys, "evaluate", *arguments).out
    assert (
        text.startswith("AP ") and "\nAP_one_class " in text and "images that failed     1" in text
    )
    assert len(records(tmp_path / "run")) == 3


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"--images": None}, "expected --images DIR, the images of .*boxes.json, got none"),
        ({"--timesteps": "uniform"}, "--timesteps is for classifiers"),
        ({"--average": "loss"}, "--average is for classifiers"),
        ({"--classes": "cat,dog"}, "has classes of its own"),
        ({"--timestep-embedding": "original"}, "--timestep-embedding is for classifiers"),
        ({"--model": "digits"}, "expected a layout-to-image model, got digits"),
        ({"--data": "nothing.json"}, "nothing.json"),
    ],
)
def test_evaluate_refuses(layout_dir, annotated, tmp_path, capsys, changes, expected) -> None:
    options = {"--data": annotated, "--images": tmp_path, "--model": layout_dir}
    options |= {"--out": tmp_path / "run", **changes}
    arguments = [part for pair in options.items() if pair[1] is not None for part in pair]
    assert_refused(call(capsys, "evaluate", *arguments), expected)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("evaluate", "--data", "digits", "--images", "."), "--images is for detectors; digits is"),
        (("evaluate", "--data", "digits", "--prior", "none"), "--prior is for detectors; digits"),
        (("evaluate", "--data", "a.npz", "--prior-weight", 1), "--prior-weight is for detectors"),
        (("fit", "--data", "digits", "--images", "."), "digits is for classifiers"),
        (("fit", "--generate", 3, "--images", "."), "fit without --data is for classifiers"),
    ],
)
def test_options_of_the_other_job(arguments: tuple, expected: str, tmp_path, capsys) -> None:
    assert_refused(call(capsys, *arguments, "--out", tmp_path / "run"), expected)
    assert not (tmp_path / "run").exists()


def test_evaluate_on_scenes(scenes_model, tmp_path, capsys, monkeypatch) -> None:
    """The zoo's model is the default; a run goes on, and keeps no images."""
    monkeypatch.setattr(zoo, "_WEIGHTS", scenes_model.parent)
    out = tmp_path / "run"
    arguments = ("evaluate", "--data", "scenes", "--out", out, *FAST, "--json", "--limit", 2)
    said = call(capsys, *arguments)
    assert said.code == 0
    # It is not trained.
    assert re.fullmatch(r"dive-fast: 0.00 objects an image .* diagnose, .*\n", said.err), said.err
    summary = json.loads(said.out)
    assert list(summary)[:3] == ["AP", "AP50", "AP75"]
    assert summary["n"] == 2 and summary["evaluations_per_image"] > 0
    assert set(summary["AP_per_class"]) == set(NAMES)
    # The first ones, whatever the seed.
    assert [record["id"] for record in sorted(records(out), key=lambda r: r["id"])] == ["1", "2"]
    lines = (out / "results.jsonl").read_text()
    assert call(capsys, *arguments).out == said.out
    assert (out / "results.jsonl").read_text() == lines
    files = {".lock", "results.csv", "results.jsonl", "run.json", "summary.json"}
    assert {p.name for p in out.iterdir()} == files


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--images", "."), "--images is for annotation files"),
        ((), r"unknown model 'scenes': expected a model of the zoo \(digits\)"),
        (("--model", "digits"), "expected a layout-to-image model, got digits"),
    ],
)
def test_evaluate_on_scenes_refuses(tmp_path, capsys, monkeypatch, options, said) -> None:
    monkeypatch.setattr(zoo, "names", lambda: ("digits",))
    out = tmp_path / "run"
    arguments = ("evaluate", "--data", "scenes", "--out", out, "--limit", 1, *options)
    assert_refused(call(capsys, *arguments), said)
    assert not out.exists()
