"""Detections: what they refuse, and the forms that they turn into."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from pictures import noise_picture
from PIL import Image

from dive_fast import Detections, DiveFastError, ImageError

NAMES = ("cat", "dog", "two words")


@pytest.fixture
def found() -> Detections:
    return Detections(
        xyxy=[[0, 0.5, 8, 10.25], [3, 4, 5, 6]],
        class_id=[2, 0],
        confidence=[0.75, 1],
        names=NAMES,
    )


@pytest.fixture
def unsure() -> Detections:
    """The second object is more likely a dog than the cat that it is called."""
    return Detections(
        xyxy=[[0, 0.5, 8, 10.25], [3, 4, 5, 6]],
        class_id=[2, 0],
        confidence=[0.75, 0.0],
        names=NAMES,
        class_probabilities=[[0.0005, 0.125, 0.75], [0.0, 0.5, 0.001]],
    )


@pytest.fixture(params=["lists", "arrays", "tensors"])
def nothing(request: pytest.FixtureRequest) -> Detections:
    empty = {
        "lists": ([], [], []),
        "arrays": (np.zeros((0, 4)), np.zeros(0, dtype=np.int32), np.zeros(0)),
        "tensors": (torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0)),
    }
    return Detections(*empty[request.param], names=NAMES)


def test_fields(found: Detections) -> None:
    assert len(found) == 2
    assert found.labels == ["two words", "cat"]
    dtypes = (found.xyxy.dtype, found.class_id.dtype, found.confidence.dtype)
    assert dtypes == (torch.float32, torch.int64, torch.float32)
    assert found.to_dict() == {
        "boxes": [[0, 0.5, 8, 10.25], [3, 4, 5, 6]],
        "indices": [2, 0],
        "labels": ["two words", "cat"],
        "confidences": [0.75, 1],
        "evaluations": 0,
        "seconds": 0,
    }


def test_class_probabilities(found: Detections, unsure: Detections) -> None:
    assert found.class_probabilities is None
    assert unsure.class_probabilities.dtype == torch.float32
    assert unsure.class_probabilities.shape == (2, 3)
    plain = unsure.to_dict()
    assert plain.pop("class_probabilities") == unsure.class_probabilities.tolist()
    fields = ["boxes", "labels", "indices", "confidences", "evaluations", "seconds"]
    assert list(plain) == fields


@pytest.mark.parametrize("rows", [[], np.zeros((0, 3)), torch.zeros(0, 3)])
def test_class_probabilities_of_nothing(rows: object) -> None:
    empty = Detections([], [], [], NAMES, rows)
    assert empty.class_probabilities.shape == (0, 3)
    assert empty.to_dict()["class_probabilities"] == []
    assert empty.to_coco(17, (1, 2, 3), every_class=True) == []


def test_class_probabilities_are_rounded_sums() -> None:
    """Of many classes in single precision."""
    n = 5000
    names = tuple(str(c) for c in range(n))
    rows = torch.randn(3, n).softmax(dim=1)
    Detections([[0, 0, 1, 1]] * 3, [0] * 3, [0.5] * 3, names, rows)


def test_kept_off_the_graph() -> None:
    boxes = torch.tensor([[0.0, 0, 1, 1]], requires_grad=True)
    assert not Detections(boxes * 2, [0], [0.5], NAMES).xyxy.requires_grad


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"xyxy": [[0, 0, 1]]}, r"xyxy must have shape \[n, 4\], got \[1, 3\]"),
        ({"xyxy": [0, 0, 1, 1]}, r"xyxy must have shape \[n, 4\], got \[4\]"),
        ({"xyxy": [[0, 0, 1, 1]] * 2}, r"class_id must have shape \[2\], one per box, got \[1\]"),
        ({"confidence": []}, r"confidence must have shape \[1\], one per box, got \[0\]"),
        ({"xyxy": [[2, 0, 1, 1]]}, "left < right and top < bottom, got .2.0, 0.0, 1.0, 1.0"),
        ({"xyxy": [[0, 1, 1, 1]]}, "left < right"),
        ({"xyxy": [[0, 0, 1, float("inf")]]}, "finite boxes"),
        ({"xyxy": [[0, 0, float("nan"), 1]]}, "finite boxes"),
        ({"xyxy": "boxes"}, "xyxy must hold numbers"),
        ({"class_id": [3]}, r"class_id must lie in \[0, 3\), the classes with a name, got 3"),
        ({"class_id": [-1]}, "got -1"),
        ({"class_id": [0.5]}, "class_id must hold whole numbers"),
        ({"confidence": [1.5]}, r"confidence must lie in \[0, 1\], got 1.5"),
        ({"confidence": [-0.1]}, "got -0.1"),
        ({"confidence": [float("nan")]}, "got nan"),
        ({"names": ()}, r"class_id must lie in \[0, 0\)"),
        (
            {"class_probabilities": [[0.5, 0.5]]},
            r"class_probabilities must have shape \[1, 3\], one per box and name, got \[1, 2\]",
        ),
        ({"class_probabilities": [0.5, 0.2, 0.1]}, r"shape \[1, 3\], .*, got \[3\]"),
        ({"class_probabilities": []}, r"shape \[1, 3\], one per box and name, got \[0, 3\]"),
        ({"class_probabilities": [[0.5, 0.2, 0]] * 2}, r"got \[2, 3\]"),
        (
            {"class_probabilities": [[0.5, 1.5, 0]]},
            r"class_probabilities must lie in \[0, 1\], got 1.5",
        ),
        ({"class_probabilities": [[0.5, -0.1, 0]]}, "got -0.1"),
        ({"class_probabilities": [[0.5, float("nan"), 0]]}, "got nan"),
        ({"class_probabilities": [[0.5, 0.5, 0.5]]}, "must sum to at most 1 for each box, got 1.5"),
        ({"class_probabilities": "sure"}, "class_probabilities must hold numbers"),
    ],
)
def test_refused(changes: dict, message: str) -> None:
    good = {"xyxy": [[0, 0, 1, 1]], "class_id": [0], "confidence": [0.5], "names": NAMES}
    Detections(**good)
    with pytest.raises(DiveFastError, match=message):
        Detections(**(good | changes))


class TestCoco:
    def test_boxes(self, found: Detections) -> None:
        assert found.to_coco(17, (1, 18, 90)) == [
            {"image_id": 17, "category_id": 90, "bbox": [0, 0.5, 8, 9.75], "score": 0.75},
            {"image_id": 17, "category_id": 1, "bbox": [3, 4, 2, 2], "score": 1},
        ]

    def test_class_without_category_is_left_out(self, found: Detections) -> None:
        (only,) = found.to_coco(17, (1, 18, None))
        assert only["category_id"] == 1

    def test_every_class(self, unsure: Detections) -> None:
        """Unlikely classes are left out, but never the object's own."""
        entries = unsure.to_coco(17, (1, 18, 90), every_class=True)
        first, second = [0, 0.5, 8, 9.75], [3, 4, 2, 2]
        assert entries == [
            {"image_id": 17, "category_id": 18, "bbox": first, "score": 0.125},
            {"image_id": 17, "category_id": 90, "bbox": first, "score": 0.75},
            {"image_id": 17, "category_id": 1, "bbox": second, "score": 0},
            {"image_id": 17, "category_id": 18, "bbox": second, "score": 0.5},
            {"image_id": 17, "category_id": 90, "bbox": second, "score": pytest.approx(0.001)},
        ]
        assert [e["category_id"] for e in unsure.to_coco(17, (1, 18, 90))] == [90, 1]

    def test_every_class_without_category_is_left_out(self, unsure: Detections) -> None:
        entries = unsure.to_coco(17, (None, 18, None), every_class=True)
        assert [(e["category_id"], e["score"]) for e in entries] == [(18, 0.125), (18, 0.5)]

    def test_every_class_without_probabilities(self, found: Detections) -> None:
        entries = found.to_coco(17, (1, 18, 90), every_class=True)
        assert entries == found.to_coco(17, (1, 18, 90))

    def test_empty(self, nothing: Detections) -> None:
        assert nothing.to_coco(17, (1, 2, 3)) == []
        assert nothing.to_coco(17, (1, 2, 3), every_class=True) == []

    def test_refused(self, found: Detections) -> None:
        with pytest.raises(DiveFastError, match="a category for each of the 3 names, got 2"):
            found.to_coco(17, (1, 2))


class TestSupervision:
    def test_fields(self, found: Detections) -> None:
        supervision = pytest.importorskip("supervision")
        there = found.to_supervision()
        assert isinstance(there, supervision.Detections)
        np.testing.assert_array_equal(there.xyxy, found.xyxy.numpy())
        assert there.class_id.tolist() == [2, 0]
        assert there.confidence.tolist() == [0.75, 1]
        assert there.data["class_name"].tolist() == ["two words", "cat"]
        assert len(there[there.confidence > 0.9]) == 1
        there.xyxy[:] = 0  # a copy
        assert found.xyxy[0, 2] == 8

    def test_empty(self, nothing: Detections) -> None:
        pytest.importorskip("supervision")
        assert nothing.to_supervision().is_empty()

    def test_not_installed(self, found: Detections, monkeypatch) -> None:
        monkeypatch.setitem(sys.modules, "supervision", None)
        with pytest.raises(DiveFastError, match="not installed: pip install supervision"):
            found.to_supervision()


class TestDraw:
    def test_small_ones_are_enlarged(self) -> None:
        """Pixel by pixel, with the box at its edges."""
        array = np.zeros((20, 32), dtype=np.uint8)
        array[10, 20] = 255
        found = Detections([[4, 6, 12, 18]], [1], [0.5], NAMES)
        picture = found.draw(array)
        assert (picture.mode, picture.size) == ("RGB", (32 * 12, 20 * 12))
        drawn = np.asarray(picture)
        assert (drawn[120:132, 240:252] == 255).all()
        coloured = drawn.max(axis=2) != drawn.min(axis=2)
        # Below the caption, which stands above the box.
        assert not coloured[6 * 12 + 5 : 18 * 12, : 4 * 12].any()
        assert not coloured[18 * 12 :].any()
        assert coloured[6 * 12 : 18 * 12, 4 * 12].all()
        assert coloured[6 * 12 : 18 * 12, 12 * 12 - 1].all()
        assert not coloured[6 * 12 + 20, 5 * 12 : 11 * 12].any()  # the inside is left free
        assert coloured[: 6 * 12].any()  # the caption

    def test_large_ones_keep_their_size(self, found: Detections) -> None:
        image = noise_picture((500, 40), 30)
        before = image.copy()
        assert found.draw(image).size == (500, 40)
        assert image == before

    def test_empty(self, nothing: Detections) -> None:
        image = noise_picture((400, 300), 30)
        np.testing.assert_array_equal(nothing.draw(image), image.convert("RGB"))

    def test_captions_of_equal_boxes_do_not_cover_each_other(self) -> None:
        one = Detections([[100, 100, 300, 300]], [0], [0.5], NAMES)
        two = Detections([[100, 100, 300, 300]] * 2, [0, 0], [0.5, 0.5], NAMES)
        image = Image.new("RGB", (400, 400))
        areas = [(np.asarray(d.draw(image)) > 0).any(axis=2).sum() for d in (one, two)]
        outline = (np.asarray(one.draw(image))[150:250] > 0).any(axis=2).sum()
        assert areas[1] > areas[0] + outline / 4

    def test_every_corner_of_the_picture(self) -> None:
        """Captions wider than the box, or than the image, and boxes at and over the border."""
        boxes = [[0, 0, 1, 1], [30, 19, 32, 20], [-5, -5, 40, 30], [0, 19, 1, 20]]
        found = Detections(boxes, [0] * 4, [0.5] * 4, ("a name longer than the image " * 3,))
        assert found.draw(np.zeros((20, 32), dtype=np.uint8)).size == (384, 240)

    def test_modes(self, found: Detections, tmp_path) -> None:
        Image.new("P", (10, 12)).save(tmp_path / "p.png")
        assert found.draw(tmp_path / "p.png").mode == "RGB"
        assert found.draw(torch.zeros(3, 12, 10)).mode == "RGB"

    def test_refused(self, found: Detections, tmp_path) -> None:
        with pytest.raises(ImageError, match="no such file"):
            found.draw(tmp_path / "missing.png")
