"""GLIGEN and GeoDiffusion by the command line, from pictures to scores and a diagnosis."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command import assert_refused, call
from pictures import noise_picture
from tiny_geodiffusion import write_geodiffusion
from tiny_gligen import write_gligen

FAST = (
    "--probes", "2", "--set", "rough_probes=2", "--set", "step_probes=2",
    "--set", "final_probes=2", "--set", "rounds=1", "--set", "max_objects=2",
)  # fmt: skip


@pytest.fixture(scope="module", params=[write_gligen, write_geodiffusion])
def directory(request, tmp_path_factory) -> Path:
    return request.param(tmp_path_factory.mktemp("open") / "model")


@pytest.fixture
def photos(tmp_path) -> Path:
    """Pictures wider than high and higher than wide, with ``boxes.json`` beside them."""
    folder = tmp_path / "photos"
    folder.mkdir()
    sizes = {1: (40, 20), 2: (17, 33)}
    for i, size in sizes.items():
        noise_picture(size, i).save(folder / f"{i}.png")
    content = {
        "images": [
            {"id": i, "file_name": f"{i}.png", "width": w, "height": h}
            for i, (w, h) in sizes.items()
        ],
        "annotations": [
            {"id": i, "image_id": i, "category_id": 2 + i, "bbox": [2, 3, 12, 14]} for i in sizes
        ],
        "categories": [{"id": 3, "name": "cat"}, {"id": 4, "name": "fox"}],
    }
    (folder / "boxes.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("classes", ["cat", "cat,fox,owl"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_detect(directory, photos, tmp_path, capsys, classes: str, dtype: str) -> None:
    said = call(
        capsys, "detect", photos, "--model", directory, "--classes", classes, "--dtype", dtype,
        "--out", tmp_path / "run", "--set", "margin=0", "--json", *FAST,
    )  # fmt: skip
    assert said.code == 0, said.err
    records = json.loads(said.out)
    assert len(records) == 2
    for record, (width, height) in zip(records, ((40, 20), (17, 33)), strict=True):
        assert len(record["labels"]) <= 2 and set(record["labels"]) <= set(classes.split(","))
        assert record["labels"] or record["reason"]
        assert record["evaluations"] > 0
        for left, top, right, bottom in record["boxes"]:
            assert 0 <= left < right <= width and 0 <= top < bottom <= height


def test_evaluate_fit_and_diagnose(directory, photos, tmp_path, capsys) -> None:
    """Classes are the categories of the annotations."""
    pytest.importorskip("pycocotools")
    data = ("--data", photos / "boxes.json", "--images", photos, "--model", directory)
    said = call(capsys, "evaluate", *data, "--out", tmp_path / "run", "--limit", 1, *FAST, "--json")
    assert said.code == 0 and "AP50" in json.loads(said.out)
    # Random weights explain nothing that a layout says: no object, and the reason is told.
    only_beta = ("--out", tmp_path / "fit", "--what", "beta", "--set", "margin=0.9")
    said = call(capsys, "fit", *data, *only_beta, *FAST)
    assert_refused(said, "beta needs objects .* in image [12], .* the margin asks for 90.00%")
    said = call(capsys, "diagnose", *data, "--limit", 1, "--diagnosis-probes", 2, *FAST)
    assert said.code == 0 and "explains" in said.out, said.err
