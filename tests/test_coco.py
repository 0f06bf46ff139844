"""COCO annotation files: round trips, and every kind of bad entry."""

from __future__ import annotations

import copy
import json
import math
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import noise_picture
from PIL import Image

from bench.bccd import NAMES, load_bccd
from dive_fast import DataError, ImageError
from dive_fast.data.coco import (
    CocoDataset,
    CocoImage,
    class_categories,
    read_coco,
    read_images,
    unknown_classes,
    write_coco,
)
from dive_fast.data.images import squash

GOOD = {
    "images": [
        {"id": 7, "width": 20, "height": 10, "file_name": "a.png"},
        {"id": 3, "width": 12, "height": 16, "file_name": "sub/b.png"},
        {"id": 5, "width": 12, "height": 16, "file_name": "c.png"},
    ],
    "annotations": [
        {"id": 1, "image_id": 3, "category_id": 90, "bbox": [1.5, 2.0, 4.25, 8.0]},
        {"id": 2, "image_id": 7, "category_id": 4, "bbox": [0, 0, 20, 10], "area": 33.5},
        {"id": 3, "image_id": 7, "category_id": 90, "bbox": [5, 5, 10, 5], "iscrowd": 1},
    ],
    "categories": [{"id": 90, "name": "toothbrush"}, {"id": 4, "name": "motorcycle"}],
}


def write(folder: Path, content: object) -> Path:
    path = folder / "boxes.json"
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """The three images of GOOD."""
    folder = tmp_path / "pictures"
    for entry in GOOD["images"]:
        path = folder / entry["file_name"]
        path.parent.mkdir(parents=True, exist_ok=True)
        noise_picture((entry["width"], entry["height"]), 50).save(path)
    return folder


class TestReading:
    def test_good(self, tmp_path: Path, pictures: Path) -> None:
        data = read_coco(write(tmp_path, GOOD), pictures)
        assert data.names == ("toothbrush", "motorcycle")
        assert data.category_ids == (90, 4)
        assert (data.source, data.problems) == ("boxes.json", ())
        assert [(i.id, i.path, i.size) for i in data.images] == [
            (7, pictures / "a.png", (20, 10)),
            (3, pictures / "sub" / "b.png", (12, 16)),
            (5, pictures / "c.png", (12, 16)),
        ]
        first, second, empty = data.images
        assert first.boxes.tolist() == [[0, 0, 20, 10], [5, 5, 15, 10]]
        assert first.class_ids.tolist() == [1, 0]
        assert first.crowd.tolist() == [False, True]
        assert first.area.tolist() == [33.5, 50]
        assert second.boxes.tolist() == [[1.5, 2, 5.75, 10]]
        assert second.bbox.tolist() == [[1.5, 2, 4.25, 8]]
        assert [list(t.shape) for t in (empty.boxes, empty.class_ids)] == [[0, 4], [0]]
        assert (first.boxes.dtype, first.class_ids.dtype) == (torch.float32, torch.int64)
        assert first.read().size == (20, 10)

    def test_layout_leaves_crowds_out(self, tmp_path: Path) -> None:
        first, second, empty = (i.layout() for i in read_coco(write(tmp_path, GOOD)).images)
        assert (first.boxes.tolist(), first.class_ids.tolist()) == ([[0, 0, 1, 1]], [1])
        assert second.boxes.tolist() == [pytest.approx([1.5 / 12, 2 / 16, 5.75 / 12, 10 / 16])]
        assert len(empty) == 0

    def test_without_pictures(self, tmp_path: Path) -> None:
        data = read_coco(write(tmp_path, GOOD))
        assert (data.problems, {i.path for i in data.images}) == ((), {None})
        with pytest.raises(ImageError, match=r"image 7 has no file\.$"):
            data.images[0].read()


# Entries added to GOOD, and the sentence that each makes.
BAD_ANNOTATIONS = {
    "unknown image": ({"image_id": 8}, "there is no usable image 8; left out"),
    "image is a list": ({"image_id": [7]}, r"there is no usable image \[7\]; left out"),
    "unknown category": ({"category_id": 5}, r"image 7 \(a.png\): unknown category 5; left out"),
    "category is a list": ({"category_id": []}, r"unknown category \[\]; left out"),
    "no box": ({"bbox": None}, "expected a box of four numbers .*, got None; left out"),
    "three numbers": ({"bbox": [1, 2, 3]}, r"four numbers .*, got \[1, 2, 3\]; left out"),
    "words": ({"bbox": [1, 2, 3, "4"]}, "four numbers .*, got .*; left out"),
    "not finite": ({"bbox": [1, 2, math.nan, 4]}, "four numbers .* nan.*; left out"),
    "beyond float": ({"bbox": [1, 2, 10**400, 4]}, "four numbers .*; left out"),
    "zero width": ({"bbox": [1, 2, 0, 4]}, "a box of some size, got 0 x 4; left out"),
    "negative height": ({"bbox": [1, 2, 3, -4]}, "some size, got 3 x -4; left out"),
    "a sliver": ({"bbox": [1, 2, 1e-9, 4]}, "some size, got 1e-09 x 4; left out"),
    "right of the image": (
        {"bbox": [20, 2, 3, 4]}, r"\(20, 2, 23, 6\) lies outside the image of 20 x 10 .*; left out",
    ),
    "above the image": ({"bbox": [2, -9, 3, 4]}, "lies outside the image .*; left out"),
    "over the border": (
        {"bbox": [15, -5, 8, 9]}, r"\(15, -5, 23, 4\) reaches out of .* 20 x 10 .*; cut at its",
    ),
}  # fmt: skip


class TestProblems:
    @pytest.mark.parametrize("case", BAD_ANNOTATIONS)
    def test_one_bad_annotation(self, case: str, tmp_path: Path) -> None:
        changes, sentence = BAD_ANNOTATIONS[case]
        content = copy.deepcopy(GOOD)
        base = {"id": 44, "image_id": 7, "category_id": 4, "bbox": [1, 1, 2, 2]}
        content["annotations"].insert(0, base | changes)
        data = read_coco(write(tmp_path, content))
        (problem,) = data.problems
        assert problem.startswith("boxes.json: annotation 44") and problem.endswith(".")
        assert re.search(sentence, problem), problem
        cut = "cut" in sentence
        assert [len(i.boxes) for i in data.images] == [3 if cut else 2, 1, 0]
        if cut:
            assert data.images[0].boxes[0].tolist() == [15, 0, 20, 4]
            assert data.images[0].bbox[0].tolist() == [15, -5, 8, 9]

    def test_rounding_at_the_border_is_no_problem(self, tmp_path: Path) -> None:
        content = copy.deepcopy(GOOD)
        content["annotations"][1]["bbox"] = [-0.3, 0, 20.9, 10.6]
        data = read_coco(write(tmp_path, content))
        assert data.problems == ()
        assert data.images[0].boxes[0].tolist() == [0, 0, 20, 10]

    @pytest.mark.parametrize(
        ("entry", "sentence"),
        [
            (
                "none",
                "entry 3 of images: expected a whole number or a text as id, got None; left out.",
            ),
            ({"id": 9.5, "width": 2, "height": 2}, "number or a text as id, got 9.5; left out."),
            ({"id": 9, "width": 0, "height": 2}, "a width and a height in pixels, got 0 and 2; "),
            ({"id": 9, "width": 10**400, "height": 2}, "a width and a height in pixels, got 1000"),
            ({"id": 9, "width": 2}, "a width and a height in pixels, got 2 and None; "),
            ({"id": 5, "width": 2, "height": 2}, "image 5: this id occurs again; the first "),
        ],
    )
    def test_bad_images(self, entry: object, sentence: str, tmp_path: Path) -> None:
        content = copy.deepcopy(GOOD)
        content["images"].append(entry)
        data = read_coco(write(tmp_path, content))
        (problem,) = data.problems
        assert sentence in problem
        assert [i.id for i in data.images] == [7, 3, 5]

    def test_missing_pictures(self, tmp_path: Path, pictures: Path) -> None:
        (pictures / "a.png").unlink()
        content = copy.deepcopy(GOOD)
        del content["images"][2]["file_name"]
        data = read_coco(write(tmp_path, content), pictures)
        assert data.problems == (
            f"boxes.json: image 7 (a.png): the file is not in {pictures}.",
            "boxes.json: image 5: expected a file_name, got None.",
        )
        assert [i.path for i in data.images] == [None, pictures / "sub" / "b.png", None]
        assert [len(i.boxes) for i in data.images] == [2, 1, 0]

    def test_annotation_that_is_no_object(self, tmp_path: Path) -> None:
        content = GOOD | {"annotations": ["x", *GOOD["annotations"]]}
        (problem,) = read_coco(write(tmp_path, content)).problems
        assert problem == (
            "boxes.json: entry 0 of annotations: expected an object, got 'x'; left out."
        )

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ([], "a JSON object, got a list"),
            ({}, "got one without images"),
            (GOOD | {"annotations": {}}, "got one without annotations"),
            (GOOD | {"images": []}, "at least one usable image, got none.$"),
            (GOOD | {"images": [{"id": 1}]}, r"got none \(image 1: expected a width"),
            (GOOD | {"categories": []}, "at least one category"),
            (GOOD | {"categories": [{"id": 1}]}, "categories with a whole number"),
            (GOOD | {"categories": [{"id": i, "name": "a"} for i in (4, 90)]}, "'a' occurs 2"),
            (GOOD | {"categories": [{"id": 1, "name": n} for n in "ab"]}, "id 1 occurs 2"),
        ],
    )
    def test_bad_file(self, content: object, message: str, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=message):
            read_coco(write(tmp_path, content))

    def test_no_file(self, tmp_path: Path, pictures: Path) -> None:
        (tmp_path / "bad.json").write_bytes(b'{"images": [')
        (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
        for name, message in {
            "missing.json": "nothing is there",
            "pictures": "got a directory",
            "bad.json": "expected a JSON file",
            "binary.json": "expected a JSON file",
            "nul\0.json": "expected a JSON file|cannot be read",
        }.items():
            with pytest.raises(DataError, match=message):
                read_coco(tmp_path / name)
        good = write(tmp_path, GOOD)
        with pytest.raises(DataError, match="expected the folder of the images"):
            read_coco(good, tmp_path / "nowhere")
        with pytest.raises(DataError, match="got none of 3; the first would be 'a.png'"):
            read_coco(good, tmp_path)


def test_round_trip(tmp_path: Path, pictures: Path) -> None:
    first = read_coco(write(tmp_path, GOOD), pictures)
    write_coco(tmp_path / "again.json", first, pictures)
    again = read_coco(tmp_path / "again.json", pictures)
    assert (again.names, again.category_ids) == (first.names, first.category_ids)
    for a, b in zip(again.images, first.images, strict=True):
        assert (a.id, a.path, a.size) == (b.id, b.path, b.size)
        for name in ("boxes", "class_ids", "crowd", "bbox", "area"):
            assert torch.equal(getattr(a, name), getattr(b, name))
    assert again.identity()["count"] == 3
    with pytest.raises(DataError, match="cannot be written"):
        write_coco(tmp_path, first)


def test_pictures_in_another_form(tmp_path: Path, pictures: Path) -> None:
    data = read_coco(write(tmp_path, GOOD), pictures)
    Image.new("RGB", (10, 20), "white").save(pictures / "a.png")
    (pictures / "c.png").write_bytes(b"no image")
    with pytest.raises(ImageError, match="expected 20 x 10 pixels as annotated, got 10 x 20"):
        data.images[0].read()
    with pytest.raises(ImageError, match="no known image format"):
        data.images[2].read()
    with pytest.raises(ImageError):
        read_images(data, 8)


@pytest.mark.parametrize("channels", [1, 3])
def test_read_pictures(channels: int, tmp_path: Path, pictures: Path) -> None:
    array = np.zeros((10, 20, 3), dtype=np.uint8)
    array[:, 10:] = 255
    Image.fromarray(array).save(pictures / "a.png")
    got = read_images(read_coco(write(tmp_path, GOOD), pictures), 4, channels)
    assert (got.shape, got.dtype) == ((3, channels, 4, 4), np.uint8)
    # Squashed and not cropped: the halves stay halves.
    assert (got[0, :, :, 0] == 0).all() and (got[0, :, :, 3] == 255).all()


def test_squash_refuses_no_size() -> None:
    with pytest.raises(ImageError, match="at least 1 pixel"):
        squash(Image.new("L", (4, 4)), 0)


def test_identity_and_select(tmp_path: Path) -> None:
    data = read_coco(write(tmp_path, GOOD))
    assert data.select(None) is data and data.select(3) is data
    one, two = data.select(1, seed=4), data.select(2, seed=4)
    assert {i.id for i in one.images} < {i.id for i in two.images}
    assert one.identity() != two.identity() == data.select(2, seed=4).identity()
    moved = copy.deepcopy(GOOD)
    moved["annotations"][0]["bbox"][0] += 1e-9
    assert read_coco(write(tmp_path, moved)).identity() != data.identity()
    for arguments in ((0, 0), (1, -1)):
        with pytest.raises(DataError, match="at least"):
            data.select(*arguments)


def made(**changes: object) -> CocoDataset:
    image = CocoImage(
        id=1,
        path=None,
        size=(8, 8),
        boxes=torch.tensor([[1.0, 2, 5, 4]]),
        class_ids=torch.tensor([1]),
        crowd=torch.tensor([False]),
    )
    fields = {"names": ("cat", "dog"), "category_ids": (4, 9), "images": (image,), "source": "x"}
    return CocoDataset(**(fields | changes))


def test_made_data_set() -> None:
    image = made().images[0]
    assert (image.bbox.tolist(), image.area.tolist()) == ([[1, 2, 4, 2]], [8])
    for changes, message in (
        ({"category_ids": (4,)}, "a category id for each of the 2 names, got 1"),
        ({"category_ids": (4, 4)}, "id 4 occurs 2 times"),
        ({"images": (image, image)}, "image id 1 occurs 2 times"),
        ({"names": ("cat",), "category_ids": (4,)}, "classes 0 to 0 in image 1, got 1 to 1"),
    ):
        with pytest.raises(DataError, match=message):
            made(**changes)
    with pytest.raises(DataError, match=r"crowd of image 1 must have shape \[1\], got \[2\]"):
        CocoImage(1, None, (8, 8), image.boxes, image.class_ids, torch.zeros(2, dtype=torch.bool))


def test_classes_of_a_detector() -> None:
    assert class_categories(made(), ["Dog ", "bird"]) == (9, None)
    twins = made(names=("Dog", "dog"))  # told apart where names say so
    assert class_categories(twins, ["dog", "Dog", "DOG"]) == (9, 4, None)
    assert unknown_classes(made(), ["dog"]) is None  # there is no annotated cat to be missed
    assert unknown_classes(made(), ["cat"]) == (
        "x: the model does not know the classes 'dog'; their boxes (1) count as missed."
    )
    with pytest.raises(DataError, match="classes that the model knows, such as 'bird', got 'cat'"):
        class_categories(made(), ["bird"])


class TestBccd:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        """The layout of the real folder with one small image."""
        pictures = tmp_path / "BCCD" / "JPEGImages"
        pictures.mkdir(parents=True)
        Image.new("RGB", (64, 48), "white").save(pictures / "BloodImage_00007.jpg")
        content = {
            "images": [{"id": 7, "file_name": "BloodImage_00007.jpg", "width": 64, "height": 48}],
            "annotations": [{"id": 1, "image_id": 7, "category_id": 2, "bbox": [1, 2, 30, 40]}],
            "categories": [{"id": i + 1, "name": name} for i, name in enumerate(NAMES)],
        }
        (tmp_path / "instances_test.json").write_text(json.dumps(content))
        return tmp_path

    def test_read(self, folder: Path) -> None:
        data = load_bccd(folder, "test")
        assert data.names == NAMES
        assert data.images[0].class_ids.tolist() == [1]
        assert read_images(data, 16).shape == (1, 3, 16, 16)

    def test_real(self, tmp_path: Path, real_data) -> None:
        with zipfile.ZipFile(real_data("det3_bccd_640px.zip")) as file:
            file.extractall(tmp_path)
        for part, images, boxes in (("train", 205, 2804), ("val", 87, 1137), ("test", 72, 945)):
            data = load_bccd(tmp_path, part)
            assert (len(data.images), data.problems) == (images, ())
            assert sum(len(image.layout()) for image in data.images) == boxes
        assert read_images(data.select(2), 32).std() > 10

    def test_refused(self, folder: Path) -> None:
        with pytest.raises(DataError, match="the parts train, val, test, got 'all'"):
            load_bccd(folder, "all")
        with pytest.raises(DataError, match="instances_train.json: .*nothing is there"):
            load_bccd(folder, "train")
        path = folder / "instances_test.json"
        path.write_text(path.read_text().replace("WBC", "white"))
        with pytest.raises(DataError, match="expected the classes RBC, WBC, Platelets, got RBC,"):
            load_bccd(folder, "test")
