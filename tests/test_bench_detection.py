"""The benchmark of detectors: its variants, its figures, and its record."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_layout import make_scenes_model
from tiny_prior import make_prior

from bench import detection
from dive_fast.core.layouts import LayoutFormat
from dive_fast.data.coco import CocoDataset, CocoImage
from dive_fast.strategies.layout import Guided, InvertLayout

FAST = {
    "guided": Guided(step_probes=1, final_probes=1, rough_probes=1),
    "invert": InvertLayout(starts=1, steps=2, step_probes=1, final_probes=1, finalists=1),
}


@pytest.fixture(scope="module")
def scenes_with_prior(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("scenes")
    made = make_scenes_model()
    made.save_pretrained(directory)
    make_prior(made.layout_format, made.vocabulary.table).save_pretrained(directory / "prior")
    return directory


def test_variants() -> None:
    found = detection.variants(
        ["guided", "invert"], ["none", "auto"], ["joint", "independent"], [0.1, 0.2]
    )
    assert [variant.name for variant in found] == [
        f"{search}{prior}"
        for search in ("guided", "invert-joint", "invert-independent")
        for prior in ("", "-prior-0.1", "-prior-0.2")
    ]
    assert [v.strategy.joint_boxes for v in found[3:]] == [True] * 3 + [False] * 3


def test_records(scenes_with_prior: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    pytest.importorskip("pycocotools", reason="the COCO numbers come with the extra detect")
    monkeypatch.setattr(detection, "resolve_layout_strategy", lambda name, _: replace(FAST[name]))
    arguments = ["--model", str(scenes_with_prior), "--limit", "2", "--probes", "2"]
    arguments += ["--strategies", "guided,invert", "--projection", "independent"]
    arguments += ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out.jsonl")]
    detection.main(arguments)
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    names = ["guided", "guided-prior-0.5", "invert-independent", "invert-independent-prior-0.5"]
    assert [row["variant"] for row in rows] == names
    assert [row["prior"] is None for row in rows] == [True, False, True, False]
    for row in rows:
        assert row["n"] == 2 and row["evaluations_per_image"] > 0 and "AP50" in row
        assert row["command"] == " ".join(["python -m bench.detection", *arguments])
        assert {"commit", "torch"} <= set(row["environment"])
        assert 0 <= row["found"]["objects"] <= row["found"]["places"] <= 1
    # Done already: the same figures, and no search.
    before = (tmp_path / "runs" / "guided" / "results.jsonl").read_bytes()
    detection.main(arguments)
    again = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()][4:]
    assert [row["AP"] for row in again] == [row["AP"] for row in rows]
    assert (tmp_path / "runs" / "guided" / "results.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "nowhere"], "unknown model 'nowhere'"),
        (["--strategies", "race"], "expected a strategy for layouts of guided, invert"),
        (["--projection", "none"], "expected projections of joint, independent, got 'none'"),
    ],
)
def test_refuses(arguments: list[str], said: str, tmp_path: Path, capsys) -> None:
    common = ["--limit", "1", "--runs", str(tmp_path), "--out", str(tmp_path / "out.jsonl")]
    with pytest.raises(SystemExit):
        detection.main([*common, *arguments])
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


def test_found_objects() -> None:
    """Three objects: two found with confidence, one without; beside them one that is not there."""
    boxes = torch.tensor([[0.0, 0, 10, 10], [20, 0, 30, 10], [0, 20, 10, 30], [40, 40, 50, 50]])
    crowd = torch.tensor([False, False, False, True])
    image = CocoImage(3, None, (50, 50), boxes, torch.tensor([0, 1, 1, 0]), crowd)
    data = CocoDataset(("a", "b"), (7, 9), (image, replace(image, id=4)), "x")
    record = {
        "boxes": [*boxes[:3].tolist(), [40, 0, 50, 10]],
        "indices": [1, 1, 0, 0],  # of the detector, whose order is another: the second is wrong
        "confidences": [0.9, 0.8, 0.3, 0.6],
    }
    records = {"3": record, "4": {"error": "unreadable"}}
    found = detection.found_objects(records, data, ["B", "a"])
    assert found == {
        "places": 1,
        "objects": pytest.approx(2 / 3),
        "place_precision": pytest.approx(2 / 3),
        "place_recall": pytest.approx(2 / 3),
        "precision": pytest.approx(1 / 3),
        "recall": pytest.approx(1 / 3),
    }
    record["indices"] = [1, 0, 0, 0]
    found = detection.found_objects(records, data, ["B", "a"])
    assert found["objects"] == 1 and found["precision"] == found["recall"] == pytest.approx(2 / 3)
    nothing = detection.found_objects({}, data, ["a"])
    assert set(nothing.values()) == {None}


def test_brute_force_by_counting() -> None:
    form = LayoutFormat.compact(("a", "b"), max_objects=2, grid=3)
    boxes = [
        box for box in itertools.product(range(3), repeat=4) if box[0] < box[2] and box[1] < box[3]
    ]
    found = detection.brute_force(form, 10, objects=1.5)
    assert found["boxes"] == len(boxes)
    assert found["one_after_the_other"] == 2.5 * 2 * len(boxes) * 10
    one = 2 * len(boxes)
    expected = math.log10(10 * (1 + one + one**2 / 2))
    assert found["all_layouts_log10"] == pytest.approx(expected)
