"""Boxes in another frame than [left, top, width, height] in pixels, over whole files."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
from coco_files import annotated, write

from dive_fast import DataError
from dive_fast.data.coco import read_coco

WIDTH, HEIGHT = 640, 480


def corners(box: list[float]) -> list[float]:
    left, top, width, height = box
    return [left, top, left + width, top + height]


def centres(box: list[float]) -> list[float]:
    left, top, width, height = box
    return [left + width / 2, top + height / 2, width, height]


def fraction(box: list[float]) -> list[float]:
    return [box[0] / WIDTH, box[1] / HEIGHT, box[2] / WIDTH, box[3] / HEIGHT]


FRAMES = {
    "corners": (corners, r"got \[left, top, right, bottom\]", 6),
    "centres": (centres, r"got \[centre x, centre y, width, height\]", 40),
    "one box of fractions": (fraction, r"fractions of the images' sizes", 1),
    "fractions": (fraction, r"fractions of the images' sizes \[left, top, width, height\]", 30),
    "fractions of corners": (
        lambda box: fraction(corners(box)), r"fractions .* \[left, top, right, bottom\]", 30,
    ),
    "yolo": (
        lambda box: fraction(centres(box)), r"fractions .* \[centre x, centre y, width, h", 30,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FRAMES)
def test_refused_with_the_frame_that_was_recognised(name: str, tmp_path: Path) -> None:
    frame, message, n = FRAMES[name]
    for seed in range(5):
        content = annotated(n, (WIDTH, HEIGHT), frame, seed=seed)
        with pytest.raises(DataError, match=message) as refused:
            read_coco(write(tmp_path, content))
        assert "expected boxes [left, top, width, height] in pixels" in str(refused.value)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 20, 100])
@pytest.mark.parametrize("size", [(1, 1), (2, 2), (3, 4), (8, 8), (32, 32), (WIDTH, HEIGHT)])
def test_pixels_are_taken(n: int, size: tuple[int, int], tmp_path: Path) -> None:
    """Also a few boxes, and images of a few pixels, whose boxes lie in [0, 1]."""
    for seed in range(10):
        assert read_coco(write(tmp_path, annotated(n, size, seed=seed))).problems == ()


def test_one_whole_pixel_is_no_fraction(tmp_path: Path) -> None:
    assert read_coco(write(tmp_path, annotated(1, frame=lambda box: [0, 0, 1, 1]))).problems == ()
    with pytest.raises(DataError, match="fractions"):
        read_coco(write(tmp_path, annotated(3, frame=lambda box: [0, 0, 1, 1])))


def test_one_box_decides_nothing(tmp_path: Path) -> None:
    """A box below a pixel, and boxes over the border, among good ones."""
    content = annotated(20)
    for annotation, box in zip(
        content["annotations"], ([0.1, 0.1, 0.5, 0.5], [600, 400, 635, 475]), strict=False
    ):
        annotation["bbox"] = box
    (problem,) = read_coco(write(tmp_path, content)).problems
    assert "reaches out" in problem


@pytest.mark.parametrize(
    ("n", "frame", "word"),
    [
        (12, centres, "reach out of their images; they may be [centre x"),
        (2, corners, "reach out of their images; they may be [left, top, right, bottom]"),
        (
            40,
            lambda b: [2 * x for x in b],
            "reach out of their images; they may be of images of an",
        ),
        (40, lambda b: [x / 2 for x in b], "all 40 lie in the upper left quarter"),
        (40, lambda b: [100 * x for x in fraction(b)], "another size, or percentages"),
    ],
)
def test_a_word_where_it_is_not_certain(n: int, frame, word: str, tmp_path: Path) -> None:
    said: list[str] = []
    read_coco(write(tmp_path, annotated(n, frame=frame, seed=3))).tell_problems(said.append)
    assert word in said[0], said


@pytest.mark.parametrize(
    ("archive", "member"),
    [
        ("det3_bccd_640px.zip", "instances_train.json"),
        ("det80_coco_val2017_open_320px.zip", "instances_test.json"),
        ("eval_coco_reference_100.zip", "instances_val2014_100.json"),
    ],
)
def test_real_files(archive: str, member: str, tmp_path: Path, real_data) -> None:
    """As they are, and in the other frames."""
    with zipfile.ZipFile(real_data(archive)) as file:
        content = json.loads(file.read(member))
    assert read_coco(write(tmp_path, content)).problems == ()
    whole = content["annotations"]
    for frame in (corners, centres, lambda box: [x / 640 for x in box]):
        content["annotations"] = [{**a, "bbox": frame(a["bbox"])} for a in whole]
        with pytest.raises(DataError, match="expected boxes"):
            read_coco(write(tmp_path, content))
