"""Boxes of the stored pixels and of the upright image."""

from __future__ import annotations

from pathlib import Path

import pytest
from coco_files import annotated, write
from command import assert_refused, call
from PIL import Image

from dive_fast import DataError, ImageError
from dive_fast.data.coco import CocoDataset, expect_fitting_images, mirrored_images, read_coco


def save(path: Path, stored: tuple[int, int], orientation: int | None) -> None:
    image, exif = Image.new("RGB", stored, "gray"), Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    image.save(path, exif=exif)


def read(
    folder: Path, orientation: int | None, stored=(64, 48), annotated_as=(64, 48), n: int = 2
) -> CocoDataset:
    content = annotated(n, annotated_as)
    content["categories"][0]["name"] = "two"
    for image in content["images"]:
        image["file_name"] = image["file_name"].replace(".png", ".jpg")
        save(folder / image["file_name"], stored, orientation)
    return read_coco(write(folder, content), folder)


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_a_quarter_turn(orientation: int, tmp_path: Path, layout_dir: Path, capsys) -> None:
    stored = read(tmp_path, orientation)
    message = (
        rf"annotated for the 64 x 48 pixels that are stored, but EXIF \(orientation {orientation}\)"
        " turns them by 90 degrees to 48 x 64"
    )
    with pytest.raises(ImageError, match=message):
        stored.images[0].read()
    with pytest.raises(DataError, match=f"got none of 2 .*{message}"):
        expect_fitting_images(stored)
    arguments = ("--data", tmp_path / "boxes.json", "--images", tmp_path, "--model", layout_dir)
    for command in ("evaluate", "fit"):
        said = call(capsys, command, *arguments, "--out", tmp_path / "run")
        assert_refused(said, f"expected images of their annotated sizes, got none of 2 .*{message}")
    upright = read(tmp_path, orientation, annotated_as=(48, 64))
    assert upright.images[0].read().size == (48, 64)
    expect_fitting_images(upright)
    assert mirrored_images(upright) is None


@pytest.mark.parametrize(
    ("orientation", "size", "said"),
    [
        (2, (64, 48), True), (3, (64, 48), True), (4, (64, 48), True),
        (6, (64, 64), True), (8, (64, 64), True),
        (1, (64, 48), False), (None, (64, 48), False), (9, (64, 48), False), (0, (64, 64), False),
    ],
)  # fmt: skip
def test_what_the_size_does_not_show(orientation, size, said: bool, tmp_path: Path) -> None:
    data = read(tmp_path, orientation, size, size)
    assert data.images[0].read().size == size
    sentence = mirrored_images(data)
    assert (sentence is not None) == said
    if said:
        assert f"EXIF turns or mirrors 2 images, such as {tmp_path / '0.jpg'}" in sentence
        assert f"(orientation {orientation})" in sentence and "upright" in sentence


def test_commands_say_so_once(tmp_path: Path, layout_dir: Path, capsys) -> None:
    pytest.importorskip("pycocotools")
    read(tmp_path, 3, n=3)
    arguments = ("--images", tmp_path, "--out")
    data, sizes = ("--data", tmp_path / "boxes.json", "--model", layout_dir), ("--probes", 2)
    said = call(capsys, "evaluate", *data, *arguments, tmp_path / "run", *sizes)
    assert said.code == 0 and said.err.count("EXIF turns or mirrors 3 images") == 1
    sizes = ("--size", 16, "--patch-size", 8, "--channels", 16, "--layers", 1, "--steps", 1)
    data = ("--annotations", tmp_path / "boxes.json", "--batch-size", 2)
    said = call(capsys, "train-layout", *data, *arguments, tmp_path / "model", *sizes)
    assert said.code == 0 and said.err.count("EXIF turns or mirrors 3 images") == 1


def test_another_size(tmp_path: Path) -> None:
    """Not EXIF's doing; one image that fits is enough."""
    data = read(tmp_path, 6, annotated_as=(640, 480))
    with pytest.raises(ImageError, match="expected 640 x 480 pixels as annotated, got 48 x 64"):
        data.images[0].read()
    with pytest.raises(DataError, match="annotated sizes, got none of 2 .*expected 640 x 480"):
        expect_fitting_images(data)
    (tmp_path / "0.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match="got none of 2 .*0.jpg: expected an image"):
        expect_fitting_images(data)
    save(tmp_path / "1.jpg", (640, 480), None)
    expect_fitting_images(data)
