"""The crops that classifiers of photographs are measured on, and the CNN beside them."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_classes import NAMES, train, write_colours

from bench.photo_classes import (
    GROUPS,
    SmallNetwork,
    cut_out,
    measured,
    score_model,
    write_crops,
)
from dive_fast import DiffusionClassifier


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ([10, 20, 40, 20], (8, 8, 52, 52)),  # a square of 44 about (30, 30)
        ([0, 0, 10, 10], (0, 0, 11, 11)),  # moved inwards
        ([60, 50, 40, 30], (56, 36, 100, 80)),
        ([0, 0, 100, 80], (10, 0, 90, 80)),  # as large as the photograph allows
    ],
)
def test_a_crop_is_a_square_within_the_photograph(box: list, expected: tuple) -> None:
    x, y = np.meshgrid(np.arange(100), np.arange(80))
    photograph = Image.fromarray(np.stack([x, y, x * 0], axis=2).astype(np.uint8))
    found = np.asarray(cut_out(photograph, box))
    assert (*found[0, 0, :2], *(found[-1, -1, :2] + 1)) == expected


def test_no_photograph_is_in_both_parts(tmp_path: Path) -> None:
    """Small objects, crowds and other categories are left out; five of a photograph at most."""
    names = ["dog", "cup", "kite"]
    images = [{"id": i, "file_name": f"{i}.png"} for i in range(10)]
    boxes = [(i, 1, [2 * k, 2, 24, 30], 0) for i in range(10) for k in range(7)]
    boxes += [(i, 2, [0, 0, 30, 15], 0) for i in range(10)]  # too flat
    boxes += [(i, 2, [0, 0, 30, 30], 1) for i in range(10)]
    boxes += [(i, 3, [0, 0, 30, 30], 0) for i in range(10)]
    coco = {
        "images": images,
        "annotations": [
            {"image_id": i, "category_id": c, "bbox": box, "iscrowd": crowd}
            for i, c, box, crowd in boxes
        ],
        "categories": [{"id": i + 1, "name": name} for i, name in enumerate(names)],
    }
    buffer = io.BytesIO()
    Image.new("RGB", (60, 40)).save(buffer, format="PNG")
    with zipfile.ZipFile(tmp_path / "coco.zip", "w") as file:
        file.writestr("instances_train.json", json.dumps(coco))
        file.writestr("instances_test.json", json.dumps({**coco, "annotations": []}))
        for image in images:
            file.writestr(f"images/{image['file_name']}", buffer.getvalue())
    count = write_crops(str(tmp_path / "coco.zip"), tmp_path / "crops")
    assert dict(count) == {("test", "animal"): 15, ("train", "animal"): 35}
    parts = {
        part: {path.stem.split("-")[0] for path in (tmp_path / "crops" / part).rglob("*.png")}
        for part in ("train", "test")
    }
    assert len(parts["train"]) == 7 and len(parts["test"]) == 3
    assert not parts["train"] & parts["test"]


def test_the_yardstick_has_a_logit_a_class() -> None:
    network = SmallNetwork(len(GROUPS), width=8).eval()
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert sum(p.numel() for p in SmallNetwork(10).parameters()) == pytest.approx(7e5, rel=0.3)


def test_the_standard_error() -> None:
    assert measured(30, 40) == {
        "accuracy": 0.75,
        "standard_error": pytest.approx((0.75 * 0.25 / 40) ** 0.5),
        "n": 40,
    }


def test_a_model_and_its_features_are_scored_on_the_test_crops(tmp_path: Path) -> None:
    """As one finds by asking the classifier crop by crop."""
    for part in ("train", "test"):
        (tmp_path / part).mkdir()
        write_colours(tmp_path / part)
    trained = train(tmp_path / "train", tmp_path / "model")
    row = score_model(str(tmp_path / "model"), tmp_path, probe=True)
    assert row["losses"] == trained.losses and row["config"]["self_condition"] is False
    classifier = DiffusionClassifier.from_pretrained(tmp_path / "model")
    files = [tmp_path / "test" / name / f"{i}.png" for name in NAMES for i in range(8)]
    right = sum(classifier(file)[0].label == file.parent.name for file in files)
    assert (row["n"], row["accuracy"]) == (24, right / 24)
    probe = row["probe"]
    assert probe["layer"] in classifier.layers and probe["n"] == 24
    # Three colours are told apart by what any features hold.
    assert probe["accuracy"] > 0.9
    assert "probe" not in score_model(str(tmp_path / "model"), tmp_path, probe=False)
