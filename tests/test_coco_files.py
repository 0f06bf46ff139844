"""File names as annotation files write them, and the one folder in which images are read."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest
from coco_files import annotated, write
from PIL import Image

from dive_fast import DataError
from dive_fast.data.coco import CocoDataset, read_coco

DECOMPOSED = unicodedata.normalize("NFD", "été/café.png")
COMPOSED = unicodedata.normalize("NFC", "été/café.png")


def save(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8)).save(path)
    return folder


def read(tmp_path: Path, folder: Path, *names: object) -> CocoDataset:
    content = annotated(len(names), (8, 8))
    for image, name in zip(content["images"], names, strict=True):
        image["file_name"] = name
    return read_coco(write(tmp_path, content), folder)


@pytest.mark.parametrize(
    ("there", "named"),
    [
        (COMPOSED, DECOMPOSED),
        (DECOMPOSED, COMPOSED),
        (DECOMPOSED.split("/")[0] + "/" + COMPOSED.split("/")[1], COMPOSED),
        ("train/a.png", "train\\a.png"),
        ("a.png", ".\\a.png"),
        ("a\\b.png", "a\\b.png"),
        ("train/a.png", "./train//a.png"),
        ("a.png", "/a.png"),
        ("a.png", "sub/../a.png"),
        ("..a.png", "..a.png"),
    ],
)
def test_spellings_of_a_name(there: str, named: str, tmp_path: Path) -> None:
    folder = save(tmp_path / "pictures", there)
    data = read(tmp_path, folder, named)
    assert data.problems == ()
    assert data.images[0].path.resolve() == (folder / there).resolve()
    assert data.images[0].read().size == (8, 8)


def test_the_name_to_the_letter_comes_first(tmp_path: Path) -> None:
    folder = save(tmp_path / "pictures", COMPOSED, DECOMPOSED, "a\\b.png", "a/b.png")
    names = (COMPOSED, DECOMPOSED, "a\\b.png", "a/b.png")
    data = read(tmp_path, folder, *names)
    assert [str(i.path.relative_to(folder)) for i in data.images] == list(names)


@pytest.mark.parametrize(
    "prefix", ["images/", "/home/somebody/images/", "..\\images\\", "C:\\data\\images\\", "../"]
)
def test_folders_that_all_names_share(prefix: str, tmp_path: Path) -> None:
    folder = save(tmp_path / "pictures", "a.png", "sub/b.png")
    data = read(tmp_path, folder, f"{prefix}a.png", f"{prefix}sub/b.png")
    assert [image.path for image in data.images] == [folder / "a.png", folder / "sub" / "b.png"]
    (problem,) = data.problems
    assert "all file names begin with" in problem and "taken without it" in problem


def test_names_are_never_cut_so_that_two_meet(tmp_path: Path) -> None:
    """train/1.png and val/1.png are not both 1.png."""
    folder = save(tmp_path / "pictures", "1.png")
    with pytest.raises(DataError, match="got none of 2; the first would be 'train/1.png'"):
        read(tmp_path, folder, "train/1.png", "val/1.png")


def test_an_absolute_name_in_the_folder(tmp_path: Path) -> None:
    folder = save(tmp_path / "pictures", "a.png", "sub/b.png")
    data = read(tmp_path, folder, str(folder / "a.png"), "sub/b.png")
    assert [image.path for image in data.images] == [folder / "a.png", folder / "sub" / "b.png"]
    assert data.problems == ()


@pytest.mark.parametrize("name", ["../secret.png", "..\\secret.png", "sub/../../secret.png"])
def test_nothing_outside_is_read(name: str, tmp_path: Path) -> None:
    save(tmp_path, "secret.png")
    folder = save(tmp_path / "pictures", "a.png")
    data = read(tmp_path, folder, "a.png", name)
    assert [image.path for image in data.images] == [folder / "a.png", None]
    assert f"the name leads out of {folder}; it is not read" in data.problems[0]
    absolute = read(tmp_path, folder, "a.png", str(tmp_path / "secret.png"))
    assert absolute.images[1].path is None and "leads out" in absolute.problems[0]
    with pytest.raises(DataError, match="expected the images of boxes.json, got none of 1"):
        read(tmp_path, folder, name)


def test_one_file_of_two_images(tmp_path: Path) -> None:
    folder = save(tmp_path / "pictures", "a.png")
    (problem,) = read(tmp_path, folder, "a.png", "./a.png").problems
    assert "image 1 (./a.png): its file is that of image 0 (a.png) too" in problem


@pytest.mark.parametrize("name", ["", ".", "..", "/", "\0", "a" * 5000, "\ud800", 7, None, ["a"]])
def test_names_that_are_none(name: object, tmp_path: Path) -> None:
    folder = save(tmp_path / "pictures", "a.png")
    data = read(tmp_path, folder, "a.png", name)
    assert data.images[1].path is None and len(data.problems) == 1
    with pytest.raises(DataError, match="got none of 1"):
        read(tmp_path, folder, name)
