"""Ids as numbers, whole floats and texts; categories of one name; classes by their spelling."""

from __future__ import annotations

import contextlib
import copy
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from coco_files import annotated, write
from command import call
from pictures import noise_picture

from dive_fast import DataError
from dive_fast.data.coco import as_id, class_categories, read_coco, unknown_classes, write_coco
from dive_fast.evaluation.coco_scores import NAMES, score_boxes
from dive_fast.evaluation.rundir import read_records

IDS: dict[str, Callable[[int], object]] = {
    "numbers": lambda i: 40 - 3 * i,
    "texts": lambda i: f"photo {i}",
    "digits as text": lambda i: str(i),
    "whole floats": float,
    "beyond 64 bits": lambda i: 2**63 + i,
    "300 digits": lambda i: 10**299 + i,
    "mixed": lambda i: i if i % 2 else f"photo {i}",
}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (3, 3), (3.0, 3), ("3", "3"), ("", ""), (np.int64(3), 3), (-1, -1), (True, None),
        (3.5, None), (float("nan"), None), (float("inf"), None), (None, None), ([3], None),
    ],
)  # fmt: skip
def test_what_is_an_id(value: object, expected: object) -> None:
    assert as_id(value) == expected and type(as_id(value)) is type(expected)


def content_with(ids: Callable[[int], object], category: Callable[[int], object] = int) -> dict:
    """Twelve images, two classes, a crowd."""
    content = annotated(12, image_id=ids)
    content["categories"] = [{"id": category(k), "name": n} for k, n in ((5, "cat"), (2, "dog"))]
    for i, annotation in enumerate(content["annotations"]):
        width, height = annotation["bbox"][2:]
        annotation |= {"category_id": category((5, 2)[i % 2]), "area": width * height}
        annotation["iscrowd"] = int(i == 4)
    return content


def results_of(content: dict) -> list[dict]:
    """Every box shifted a little, each with a score of its own, and some wrong ones."""
    rng, results = np.random.default_rng(1), []
    for annotation in content["annotations"]:
        left, top, width, height = annotation["bbox"]
        for shift, wrong in ((0.1, False), (0.6, True)):
            kinds = [c["id"] for c in content["categories"]]
            category = annotation["category_id"] if not wrong else kinds[rng.integers(2)]
            box = [left + shift * rng.random() * width, top, width, height]
            key = {"image_id": annotation["image_id"], "category_id": category}
            results.append({**key, "bbox": box, "score": float(rng.random())})
    return results


def by_pycocotools(content: dict, results: list[dict]) -> list[float | None]:
    coco = pytest.importorskip("pycocotools.coco")
    cocoeval = pytest.importorskip("pycocotools.cocoeval")
    with contextlib.redirect_stdout(io.StringIO()):
        truth = coco.COCO()
        truth.dataset = copy.deepcopy(content)
        truth.createIndex()
        run = cocoeval.COCOeval(truth, truth.loadRes(copy.deepcopy(results)), "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    return [None if number == -1 else number for number in run.stats.tolist()]


@pytest.mark.parametrize("name", IDS)
def test_scores_whatever_the_ids_are(name: str, tmp_path: Path) -> None:
    """The numbers of pycocotools for the same file with small numbers as ids."""
    plain, content = content_with(int), content_with(IDS[name])
    found = score_boxes(read_coco(write(tmp_path, content)), results_of(content)).numbers
    expected = dict(zip(NAMES, by_pycocotools(plain, results_of(plain)), strict=True))
    assert found == pytest.approx(expected) and 0.1 < found["AP"] < 0.9


@pytest.mark.parametrize("name", ["texts", "digits as text", "whole floats"])
def test_pycocotools_agrees_on_the_very_file(name: str, tmp_path: Path) -> None:
    content = content_with(IDS[name], str if name != "whole floats" else float)
    found = score_boxes(read_coco(write(tmp_path, content)), results_of(content)).numbers
    assert list(found.values()) == by_pycocotools(content, results_of(content))


def test_scores_of_chosen_images(tmp_path: Path) -> None:
    content = content_with(str)
    data = read_coco(write(tmp_path, content))
    one = score_boxes(data, results_of(content), ["3"]).numbers
    alone = {
        **content,
        "images": content["images"][3:4],
        "annotations": content["annotations"][3:4],
    }
    results = [r for r in results_of(content) if r["image_id"] == "3"]
    assert list(one.values()) == by_pycocotools(alone, results)
    for image_id in (3, "12", None, ["3"]):
        with pytest.raises(DataError, match="expected results of the annotated images"):
            score_boxes(data, results_of(content), [image_id])
        with pytest.raises(DataError, match="expected results of the annotated images"):
            score_boxes(data, [{**results_of(content)[0], "image_id": image_id}])


@pytest.mark.parametrize("name", IDS)
def test_round_trip(name: str, tmp_path: Path) -> None:
    first = read_coco(write(tmp_path, content_with(IDS[name], str)))
    write_coco(tmp_path / "again.json", first)
    again = read_coco(tmp_path / "again.json")
    assert [i.id for i in again.images] == [i.id for i in first.images]
    assert [type(i.id) for i in again.images] == [type(i.id) for i in first.images]
    assert (again.category_ids, again.problems) == (("5", "2"), ())


def test_evaluate_and_fit_with_texts(layout_dir, tmp_path: Path, capsys) -> None:
    """The summary of a file with numbers, and records under the texts."""
    pytest.importorskip("pycocotools")
    for i in range(3):
        noise_picture((64, 48), 50).save(tmp_path / f"{i}.png")
    summaries, fitted = [], []
    for name, ids in {"numbers": int, "texts": "photo-{}".format}.items():
        content = annotated(3, (64, 48), image_id=ids)
        content["categories"] = [{"id": "k" if ids is not int else 1, "name": "two"}]
        for annotation in content["annotations"]:
            annotation["category_id"] = content["categories"][0]["id"]
        given = ("--data", write(tmp_path, content), "--images", tmp_path, "--model", layout_dir)
        given += ("--probes", 2)
        said = call(capsys, "evaluate", *given, "--out", tmp_path / name, "--json")
        assert said.code == 0
        summaries.append(json.loads(said.out))
        assert sorted(read_records(tmp_path / name)) == sorted(str(ids(i)) for i in range(3))
        fitted.append(call(capsys, "fit", *given, "--out", tmp_path / "fitted").out)
    for summary in summaries:
        del summary["seconds_per_image"]
    assert summaries[0] == summaries[1] and fitted[0] == fitted[1]


def test_ids_that_are_one_in_the_records(tmp_path: Path) -> None:
    content = annotated(3)
    content["images"][1]["id"] = "0"
    with pytest.raises(DataError, match="ids that differ as text, got images 0 and '0'"):
        read_coco(write(tmp_path, content))


def test_an_id_of_two_files(tmp_path: Path) -> None:
    """Its boxes may be of either image; the same entry twice is one."""
    content = annotated(3)
    content["images"].append({**content["images"][0], "file_name": "other.png"})
    data = read_coco(write(tmp_path, content))
    assert [image.id for image in data.images] == [1, 2]
    assert "'other.png' has this id too" in data.problems[0]
    content["images"][-1] = content["images"][0]
    data = read_coco(write(tmp_path, content))
    assert [image.id for image in data.images] == [0, 1, 2]
    assert "this id occurs again; the first counts" in data.problems[0]


def test_annotations_of_one_id_all_count(tmp_path: Path) -> None:
    content = annotated(3)
    for annotation in content["annotations"]:
        annotation["id"] = 1
    data = read_coco(write(tmp_path, content))
    assert [len(image.boxes) for image in data.images] == [1, 1, 1]
    assert len(data.problems) == 2 and "this id occurs again; all of them" in data.problems[0]


@pytest.mark.parametrize(
    ("value", "crowd", "problem"),
    [
        (1, True, None), (True, True, None), (1.0, True, None), ("1", True, None),
        (0, False, None), (False, False, None), (0.0, False, None), ("0", False, None),
        (None, False, None), (2, False, "got 2; taken for 0"), ("yes", False, "got 'yes'"),
        ([], False, r"got \[\]"), (float("nan"), False, "got nan"),
    ],
)  # fmt: skip
def test_iscrowd(value: object, crowd: bool, problem: str | None, tmp_path: Path) -> None:
    content = annotated(3)
    content["annotations"][0]["iscrowd"] = value
    data = read_coco(write(tmp_path, content))
    assert data.images[0].crowd.tolist() == [crowd]
    assert len(data.problems) == (problem is not None)


@pytest.mark.parametrize(
    ("width", "taken"),
    [(640.0, True), (640.5, False), ("640", False), (True, False), (None, False), (1e400, False)],
)
def test_sizes(width: object, taken: bool, tmp_path: Path) -> None:
    content = annotated(3)
    content["images"][0]["width"] = width
    data = read_coco(write(tmp_path, content))
    assert len(data.images) == 3 - (not taken)
    assert data.images[0].size == (640, 480) and isinstance(data.images[0].size[0], int)


def of_categories(*categories: tuple, used: object = 1) -> dict:
    """(id, name, supercategory) each; all boxes are of one of them."""
    content = annotated(3)
    names = ("id", "name", "supercategory")
    content["categories"] = [dict(zip(names, entry, strict=True)) for entry in categories]
    for annotation in content["annotations"]:
        annotation["category_id"] = used
    return content


class TestCategoriesOfOneName:
    def test_the_root_of_an_export_is_no_class(self, tmp_path: Path) -> None:
        content = of_categories((0, "cells", "none"), (1, "RBC", "cells"), (2, "WBC", "cells"))
        data = read_coco(write(tmp_path, content))
        assert (data.names, data.problems) == (("RBC", "WBC"), ())
        content["annotations"][0]["category_id"] = 0  # a class after all
        assert read_coco(write(tmp_path, content)).names == ("cells", "RBC", "WBC")

    def test_a_class_without_boxes_stays(self, tmp_path: Path) -> None:
        content = of_categories((1, "person", "person"), (2, "cat", "animal"), used=2)
        assert read_coco(write(tmp_path, content)).names == ("person", "cat")

    @pytest.mark.parametrize("first", [0, 1])
    def test_the_used_one_counts(self, first: int, tmp_path: Path) -> None:
        entries = [(0, "RBC", "none"), (1, "RBC", "blood")][:: 1 if first == 0 else -1]
        data = read_coco(write(tmp_path, of_categories(*entries)))
        assert (data.names, data.category_ids) == (("RBC",), (1,))
        assert all(len(image.boxes) == 1 for image in data.images)
        assert "category 0: the name 'RBC' is that of category 1 too" in data.problems[0]

    def test_both_used(self, tmp_path: Path) -> None:
        content = of_categories((0, "RBC", "none"), (1, "RBC", "RBC"))
        content["annotations"][0]["category_id"] = 0
        with pytest.raises(DataError, match="'RBC' occurs 2 times, and annotations refer to its"):
            read_coco(write(tmp_path, content))

    @pytest.mark.parametrize("bad", [True, None, 1.5, [1]])
    def test_no_id(self, bad: object, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="categories with a whole number or a text as id"):
            read_coco(write(tmp_path, of_categories((bad, "RBC", "none"), (1, "WBC", "none"))))


@pytest.mark.parametrize(
    ("annotated_as", "asked", "expected"),
    [
        (["traffic light"], ["traffic_light"], (0,)),
        (["traffic_light"], ["Traffic-Light "], (0,)),
        (["caf\u00e9"], ["cafe\u0301"], (0,)),
        (["STRASSE"], ["stra\u00dfe"], (0,)),
        (["traffic light", "traffic_light"], ["traffic_light", "cat"], (1, None)),
        (["traffic light", "traffic_light", "cat"], ["traffic-light", "cat"], (None, 2)),
    ],
)
def test_spellings(annotated_as: list, asked: list, expected: tuple, tmp_path: Path) -> None:
    content = of_categories(*[(k, name, "none") for k, name in enumerate(annotated_as)], used=0)
    data = read_coco(write(tmp_path, content))
    assert class_categories(data, asked) == expected
    # What has no candidate is told as unknown.
    assert (unknown_classes(data, asked) is None) == (0 in expected)
