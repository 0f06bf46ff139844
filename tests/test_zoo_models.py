"""The zoo's larger models on real images, where those are at hand."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest

from dive_fast import DiffusionClassifier, zoo
from dive_fast.data import load_all, open_dataset, select

SOURCES = {
    "mnist": ("cls10_mnist_28px.zip", "mnist_28px.npz"),
    "omniglot": ("cls242_omniglot_small_105px.zip", "omniglot242_32px.npz"),
}


# What enumeration with 250 probes reaches lies well above; see docs/models.md.
@pytest.mark.parametrize(("model", "n", "least"), [("mnist", 60, 0.8), ("omniglot", 30, 0.4)])
def test_auto_on_held_out_images(
    model: str, n: int, least: float, tmp_path: Path, real_data
) -> None:
    archive, member = SOURCES[model]
    with zipfile.ZipFile(real_data(archive)) as file:
        images = file.extract(member, tmp_path)
    classifier = DiffusionClassifier.from_pretrained(model)
    data = select(open_dataset(images, classifier.names), n, seed=1)
    images, labels = load_all(data)
    answers = classifier(images, strategy="auto")
    right = np.mean([a.index == y for a, y in zip(answers, labels, strict=True)])
    assert right >= least
    cost = sum(answer.evaluations for answer in answers) / n
    assert cost < 0.5 * 100 * len(classifier.names)


@pytest.mark.parametrize("model", ["digits", "mnist", "omniglot"])
def test_every_model_says_how_it_was_made(model: str) -> None:
    facts = json.loads((zoo.path(model) / "dive_fast.json").read_text())
    assert facts["command"].startswith(f"dive-fast train {model}")
    assert set(facts["expected"]) == {"strategy", "probes", "accuracy", "n"}
    classifier = DiffusionClassifier.from_pretrained(model)
    assert classifier.model.timesteps is not None
    assert classifier.model.shortlist is not None
    assert classifier.model.inverse_temperature != np.prod(classifier.model.latent_shape) / 2
