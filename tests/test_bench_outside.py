"""Each outside model takes a step on random images, is saved, and answers as a classifier."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import write_json

from bench.outside_models import (
    RECIPES,
    Data,
    check,
    loss_of,
    make_network,
    make_scheduler,
    read_objects,
    save,
    train,
)
from dive_fast import DiffusionClassifier, ProbeList

CLASSES, SIZE = ("cat", "dog", "bird"), 8


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def random_data(channels: int) -> Data:
    x0, y = torch.rand(18, channels, SIZE, SIZE) * 2 - 1, torch.arange(18) % len(CLASSES)
    return Data(x0[:12], y[:12], x0[12:], y[12:], CLASSES)


@pytest.mark.parametrize("name", RECIPES)
def test_one_step(name: str, tmp_path: Path, capsys) -> None:
    recipe = dataclasses.replace(RECIPES[name], size=SIZE)
    if recipe.widths:
        recipe = dataclasses.replace(recipe, widths=(8, 16))
    data = random_data(3 if recipe.data == "coco" else 1)
    network, scheduler = make_network(recipe, data.x_train.shape[1], 3), make_scheduler(recipe)
    before = [weight.clone() for weight in network.parameters()]
    average = train(network, scheduler, recipe, data, minutes=1, max_steps=2)
    after = zip(before, average.parameters(), strict=True)
    assert any(not torch.equal(old, new) for old, new in after)

    save(average, scheduler, data, tmp_path / name, {})
    clf = DiffusionClassifier.from_pretrained(tmp_path / name)
    assert clf.names == CLASSES
    with np.load(tmp_path / name / "data.npz") as arrays:
        assert arrays["x0_test"].shape == data.x_test.shape and arrays["x0_test"].dtype == "float32"
        x0 = torch.from_numpy(arrays["x0_test"])
    unit = 0.5 if recipe.objective == "edm" else 1.0
    torch.testing.assert_close(
        x0.flatten(1).sum(1).sort().values, data.x_test.flatten(1).sum(1).sort().values / unit
    )
    check(tmp_path / name, n=2, probes=2)
    assert f"{name}: 3 classes" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["mnist_ddpm", "mnist_flow", "mnist_edm"])
def test_the_loss_of_the_training_is_the_classifier_s(name: str, tmp_path: Path) -> None:
    """In the mean over many noise levels: both are of the same objective and weights."""
    recipe = dataclasses.replace(RECIPES[name], size=SIZE, widths=(8, 16))
    data, scheduler = random_data(1), make_scheduler(recipe)
    network = make_network(recipe, 1, 3).eval()
    save(network, scheduler, data, tmp_path, {})
    clf = DiffusionClassifier.from_pretrained(tmp_path)
    x0, unit = data.x_test[:1], 0.5 if name == "mnist_edm" else 1.0
    with torch.no_grad():
        many = x0.expand(2000, -1, -1, -1), torch.ones(2000, dtype=torch.int64)
        expected = loss_of(network, scheduler, recipe.objective, *many)
    t = torch.arange(0, 1000, 2)
    probes = ProbeList(t, torch.randn(len(t), 1, SIZE, SIZE), torch.arange(len(t)))
    found = clf.losses(latents=x0 / unit, probes=probes)[0, 1].mean()
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0)


def test_objects_are_cut_out_and_photographs_held_out(tmp_path: Path) -> None:
    """Red squares are of class "red", blue ones too small; no photograph is in both parts."""
    (tmp_path / "images").mkdir()
    images, annotations = [], []
    for i in range(10):
        picture = np.zeros((100, 120, 3), np.uint8)
        picture[20:80, 30:90] = (255, i, 0)
        picture[0:10, 0:10] = (0, 0, 255)
        Image.fromarray(picture).save(tmp_path / "images" / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "width": 120, "height": 100})
        for category, box in ((4, [30, 20, 60, 60]), (7, [0, 0, 10, 10])):
            entry = {"id": len(annotations), "image_id": i, "category_id": category, "bbox": box}
            annotations.append(entry | {"area": box[2] * box[3], "iscrowd": 0})
    names = [{"id": 4, "name": "red"}, {"id": 7, "name": "blue"}]
    content = {"images": images, "annotations": annotations, "categories": names}
    write_json(tmp_path / "instances_train.json", content)

    data = read_objects(tmp_path, 12, 1)
    assert data.names == ("red",) and len(data.x_test) == 2 and len(data.x_train) == 8 * 8
    middle = ((torch.cat([data.x_test, data.x_train])[:, :, 6, 6] + 1) * 127.5).round()
    assert (middle[:, 0] == 255).all() and (middle[:, 2] == 0).all()
    held_out = set(middle[:2, 1].tolist())
    assert len(held_out) == 2 and not held_out & set(middle[2:, 1].tolist())
