"""What follows the training of a layout-to-image model: the fit, and what to expect."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from command import call
from PIL import Image
from toy_layout import PictureModel

from dive_fast import LayoutDetector
from dive_fast.core.detection import DetectionRule
from dive_fast.data.coco import CocoDataset, CocoImage, read_coco, write_coco
from dive_fast.data.scenes import write_scenes
from dive_fast.errors import DataError, DiveFastError
from dive_fast.models import load_model, resolve
from dive_fast.strategies.layout import Box, Item
from dive_fast.training.layout_fitting import (
    EVALUATIONS,
    fit_and_measure,
    fitted_or_told,
    measure,
    shuffled,
)
from dive_fast.training.prior import fit_prior

NAMES = ("class 0", "class 1", "class 2")


@pytest.fixture
def data(tmp_path: Path) -> CocoDataset:
    """Ten pictures of 6 x 6 pixels that the analytic model explains exactly."""
    model, images = PictureModel(), []
    for i in range(10):
        items = (Item(i % 3, Box(0, i % 3, 2, 4)), Item((i + 1) % 3, Box(3, 3, 6, 6)))
        model.draw(items)[0].save(tmp_path / f"{i}.png")
        boxes = torch.tensor([item.box for item in items]).float()
        ids = torch.tensor([item.class_id for item in items])
        images.append(
            CocoImage(i, tmp_path / f"{i}.png", (6, 6), boxes, ids, torch.zeros(2).bool())
        )
    write_coco(tmp_path / "boxes.json", CocoDataset(NAMES, (1, 2, 3), tuple(images), "x"), tmp_path)
    return read_coco(tmp_path / "boxes.json", tmp_path)


def test_one_half_is_fitted_to_and_the_other_measured(data) -> None:
    detector = LayoutDetector(PictureModel())
    found = fit_and_measure(detector, data, 10**6, seed=0, progress=False)
    assert (found.fitted_to, found.n, found.annotated, found.objects) == (5, 5, 2.0, 2.0)
    assert found.AP == pytest.approx(1.0) and found.AP50 == pytest.approx(1.0)
    assert found.margin == detector.model.detection.margin and found.prior_weight is None
    assert found.beta == detector.model.inverse_temperature and found.evaluations > 0
    said = str(found)
    assert "AP 1.000, AP50 1.000, 2.0 boxes an image where 2.0 are annotated" in said
    assert "fitted to 5 images; on 5 others" in said


def test_a_small_budget_takes_fewer_images_but_eight_at_least(data) -> None:
    many = dataclasses.replace(
        data,
        images=tuple(dataclasses.replace(data.images[i % 10], id=i) for i in range(40)),
    )
    found = fit_and_measure(LayoutDetector(PictureModel()), many, 1, seed=0, progress=False)
    assert (found.fitted_to, found.n) == (8, 8)
    found = fit_and_measure(
        LayoutDetector(PictureModel()), many, 2 * 11 * EVALUATIONS, seed=0, progress=False
    )
    assert (found.fitted_to, found.n) == (11, 11)


def test_the_halves_are_random_and_always_the_same(data) -> None:
    ids = [image.id for image in shuffled(data, 0)]
    assert sorted(ids) == list(range(10)) and ids != list(range(10))
    assert [image.id for image in shuffled(data, 0)] == ids


def test_a_model_that_finds_nothing_is_told_and_left_as_it_is(data) -> None:
    for image in data.images:
        Image.new("RGB", (6, 6)).save(image.path)
    detector, told = LayoutDetector(PictureModel()), []
    assert fitted_or_told(detector, data, 10**6, 0, False, told.append) is None
    assert len(told) == 1
    assert told[0].startswith(
        "margin and beta are not fitted (beta needs objects that the detector"
    )
    assert "diagnose" in told[0] and detector.model.inverse_temperature == 100.0
    with pytest.raises(DiveFastError, match="expected two held-out images to fit to, got 1"):
        one = dataclasses.replace(data, images=data.images[:1])
        fit_and_measure(detector, one, 10**6, 0, False)


def test_the_weight_of_a_prior(tmp_path: Path) -> None:
    """The zoo's model and prior of scenes, on two images that it did not learn from."""
    model, scenes = tmp_path / "model", tmp_path / "scenes"
    load_model("scenes").save_pretrained(model)
    facts = {"timesteps": None, "held_out": [1, 2], "mine": 3}
    (model / "dive_fast.json").write_text(json.dumps(facts))
    write_scenes(scenes, n=4)
    told: list[str] = []
    found = fit_prior(
        scenes / "annotations.json",
        scenes / "images",
        model,
        resolve("scenes").prior,
        progress=False,
        tell=told.append,
    )
    assert not told and (found.fitted_to, found.n) == (1, 1)
    content = json.loads((model / "dive_fast.json").read_text())
    assert content["mine"] == 3 and content["held_out"] == [1, 2]
    assert content["detection"] == {
        "margin": found.margin,
        "prior_weight": found.prior_weight,
        "probes": content["detection"]["probes"],
        "sizes": content["detection"]["sizes"],
        "final_margin": content["detection"]["final_margin"],
    }
    assert content["detector"]["n"] == 1 and content["beta"] == found.beta
    loaded = LayoutDetector.from_pretrained(model, resolve("scenes").prior)
    assert loaded.prior_weight == found.prior_weight


def test_wrong_names_are_told(data) -> None:
    """Half of the pictures are called by wrong names: no beta explains that."""
    wrong = dataclasses.replace(
        data,
        images=tuple(
            dataclasses.replace(image, class_ids=(image.class_ids + image.id % 2) % 3)
            for image in data.images
        ),
    )
    detector, told = LayoutDetector(PictureModel()), []
    assert fitted_or_told(detector, wrong, 10**6, 0, False, told.append) is None
    assert told[0].startswith("margin and beta are not fitted (")
    for name in ("detection", "timesteps"):
        assert getattr(detector.model, name, None) is None
    assert detector.model.inverse_temperature == 100.0


def test_images_that_cannot_be_read_are_one_sentence(data) -> None:
    detector = LayoutDetector(PictureModel())
    fit = detector.fit_search(data)
    for image in data.images:
        image.path.write_bytes(b"no picture")
    with pytest.raises(DataError, match="expected held-out images that can be read, got none"):
        measure(detector, data, fit, 0, False)


def test_what_a_fit_needs_is_asked_before_the_training(tmp_path: Path, capsys, data) -> None:
    """A folder without the images, and a model that is not one's own."""
    out = tmp_path / "prior"
    common = ("--annotations", tmp_path / "boxes.json", "--out", out, "--steps", 1)
    (tmp_path / "empty").mkdir()
    load_model("scenes").save_pretrained(tmp_path / "model")
    for images, model, message in (
        (tmp_path / "nowhere", tmp_path / "model", "nowhere"),
        (tmp_path / "empty", tmp_path / "model", "got none of 10"),
        (tmp_path, "scenes", "scenes is no directory of yours"),
    ):
        said = call(capsys, "train-prior", *common, "--images", images, "--model", model)
        assert said.code == 2 and message in said.err and len(said.err.splitlines()) == 1, said
        assert not out.exists()


def test_images_belong_to_annotations(tmp_path: Path, capsys) -> None:
    said = call(
        capsys, "train-prior", "--annotations", "scenes", "--images", tmp_path,
        "--model", "scenes", "--out", tmp_path / "prior",
    )  # fmt: skip
    assert said.code == 2 and "images belong to a COCO annotation file" in said.err


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        (DetectionRule(probes=16), "search for objects: probes 16"),
        (DetectionRule(0.0125, 0.5), "search for objects: margin 1.25%, weight of the prior 0.5"),
        (DetectionRule(sizes=((0.5, 0.25), (1, 1))), "windows of 50% x 25% and 100% x 100%"),
        (DetectionRule(), "search for objects: nothing fitted"),
    ],
)
def test_info_shows_what_was_fitted(tmp_path: Path, capsys, rule: DetectionRule, said) -> None:
    (tmp_path / "dive_fast.json").write_text(json.dumps({"detection": rule.to_dict()}))
    found = call(capsys, "info", "--fitted", tmp_path)
    assert found.code == 0 and said in found.out, found
