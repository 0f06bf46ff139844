"""Evaluation of detectors: records, scores, resuming, and images that cannot be used."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import read_json

from dive_fast import DataError, Detections, DiveFastError, RunError
from dive_fast.data.coco import CocoDataset, read_coco
from dive_fast.evaluation import evaluate_detections, read_records, summarise_detections
from dive_fast.evaluation.coco_scores import NAMES

pytest.importorskip("pycocotools", reason="the COCO numbers come with the extra detect")

GREYS = {"dark": 80, "light": 160, "white": 240}
CONFIG = {"model": "greys", "seed": 0}


class GreyDetector:
    """Finds the largest box of each grey level; answers two images at a time, last one first.

    Args:
        names: the levels that it looks for.
        stop_after: is interrupted when it has answered so many images.
        unsure: takes each level for the next one, and says that it may be the right one.
    """

    def __init__(
        self, names: Iterable[str] = GREYS, stop_after: int | None = None, unsure: bool = False
    ) -> None:
        self.names = tuple(names)
        self.stop_after = stop_after
        self.unsure = unsure
        self.searched: list[str] = []

    def stream(self, images: Iterable[tuple[str, Image.Image]]) -> Iterator[tuple[str, Detections]]:
        waiting: list[tuple[str, Image.Image]] = []
        for image in images:
            waiting.append(image)
            if len(waiting) == 2:
                yield from self._answer(waiting)
        yield from self._answer(waiting)

    def _answer(self, waiting: list) -> Iterator[tuple[str, Detections]]:
        while waiting:
            if len(self.searched) == self.stop_after:
                raise KeyboardInterrupt
            key, image = waiting.pop()
            self.searched.append(key)
            found = self._detect(np.asarray(image.convert("L")))
            yield key, dataclasses.replace(found, evaluations=100 + int(key), seconds=0.5)

    def _detect(self, pixels: np.ndarray) -> Detections:
        boxes, classes = [], []
        for c, name in enumerate(self.names):
            rows, columns = np.nonzero(pixels == GREYS[name])
            if len(rows):
                boxes.append([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
                classes.append(c)
        xyxy = np.array(boxes).reshape(-1, 4)
        if not self.unsure:
            return Detections(xyxy, classes, [0.9] * len(boxes), self.names)
        wrong = [(c + 1) % len(self.names) for c in classes]
        rows = np.zeros((len(boxes), len(self.names)))
        rows[range(len(boxes)), classes] = 0.3
        rows[range(len(boxes)), wrong] = 0.6
        return Detections(xyxy, wrong, [0.6] * len(boxes), self.names, rows)


@pytest.fixture
def data(tmp_path: Path) -> CocoDataset:
    """Six images; image i has i % 4 rectangles, each of another grey."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    images, annotations = [], []
    rng = np.random.default_rng(0)
    for i in range(6):
        pixels = np.zeros((40, 60), dtype=np.uint8)
        for k, name in enumerate(list(GREYS)[: i % 4]):
            left, top = 20 * k + int(rng.integers(8)), int(rng.integers(20))
            width, height = int(rng.integers(4, 13)), int(rng.integers(4, 20))
            pixels[top : top + height, left : left + width] = GREYS[name]
            annotations.append(
                {
                    "id": len(annotations) + 1, "image_id": 10 + i, "category_id": k + 1,
                    "bbox": [left, top, width, height],
                }
            )  # fmt: skip
        Image.fromarray(pixels).save(folder / f"{i}.png")
        images.append({"id": 10 + i, "width": 60, "height": 40, "file_name": f"{i}.png"})
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": k + 1, "name": name} for k, name in enumerate(GREYS)],
    }
    path = tmp_path / "boxes.json"
    path.write_text(json.dumps(content))
    return read_coco(path, folder)


def test_records_and_summary(data: CocoDataset, tmp_path: Path, capfd) -> None:
    out = tmp_path / "run"
    summary = evaluate_detections(GreyDetector(), data, out, config=CONFIG).to_dict()
    assert capfd.readouterr() == ("", "")
    records = read_records(out)
    assert list(records) == ["11", "10", "13", "12", "15", "14"]  # as they came
    for image in data.images:
        record = records[str(image.id)]
        assert record["boxes"] == image.boxes.tolist()
        assert record["indices"] == image.class_ids.tolist()
        assert record["labels"] == [data.names[c] for c in record["indices"]]
        assert record["confidences"] == pytest.approx([0.9] * len(image.boxes))
        assert (record["evaluations"], record["seconds"]) == (100 + image.id, 0.5)
    assert list(summary)[:14] == [*NAMES, "AP_one_class", "AP_per_class"]
    assert summary["AP_one_class"] == summary["AP"]  # without probabilities
    for name in ("AP", "AP50", "AP75", "AP_small", "AR1", "AR10", "AR100", "AR_small"):
        assert summary[name] == pytest.approx(1)
    for name in ("AP_medium", "AP_large", "AR_medium", "AR_large"):
        assert summary[name] is None
    assert summary["AP_per_class"] == {name: pytest.approx(1) for name in GREYS}
    assert (summary["n"], summary["failed"]) == (6, 0)
    assert summary["objects_per_image"] == pytest.approx(7 / 6)
    assert (summary["evaluations_per_image"], summary["seconds_per_image"]) == (112.5, 0.5)
    json.dumps(summary, allow_nan=False)

    run = read_json(out / "run.json")
    assert run["config"] == {"schema": 1, **CONFIG, "data": data.identity(), "names": list(GREYS)}
    assert {"dive_fast", "commit", "torch", "python"} <= set(run["environment"])
    again = summarise_detections(records, data, tuple(GREYS))
    assert again.to_dict() == summary


def test_files_at_the_end(data: CocoDataset, tmp_path: Path) -> None:
    """Beside the records: the summary, and a table of the images in the data's order."""
    (tmp_path / "pictures" / "2.png").write_bytes(b"")
    out = tmp_path / "run"
    summary = evaluate_detections(GreyDetector(), data, out, config=CONFIG).to_dict()
    written = read_json(out / "summary.json")
    assert summary.items() <= written.items()
    assert (written["task"], written["model"]) == ("detection", "greys")
    assert written["dataset"] == data.identity()["source"]
    assert written["metrics"] == {name: summary[name] for name in NAMES}
    lines = (out / "results.csv").read_text().splitlines()
    assert lines[:2] == ["id,objects,evaluations,seconds,error", "10,0,110,0.5,"]
    assert lines[3].startswith("12,,,,") and "2.png" in lines[3]
    assert lines[4:] == ["13,3,113,0.5,", "14,0,114,0.5,", "15,1,115,0.5,"]


def test_second_guesses_count(data: CocoDataset, tmp_path: Path) -> None:
    """All boxes are right, and all classes but the second."""
    out = tmp_path / "run"
    summary = evaluate_detections(GreyDetector(unsure=True), data, out, config=CONFIG)
    assert summary.ap_one_class == pytest.approx(0)
    assert 0.3 < summary.scores["AP"] < 1
    assert summary.scores["AR100"] == pytest.approx(1)
    assert summary.objects_per_image == pytest.approx(7 / 6)
    records = read_records(out)
    assert records["13"]["indices"] == [1, 2, 0]
    assert records["13"]["class_probabilities"][0] == pytest.approx([0.3, 0.6, 0])
    assert records["10"]["class_probabilities"] == []
    assert summarise_detections(records, data, tuple(GREYS)) == summary


def test_records_without_class_probabilities(data: CocoDataset, tmp_path: Path) -> None:
    """Without them objects count with their class; runs may have both kinds."""
    out = tmp_path / "run"
    new = evaluate_detections(GreyDetector(unsure=True), data, out, config=CONFIG)
    records = read_records(out)

    def summary(older: Iterable[str]):
        found = {
            key: {k: v for k, v in record.items() if key not in older or k != "class_probabilities"}
            for key, record in records.items()
        }
        return summarise_detections(found, data, tuple(GREYS))

    old, mixed = summary(records), summary(["13"])
    assert old.scores["AP"] == old.ap_one_class == mixed.ap_one_class == new.ap_one_class
    assert old.scores["AP"] < mixed.scores["AP"] < new.scores["AP"]


def test_resumed(data: CocoDataset, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    expected = evaluate_detections(GreyDetector(), data, whole, config=CONFIG)
    with pytest.raises(KeyboardInterrupt):
        evaluate_detections(GreyDetector(stop_after=3), data, parts, config=CONFIG)
    before = (parts / "results.jsonl").read_bytes()
    assert list(read_records(parts)) == ["11", "10", "13"]
    with open(parts / "results.jsonl", "ab") as file:
        file.write(b'{"id": "12", "boxes": [[')  # torn by a crash
    detector = GreyDetector()
    summary = evaluate_detections(detector, data, parts, config=CONFIG)
    assert detector.searched == ["14", "12", "15"]
    assert (parts / "results.jsonl").read_bytes().startswith(before)
    assert read_records(parts) == read_records(whole)
    assert summary == expected
    done = GreyDetector()
    assert evaluate_detections(done, data, parts, config=CONFIG) == expected
    assert done.searched == []


def test_another_run_is_not_resumed(data: CocoDataset, tmp_path: Path) -> None:
    out = tmp_path / "run"
    evaluate_detections(GreyDetector(), data.select(2), out, config=CONFIG)
    with pytest.raises(RunError, match="seed is 0 there and 1 here"):
        evaluate_detections(GreyDetector(), data.select(2), out, config={**CONFIG, "seed": 1})
    with pytest.raises(RunError, match=r"data\.count is 2 there and 6 here"):
        evaluate_detections(GreyDetector(), data, out, config=CONFIG)
    with pytest.raises(RunError, match="names is"):
        evaluate_detections(GreyDetector(["dark"]), data.select(2), out, config=CONFIG)


def test_pictures_that_cannot_be_used(data: CocoDataset, tmp_path: Path, caplog) -> None:
    folder = data.images[0].path.parent
    (folder / "1.png").unlink()
    (folder / "2.png").write_bytes(b"no image")
    Image.new("L", (40, 60)).save(folder / "3.png")
    deep = Image.fromarray(np.full((40, 60), -1, dtype=np.int32))
    deep.save(folder / "4.png", format="TIFF")  # a mode that no detector can use
    data = read_coco(tmp_path / "boxes.json", folder)
    assert data.problems == (f"boxes.json: image 11 (1.png): the file is not in {folder}.",)
    out = tmp_path / "run"
    detector = GreyDetector()
    summary = evaluate_detections(detector, data, out, config=CONFIG)
    assert sorted(detector.searched) == ["10", "15"]
    assert (summary.n, summary.failed) == (2, 4)
    assert summary.scores["AP"] == pytest.approx(1)  # of the images that were searched
    records = read_records(out)
    assert records["11"] == {"id": "11", "error": "image 11 has no file."}
    assert records["13"]["error"].endswith("expected 60 x 40 pixels as annotated, got 40 x 60.")
    assert "expected 16-bit values" in records["14"]["error"]
    first, second, third = caplog.messages  # the missing one is known already
    assert first.startswith(str(folder)) and "2.png: expected an image" in first
    assert "3.png: expected 60 x 40 pixels" in second
    assert "4.png: expected 16-bit values" in third


def test_no_picture_can_be_used(data: CocoDataset, tmp_path: Path) -> None:
    data = read_coco(tmp_path / "boxes.json")
    summary = evaluate_detections(GreyDetector(), data, tmp_path / "run", config=CONFIG).to_dict()
    assert (summary.pop("n"), summary.pop("failed")) == (0, 6)
    assert summary.pop("AP_per_class") == dict.fromkeys(GREYS)
    assert set(summary.values()) == {None}


def test_classes_by_name(data: CocoDataset, tmp_path: Path, caplog) -> None:
    """The detector's order is its own; what it does not know is missed."""
    detector = GreyDetector(["white", "dark"])
    summary = evaluate_detections(detector, data, tmp_path / "run", config=CONFIG)
    assert caplog.messages == [
        "boxes.json: the model does not know the classes 'light'; their boxes (2) count as missed."
    ]
    assert summary.ap_per_class == {
        "dark": pytest.approx(1), "light": 0, "white": pytest.approx(1),
    }  # fmt: skip


def test_classes_that_the_data_does_not_have(data: CocoDataset, tmp_path: Path) -> None:
    content = read_json(tmp_path / "boxes.json")
    content["categories"] = content["categories"][:2]
    (tmp_path / "two.json").write_text(json.dumps(content))
    two = read_coco(tmp_path / "two.json", data.images[0].path.parent)
    assert len(two.problems) == 1 and "unknown category 3" in two.problems[0]
    summary = evaluate_detections(GreyDetector(), two, tmp_path / "run", config=CONFIG)
    assert summary.ap_per_class == {"dark": pytest.approx(1), "light": pytest.approx(1)}
    assert summary.objects_per_image == pytest.approx(7 / 6)


def test_refused_before_the_run_is_made(data: CocoDataset, tmp_path: Path, monkeypatch) -> None:
    out = tmp_path / "run"
    with pytest.raises(DataError, match="classes that the model knows, such as 'cat', got 'dark'"):
        evaluate_detections(GreyDetector(["cat"]), data, out, config=CONFIG)
    monkeypatch.setitem(sys.modules, "pycocotools.cocoeval", None)
    with pytest.raises(DiveFastError, match="pycocotools, which is not installed"):
        evaluate_detections(GreyDetector(), data, out, config=CONFIG)
    assert not out.exists()
