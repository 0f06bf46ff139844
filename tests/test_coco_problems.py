"""Files of which nothing is usable are refused; of many problems a few lines are told."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
from coco_files import annotated, write
from command import assert_refused, call
from pictures import noise_picture

from dive_fast import DataError
from dive_fast.data.coco import read_coco


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(3):
        noise_picture((64, 48), 50).save(folder / f"{i}.png")
    return folder


def three() -> dict:
    return annotated(3, (64, 48))


def lines(path: Path) -> list[str]:
    said: list[str] = []
    read_coco(path).tell_problems(said.append)
    return said


UNUSABLE = {
    "no box": ({"bbox": None}, "a box of four numbers .* got None"),
    "a box as object": ({"bbox": {"x": 1, "y": 2}}, "got {'x': 1, 'y': 2}"),
    "image ids as text": ({"image_id": "1"}, "no usable image '1' .there is 1, which is another"),
    "category ids as text": ({"category_id": "1"}, "unknown category '1' .there is 1"),
    "category ids without categories": ({"category_id": 7}, "unknown category 7"),
    "no size": ({"bbox": [1, 2, 0, 0]}, "got 0 x 0"),
    "outside": ({"bbox": [900, 900, 5, 5]}, "lies outside"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_nothing_usable(case: str, tmp_path: Path) -> None:
    changes, reason = UNUSABLE[case]
    content = three()
    content["annotations"] = [{**a, **changes} for a in content["annotations"]]
    with pytest.raises(
        DataError, match=f"usable annotations, got none of 3 .annotation 1.*{reason}"
    ):
        read_coco(write(tmp_path, content))
    content["annotations"].append(three()["annotations"][0])
    assert sum(len(i.boxes) for i in read_coco(write(tmp_path, content)).images) == 1


@pytest.mark.parametrize("command", ["evaluate", "fit", "train-layout", "train-prior"])
@pytest.mark.parametrize("left", ["bad ones", "none"])
def test_every_command_refuses(
    command: str, left: str, layout_dir: Path, pictures: Path, tmp_path: Path, capsys
) -> None:
    content = three()
    content["annotations"] = [{**a, "bbox": "?"} for a in content["annotations"]]
    message = "expected usable annotations, got none of 3"
    if left == "none":
        content["annotations"], message = [], "expected annotated objects to .*, got none in 3"
    content["categories"][0]["name"] = "two"  # a class of the model
    path = write(tmp_path, content)
    given = {
        "evaluate": ("--data", path, "--images", pictures, "--model", layout_dir),
        "fit": ("--data", path, "--images", pictures, "--model", layout_dir),
        "train-layout": ("--annotations", path, "--images", pictures),
        "train-prior": ("--annotations", path, "--model", layout_dir),
    }[command]
    out = tmp_path / "out"
    assert_refused(call(capsys, command, *given, "--out", out), message)
    assert not (out / "run.json").exists() and not (out / "dive_fast.json").exists()


def test_a_limit_that_leaves_nothing_to_score(
    layout_dir: Path, pictures: Path, tmp_path: Path, capsys
) -> None:
    content = three()
    content["categories"][0]["name"] = "two"
    del content["annotations"][1:]
    path = write(tmp_path, content)
    data = read_coco(path)
    seed = next(s for s in range(20) if data.select(1, s).images[0].id != 0)
    arguments = ("--data", path, "--images", pictures, "--model", layout_dir, "--limit", 1)
    said = call(capsys, "evaluate", *arguments, "--seed", seed, "--out", tmp_path / "run")
    assert_refused(said, "expected annotated objects to score, got none in 1 images")


def test_crowds_are_nothing_to_score(tmp_path: Path) -> None:
    content = three()
    for annotation in content["annotations"]:
        annotation["iscrowd"] = 1
    with pytest.raises(DataError, match="expected annotated objects to learn from"):
        read_coco(write(tmp_path, content)).expect_objects("to learn from")


def test_few_problems_are_told_one_by_one(tmp_path: Path) -> None:
    content = three()
    content["annotations"] += [{**content["annotations"][0], "category_id": k} for k in range(2, 7)]
    path = write(tmp_path, content)
    assert lines(path) == list(read_coco(path).problems)
    assert len(lines(path)) == 5


def test_many_problems_are_counted(tmp_path: Path) -> None:
    content = three()
    content["annotations"] += [{**content["annotations"][0], "bbox": None}] * 36_781
    path = write(tmp_path, content)
    (line,) = lines(path)
    assert line.startswith("boxes.json: annotation 1 of image 0 (0.png): expected a box of four")
    assert line.endswith("got None; left out; and 36,780 more like it.")
    assert len(read_coco(path).problems) == 36_781


def test_many_kinds_are_counted(tmp_path: Path) -> None:
    content = three()
    good = content["annotations"][0]
    changes: Iterator[tuple[int, dict]] = iter(
        [
            (2, {"bbox": None}), (3, {"category_id": 9}), (4, {"image_id": 9}),
            (5, {"bbox": [1, 1, 0, 9]}), (2, {"bbox": [900, 1, 2, 2]}), (1, {"iscrowd": "x"}),
            (1, {"area": "x"}),
        ]
    )  # fmt: skip
    for count, change in changes:
        content["annotations"] += [{**copy.deepcopy(good), "id": None, **change}] * count
    said = lines(write(tmp_path, content))
    assert len(said) == 6
    assert "a box of some size" in said[0] and "4 more like it" in said[0]  # the most frequent
    assert said[-1] == "boxes.json: 2 more problems of 2 other kinds."


def test_evaluate_tells_a_few_lines(layout_dir: Path, pictures, tmp_path: Path, capsys) -> None:
    content = three()
    content["categories"][0]["name"] = "two"
    content["annotations"] += [{**content["annotations"][0], "bbox": None}] * 500
    arguments = ("--data", write(tmp_path, content), "--images", pictures, "--model", layout_dir)
    said = call(
        capsys, "evaluate", *arguments, "--out", tmp_path / "run", "--probes", 2, "--limit", 1
    )
    assert said.code == 0 and "499 more like it" in said.err
    assert len([line for line in said.err.splitlines() if "boxes.json" in line]) == 1


def test_a_sentence_is_one_line(tmp_path: Path) -> None:
    content = three()
    content["images"][0]["file_name"] = "a\nb" * 100
    content["annotations"][0]["bbox"] = [[[[[["x" * 1000]]]]]]
    (line,) = lines(write(tmp_path, content))
    assert "\n" not in line and len(line) < 300


def test_a_subset_keeps_the_problems(tmp_path: Path) -> None:
    content = three()
    content["annotations"][0]["area"] = "large"
    data = read_coco(write(tmp_path, content))
    (problem,) = data.select(1).problems
    assert "expected an area of at least 0, got 'large'; that of its box counts" in problem
    box = data.images[0].bbox[0]
    assert data.images[0].area.tolist() == pytest.approx([float(box[2] * box[3])])
    assert dataclasses.replace(data, notes=()).problems == ()
