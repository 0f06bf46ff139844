"""The page of runs of detectors, alone and beside classifiers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from html_tree import Element, cells, parse, table_of
from PIL import Image
from report_runs import found, write_detections, write_run

pytest.importorskip("jinja2", reason="reports need jinja2")
pytest.importorskip("matplotlib", reason="reports need matplotlib")
pytest.importorskip("sklearn", reason="reports need scikit-learn")
pytest.importorskip("pycocotools", reason="the COCO numbers need pycocotools")

from dive_fast.data.coco import read_coco  # noqa: E402
from dive_fast.errors import DataError  # noqa: E402
from dive_fast.report import write_report  # noqa: E402
from dive_fast.report.detectors import spread  # noqa: E402

BOXES = {1: [[10, 10, 50, 50]], 2: [[0, 0, 30, 40], [50, 50, 90, 90]], 3: [[20, 20, 60, 60]]}
# All boxes of image 1 and 2, the one of image 3 with the wrong class.
RECORDS = (
    found("1", BOXES[1], [0], 0.9),
    found("2", BOXES[2], [0, 1], 0.6),
    found("3", BOXES[3], [0], 0.7),
    {"id": "4", "error": "4.png: cut off."},
)


@pytest.fixture
def annotations(tmp_path: Path) -> Path:
    """Three annotated images, ``photos/N.png``; the last one shows a "two"."""
    (tmp_path / "photos").mkdir()
    categories = {1: [1], 2: [1, 2], 3: [2]}
    content: dict[str, list] = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 100, "height": 100} for i in BOXES],
        "categories": [{"id": 1, "name": "one"}, {"id": 2, "name": "two"}],
        "annotations": [],
    }
    for i, boxes in BOXES.items():
        Image.new("RGB", (100, 100), (60, 60, 60)).save(tmp_path / "photos" / f"{i}.png")
        for box, category in zip(boxes, categories[i], strict=True):
            left, top, right, bottom = box
            size = [right - left, bottom - top]
            entry = {"id": len(content["annotations"]) + 1, "image_id": i, "category_id": category}
            entry |= {"bbox": [left, top, *size], "area": size[0] * size[1], "iscrowd": 0}
            content["annotations"].append(entry)
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    return tmp_path / "boxes.json"


def page_of(*runs: Path, **options: object) -> tuple[Element, list[str]]:
    out = runs[0].parent / "page.html"
    problems = write_report(runs, out, **options)
    return parse(out.read_text()), problems


def numbers(page: Element) -> dict[str, str]:
    heads, row = cells(table_of(page, "The detectors side by side"))
    return dict(zip(heads, row, strict=True))


def test_numbers_and_pictures(annotations: Path) -> None:
    """Of "one" both are found, and one too many of 0.7 between 0.9 and 0.6: at the recalls up to
    1/2 the precision is 1, beyond it 2/3: 51 of the 101 recalls of COCO and 50. Of "two" one of
    two is found, and nothing else: 51 of 101 have 1."""
    run = write_detections(annotations.parent / "run", RECORDS)
    page, problems = page_of(run, data=annotations, images=annotations.parent / "photos")
    told = numbers(page)
    ap = (51 + 50 * 2 / 3) / 101, 51 / 101
    assert told["AP"] == told["AP50"] == f"{sum(ap) / 2:.3f}" and told["AP large"] == "–"
    assert told["Evaluations per image"] == "200" and told["Images"] == "3 1 failed"
    assert cells(table_of(page, "AP of each class"))[1:] == [
        ["one", f"{ap[0]:.3f}"],
        ["two", f"{ap[1]:.3f}"],
    ]
    assert problems == []
    pictures = page.one("ul", class_="gallery wide").all("figure")
    assert len(pictures) == 3 and len(page.all("img")) == 3
    assert [p.all("p")[0].text for p in pictures] == ["2", "3", "1"]  # the least certain first
    assert "found: one 0.60, two 0.60" in pictures[0].text and "annotated: two" in pictures[1].text
    alt = page.all("img")[0].attributes["alt"]
    assert alt == "Image 2 with boxes around what was found: one 0.60, two 0.60"


def test_numbers_of_the_summary_are_taken(annotations: Path) -> None:
    """If it is of as many images."""
    run = write_detections(annotations.parent / "run", RECORDS)
    (run / "summary.json").write_text(json.dumps({"n": 3, "AP": 0.125, "AP50": None}))
    page, problems = page_of(run, pictures=0)
    assert numbers(page)["AP"] == "0.125" and numbers(page)["AP50"] == "–" and problems == []
    (run / "summary.json").write_text(json.dumps({"n": 2, "AP": 0.125}))
    page, problems = page_of(run, pictures=0)
    assert numbers(page)["AP"] == "–" and "need its annotations" in " ".join(problems)


def test_where_the_run_says(annotations: Path) -> None:
    dataset = read_coco(annotations, annotations.parent / "photos")
    run = write_detections(annotations.parent / "run", RECORDS, data=dataset.identity())
    content = json.loads((run / "run.json").read_text())
    assert dataset.where == {
        "annotations": str(annotations),
        "images": str(annotations.parent / "photos"),
    }
    (run / "run.json").write_text(json.dumps({**content, "data": dataset.where}))
    page, problems = page_of(run)
    assert problems == [] and len(page.all("img")) == 3
    # Of another size now: boxes would lie elsewhere.
    Image.new("RGB", (50, 100)).save(annotations.parent / "photos" / "2.png")
    page, problems = page_of(run)
    assert "are not those of the run" in problems[0] and len(page.all("img")) == 2


def test_scenes_are_made_again(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="the scenes show scikit-learn's digits")
    run = write_detections(tmp_path / "run", [found("2", [[4, 4, 12, 20]], [1], 0.5)])
    content = json.loads((run / "run.json").read_text())
    content["config"]["data"] = {"count": 2}
    (run / "run.json").write_text(json.dumps({**content, "data": {"annotations": "scenes"}}))
    page, problems = page_of(run)
    assert len(page.all("img")) == 1
    assert problems == [] and numbers(page)["AP"] != "–"


def test_of_detect_the_drawn_images_are_shown(tmp_path: Path) -> None:
    """Its records' ids are paths; nothing outside the run is taken for a drawing."""
    Image.new("RGB", (40, 40)).save(tmp_path / "photo.png")
    records = [
        {**found("gone.png", [[1, 1, 9, 9]], [0], 0.9), "drawn": "drawn/gone.png"},
        {**found(str(tmp_path / "photo.png"), [[1, 1, 9, 9]], [0], 0.8), "drawn": "../x.png"},
        found("nowhere.png", [], [], 0.9),
    ]
    run = write_detections(tmp_path / "run", records)
    (run / "drawn").mkdir()
    Image.new("RGB", (60, 30), "red").save(run / "drawn" / "gone.png")
    Image.new("RGB", (60, 30), "red").save(tmp_path / "x.png")
    page, _ = page_of(run)
    assert len(page.all("img")) == 2
    sizes = {(i.attributes["width"], i.attributes["height"]) for i in page.all("img")}
    assert sizes == {("384", "192"), ("384", "384")}
    assert "No picture: nowhere.png" in page.one("main").text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": "gone.json", "images": "x"}, "gone.json"),
        ({"data": "b.json"}, "expected --images"),
    ],
)
def test_refused(tmp_path: Path, options: dict, message: str) -> None:
    run = write_detections(tmp_path / "run", RECORDS)
    with pytest.raises(DataError, match=message):
        write_report(run, tmp_path / "page.html", **options)


def test_nothing_found_by_the_page(tmp_path: Path) -> None:
    run = write_detections(tmp_path / "run", RECORDS, data={"source": "boxes.json", "count": 3})
    page, problems = page_of(run)
    assert len(problems) == 2 and "does not say where" in problems[0]
    assert not page.all("img") and "No picture" not in page.one("main").text


def test_both_kinds(tmp_path: Path) -> None:
    runs = write_run(tmp_path / "answers"), write_detections(tmp_path / "boxes", RECORDS)
    page, _ = page_of(*runs)
    assert numbers(page)["Run"] == "boxes toy, guided"
    assert cells(table_of(page, "The runs side by side"))[1][0] == "answers toy, auto"
    ids = [e.attributes["id"] for e in page.all() if "id" in e.attributes]
    assert len(set(ids)) == len(ids)
    assert table_of(page, "answers: one image") and table_of(page, "boxes: one image")


def test_spread() -> None:
    records = {str(i): {"confidences": [1, i / 10]} for i in range(9)} | {"x": {"error": ""}}
    records["none"] = {"confidences": []}
    assert spread(records, 3) == ["0", "4", "none"]
    assert spread(records, 1) == ["0"] and spread(records, 0) == []
    assert spread(records, 50) == [*map(str, range(9)), "none"]
