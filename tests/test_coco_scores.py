"""The COCO numbers against the reference evaluation, and what must not break them."""

from __future__ import annotations

import copy
import json
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from dive_fast import DataError, DiveFastError
from dive_fast.data.coco import CocoDataset, CocoImage, read_coco
from dive_fast.evaluation.coco_scores import NAMES, score, score_boxes

pytest.importorskip("pycocotools", reason="the COCO numbers come with the extra detect")


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, real_data) -> Path:
    folder = tmp_path_factory.mktemp("reference")
    with zipfile.ZipFile(real_data("eval_coco_reference_100.zip")) as file:
        file.extractall(folder)
    return folder


@pytest.fixture
def data() -> CocoDataset:
    """Two images: a small and a large square of class a; a medium one of b."""

    def image(number: int, boxes: list, classes: list) -> CocoImage:
        crowd = torch.zeros(len(boxes), dtype=torch.bool)
        return CocoImage(
            number, None, (200, 200), torch.tensor(boxes), torch.tensor(classes), crowd
        )

    return CocoDataset(
        names=("a", "b", "c"),
        category_ids=(11, 5, 7),
        images=(
            image(9, [[0.0, 0, 10, 10], [50, 50, 170, 170]], [0, 0]),
            image(2, [[100.0, 100, 150, 150]], [1]),
        ),
        source="squares",
    )


def truth(data: CocoDataset) -> list[dict]:
    """The annotated boxes as results."""
    return [
        {
            "image_id": image.id,
            "category_id": data.category_ids[c],
            "bbox": bbox,
            "score": 1.0,
        }
        for image in data.images
        for c, bbox in zip(image.class_ids.tolist(), image.bbox.tolist(), strict=True)
    ]


def test_reference_to_the_last_digit(reference: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """100 images of COCO val2014 with crowds, mask areas and 734 made-up detections."""
    dataset = read_coco(reference / "instances_val2014_100.json")
    assert (len(dataset.images), dataset.problems) == (100, ())
    results = json.loads((reference / "instances_val2014_fakebbox100_results.json").read_text())
    expected = json.loads((reference / "expected_pycocotools.json").read_text())
    assert tuple(expected["names"]) == NAMES
    found = score_boxes(dataset, results)
    assert list(found.numbers.items()) == list(zip(NAMES, expected["bbox"], strict=True))
    assert found.classes == expected["bbox_per_class_AP"]
    assert capfd.readouterr() == ("", "")


def test_right_answers(data: CocoDataset) -> None:
    found = score_boxes(data, truth(data))
    half = {"AR1": 0.75}  # of the two objects of class a, one detection finds one
    assert found.numbers == {name: pytest.approx(half.get(name, 1)) for name in NAMES}
    assert found.classes == {"a": pytest.approx(1), "b": pytest.approx(1), "c": None}
    assert score(data, truth(data)) == found.numbers


def test_no_answers(data: CocoDataset) -> None:
    assert score(data, []) == dict.fromkeys(NAMES, 0)


def test_size_without_objects(data: CocoDataset) -> None:
    found = score_boxes(data, truth(data), image_ids=[2]).numbers
    assert (found["AP_small"], found["AP_large"]) == (None, None)
    assert found["AP_medium"] == found["AP"] == pytest.approx(1)
    assert None in score_boxes(data, [], image_ids=[9]).classes.values()


def test_only_the_chosen_images_count(data: CocoDataset) -> None:
    results = [r for r in truth(data) if r["image_id"] == 2]
    assert score_boxes(data, results, [2]).numbers["AP"] == pytest.approx(1)
    assert score(data, results)["AP"] == pytest.approx(0.5)


def test_results_are_left_as_they_are(data: CocoDataset) -> None:
    results = truth(data)
    before = copy.deepcopy(results)
    score(data, results)
    assert results == before


def test_other_categories_are_not_looked_at(data: CocoDataset) -> None:
    other = truth(data)[0] | {"category_id": 1234, "score": 2.0}
    assert score(data, [other, *truth(data)]) == score(data, truth(data))


def test_crowd(data: CocoDataset) -> None:
    """What lies in a crowd is neither right nor wrong."""
    image = data.images[0]
    within = {"image_id": 9, "category_id": 11, "bbox": [60, 60, 20, 20], "score": 2.0}
    results = [within, *truth(data)]
    assert score(data, results)["AP"] < 1
    crowd = CocoImage(
        image.id,
        None,
        image.size,
        image.boxes,
        image.class_ids,
        crowd=torch.tensor([False, True]),
    )
    with_crowd = CocoDataset(data.names, data.category_ids, (crowd, data.images[1]), "crowd")
    assert score(with_crowd, results)["AP"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ({"image_id": 9}, "expected results with image_id, category_id, bbox, score, got"),
        ([9, 11, 0.5], "expected results with"),
        (
            {"image_id": 3, "category_id": 11, "bbox": [0, 0, 1, 1], "score": 1},
            "results of the annotated images, got one of image 3",
        ),
        (
            {"image_id": 9, "category_id": 11, "bbox": [0, 0, 1], "score": 1},
            "a bbox of four finite numbers and a finite score, got",
        ),
        (
            {"image_id": 9, "category_id": 11, "bbox": [0, 0, 1, 1], "score": float("nan")},
            "a bbox of four finite numbers and a finite score, got",
        ),
    ],
)
def test_refused(data: CocoDataset, result: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        score(data, [result])


def test_not_installed(data: CocoDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycocotools.coco", None)
    with pytest.raises(DiveFastError, match=r"pip install 'dive_fast\[detect\]'\.$"):
        score(data, [])
