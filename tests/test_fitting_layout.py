"""Beta of a detector, from annotated images."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from command import assert_refused, call
from PIL import Image
from tiny_prior import make_prior_against_objects
from toy_layout import PictureModel

from dive_fast import LayoutDetector
from dive_fast.data.coco import CocoDataset, CocoImage, read_coco, write_coco
from dive_fast.errors import DataError, DiveFastError, ModelError
from dive_fast.strategies.layout import Box, Item

SCENES = (
    (Item(0, Box(0, 1, 2, 4)),),
    (Item(1, Box(1, 0, 3, 2)), Item(2, Box(3, 3, 6, 6))),
    (Item(2, Box(0, 0, 2, 2)), Item(0, Box(3, 1, 5, 3)), Item(1, Box(1, 4, 4, 6))),
)
SEARCH: dict = {}
NAMES = tuple(f"class {c}" for c in range(3))


@pytest.fixture
def detector() -> LayoutDetector:
    return LayoutDetector(PictureModel())


@pytest.fixture
def data(detector, tmp_path: Path) -> CocoDataset:
    """What the model sees exactly, as images of 6 x 6 pixels."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    images = []
    pairs = zip(SCENES, detector.model.draw(*SCENES), strict=True)
    for i, (items, image) in enumerate(pairs):
        path = folder / f"{i}.png"
        image.save(path)
        boxes = torch.tensor([item.box for item in items]).float()
        ids = torch.tensor([item.class_id for item in items])
        images.append(CocoImage(i, path, (6, 6), boxes, ids, torch.zeros(len(items)).bool()))
    data = CocoDataset(NAMES, (1, 2, 3), tuple(images), "boxes.json")
    write_coco(tmp_path / "boxes.json", data, folder)
    return read_coco(tmp_path / "boxes.json", folder)


def renamed(data: CocoDataset) -> CocoDataset:
    """Every class is called by the next one's name."""
    return CocoDataset((*NAMES[1:], NAMES[0]), data.category_ids, data.images, data.source)


def test_objects_that_are_right_are_sure(detector, data) -> None:
    detector.model.inverse_temperature = 1e-3
    record = detector.calibrate(data, **SEARCH)
    assert (record.n, record.counted) == (6, "objects")
    assert "objects                              6" in str(record)
    assert (
        record.beta_before == 1e-3 and detector.model.inverse_temperature == record.beta_after > 1
    )
    assert record.nll_after < record.nll_before
    (found,) = detector(data.images[0].path, **SEARCH)
    assert found.confidence.item() > 0.7


def test_labels_that_losses_do_not_tell_are_refused(detector, data) -> None:
    """Of wrong labels the likelihood is highest at beta = 0: that would be no detector."""
    detector.model.inverse_temperature = 7.0
    with pytest.raises(DiveFastError, match="got 6 labels that chance explains as well"):
        detector.calibrate(renamed(data), **SEARCH)
    assert detector.model.inverse_temperature == 7.0


def test_the_prior_is_left_out(detector, data) -> None:
    """One that would let no object be found."""
    expected = detector.calibrate(data, **SEARCH)
    model = PictureModel()
    prior = make_prior_against_objects(model)
    with_prior = LayoutDetector(model, prior, prior_weight=1e4)
    assert not any(map(len, with_prior([image.path for image in data.images], **SEARCH)))
    found = with_prior.calibrate(data, **SEARCH)
    assert found.n == 6 and model.inverse_temperature == found.beta_after == expected.beta_after


def test_what_finds_nothing_is_labelled_absent(detector, data) -> None:
    """Without the annotation of an object, finding it was wrong."""
    whole = detector.calibrate(data, **SEARCH)
    images = list(data.images)
    last = images[2]
    images[2] = CocoImage(
        last.id, last.path, last.size, last.boxes[:1], last.class_ids[:1], last.crowd[:1]
    )
    less = detector.calibrate(CocoDataset(NAMES, (1, 2, 3), tuple(images), "x"), **SEARCH)
    assert less.n == whole.n == 6
    assert less.beta_after < whole.beta_after


def test_crowds_and_unknown_classes_take_no_part(detector, data) -> None:
    images = list(data.images)
    first = images[0]
    images[0] = CocoImage(
        first.id, first.path, first.size, first.boxes, first.class_ids, torch.tensor([True])
    )
    names = ("class 0", "cat", "class 2")
    record = detector.calibrate(CocoDataset(names, (1, 2, 3), tuple(images), "x"), **SEARCH)
    assert record.n == 3


def test_an_image_that_cannot_be_read(detector, data, caplog) -> None:
    data.images[0].path.write_bytes(b"no image")
    assert detector.calibrate(data, **SEARCH).n == 5
    assert len(caplog.messages) == 1


def test_refused(detector, data, tmp_path: Path) -> None:
    other = CocoDataset(("cat", "dog", "cow"), (1, 2, 3), data.images, "x")
    with pytest.raises(DataError, match="expected classes that the model knows"):
        detector.calibrate(other)
    for image in data.images:
        Image.new("RGB", (6, 6)).save(image.path)
    said = r"got none in boxes.*: in image \d+, which was nearest to one, the best of \d+ places"
    with pytest.raises(DiveFastError, match=said):
        detector.calibrate(data, **SEARCH)
    with pytest.raises(ModelError, match="no model directory of yours"):
        detector.save_fitted()


FAST = (
    "--set",
    "rough_probes=2",
    "--set",
    "step_probes=2",
    "--set",
    "final_probes=2",
    "--probes",
    "4",
)
# Objects stay even where they explain nothing, so that there is something to fit.
KEEP = ("--strategy", "invert", "--set", "starts=1", "--set", "steps=2", "--set", "settled=False")


class TestCommand:
    def test_scenes(self, scenes_model: Path, tmp_path: Path, capsys) -> None:
        out = tmp_path / "fitted"
        arguments = ("--data", "scenes", "--limit", 2, "--model", scenes_model)
        said = call(capsys, "fit", *arguments, "--out", out, *KEEP, "--probes", 4)
        assert said.code == 0, said.err
        assert "objects" in said.out and f"written to {out / 'dive_fast.json'}" in said.out
        beta = json.loads((out / "dive_fast.json").read_text())["beta"]
        assert math.isfinite(beta)
        detector = LayoutDetector.from_pretrained(scenes_model)
        assert detector.model.inverse_temperature != beta
        detector.load_fitted(out)
        assert detector.model.inverse_temperature == detector.identity()["beta"] == beta
        run = tmp_path / "run"
        said = call(
            capsys, "evaluate", *arguments, "--limit", 1, "--out", run, "--fitted", out, *FAST
        )
        assert said.code == 0, said.err
        assert json.loads((run / "run.json").read_text())["config"]["beta"] == beta

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            (("--what", "timesteps"), "of a detector beta can be fitted, got timesteps"),
            (("--generate", "3"), "--generate is for classifiers"),
            (("--strategy", "race"), "strategy for layouts of guided, invert, got 'race'"),
            (("--model", "digits"), "expected a layout-to-image model, got digits"),
        ],
    )
    def test_refused(self, scenes_model: Path, tmp_path: Path, capsys, options, said: str) -> None:
        out = tmp_path / "fitted"
        given = ("--data", "scenes", "--model", scenes_model, "--out", out, *options)
        assert_refused(call(capsys, "fit", *given), said)
        assert not out.exists()

    def test_a_prior_is_no_option(self, capsys) -> None:
        assert call(capsys, "fit", "--data", "scenes", "--prior", "none").code == 2
