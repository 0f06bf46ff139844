"""Texts that explain images: against losses that the network gives without the product."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from direct_scores import Direct, colour_picture
from PIL import Image

from dive_fast import DiffusionClassifier, ImageTextScorer
from dive_fast.core.probes import low_discrepancy_probes
from dive_fast.errors import DiveFastError, ImageError, ModelError

TEXTS = ("a cat", "two dogs", "a dog eats a cat", "of")
K = 12
PICTURES = [colour_picture((16, 16), seed) for seed in range(3)]


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def directory(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def scorer(directory: Path) -> ImageTextScorer:
    return ImageTextScorer.from_pretrained(directory, device="cpu", batch_size=37)


@pytest.fixture(scope="module")
def direct(directory: Path) -> Direct:
    return Direct(directory)


@pytest.fixture(scope="module")
def probes():
    return low_discrepancy_probes(K, 1000, (4, 8, 8), seed=0)


@pytest.fixture(scope="module")
def maps(direct: Direct, probes) -> torch.Tensor:
    """[B, T, K, 8, 8]"""
    return torch.stack(
        [torch.stack([direct.maps(p, text, probes) for text in TEXTS]) for p in PICTURES]
    )


def close(found: torch.Tensor, expected: torch.Tensor, atol: float = 1e-4) -> None:
    torch.testing.assert_close(found, expected.to(found.dtype), rtol=2e-4, atol=atol)


def test_the_matrix(scorer, maps):
    found = scorer.score(PICTURES, TEXTS, probes=K)
    losses = maps.mean(dim=(3, 4))
    close(found.losses, losses.mean(dim=2))
    assert found.texts == TEXTS and found.n_probes == K and found.evaluations == 3 * 4 * K
    assert found.beta == scorer.model.inverse_temperature == 128
    close(found.log_posterior, (-128 * losses.mean(dim=2)).log_softmax(dim=1), 5e-3)
    # Antithetic pairs are the independent draws.
    units = losses.unflatten(2, (-1, 2)).mean(dim=3)
    close(found.standard_errors, units.std(dim=2) / math.sqrt(K / 2))
    gaps, errors = found.gaps()
    best = losses.mean(dim=2).argmin(dim=1)
    assert torch.equal(found.best, best)
    differences = units - units[torch.arange(3), best][:, None]
    torch.testing.assert_close(gaps, differences.mean(dim=2), rtol=1e-3, atol=2e-5)
    torch.testing.assert_close(
        errors, differences.std(dim=2) / math.sqrt(K / 2), rtol=1e-2, atol=2e-5
    )
    # The texts must matter for any of this to mean something.
    assert (losses.mean(dim=2).std(dim=1) > 1e-3).all()


def test_equal_texts_have_equal_columns(scorer):
    found = scorer.score(PICTURES[0], ["a cat", "two dogs", "A cat", "a cat"], probes=4).losses[0]
    close(found[[2, 3]], found[[0, 0]])
    assert abs(found[1] - found[0]) > 1e-4


def test_pairs(scorer, maps, direct, probes):
    found = scorer.score_pairs(PICTURES, ["of", "a cat", "of"], probes=K, unconditional=True)
    losses = maps.mean(dim=(2, 3, 4))[[0, 1, 2], [3, 0, 3]]
    close(found.losses, losses)
    assert found.evaluations == 2 * 3 * K
    close(found.lift(), found.beta * (found.unconditional - losses), 5e-3)


def test_no_condition(scorer, direct, probes):
    with torch.no_grad():
        states, added = direct.condition("")
        if direct.xl:  # what its pipeline puts in the place of "no text"
            states = torch.zeros_like(states)
            added["added_cond_kwargs"]["text_embeds"].zero_()
        expected = direct.maps_of(direct.x0(PICTURES[1]), states, added, probes).mean()
    found = scorer.score(PICTURES[1], TEXTS, probes=K, unconditional=True)
    close(found.unconditional, expected[None])
    close(found.lift()[0], found.beta * (expected - found.losses[0]), 5e-3)


def test_retrieval_both_ways(scorer, maps):
    losses = maps.mean(dim=(2, 3, 4))
    plain = scorer.score(PICTURES, TEXTS, probes=K, unconditional=True)
    found = scorer.retrieve(PICTURES, TEXTS, probes=K)
    close(found.relevance, plain.lift())
    assert torch.equal(found.text_of_image, losses.argmin(dim=1))
    assert torch.equal(found.image_of_text, found.relevance.argmax(dim=0))
    assert torch.equal(found.texts()[:, 0], found.text_of_image)
    assert found.images().shape == (4, 3)
    assert torch.equal(found.images()[:, 0], found.image_of_text)
    mean = scorer.retrieve(PICTURES, TEXTS, probes=K, baseline="mean")
    close(mean.relevance, 128 * (losses.mean(dim=1, keepdim=True) - losses), 5e-3)
    assert mean.scores.unconditional is None and torch.equal(
        mean.text_of_image, found.text_of_image
    )


def test_many_texts_are_measured_in_parts(scorer, maps, monkeypatch):
    monkeypatch.setattr("dive_fast.predict.scoring.texts_at_once", lambda dim: 3)
    found = scorer.score(PICTURES, TEXTS, probes=K, unconditional=True)
    close(found.losses, maps.mean(dim=(2, 3, 4)))
    assert found.evaluations == 3 * 5 * K
    pairs = scorer.score_pairs(PICTURES, ["of", "a cat", "two dogs"], probes=K)
    close(pairs.losses, maps.mean(dim=(2, 3, 4))[[0, 1, 2], [3, 0, 1]])


def test_the_models_own_classes_stay(sd):
    clf = DiffusionClassifier.from_pretrained(sd, classes=["cat", "dog"], device="cpu")
    before = clf.losses(PICTURES, probes=4)
    scorer, names = ImageTextScorer(clf.model), clf.names
    stream = scorer.choose([(i, p, TEXTS) for i, p in enumerate(PICTURES)], probes=4)
    next(stream)
    assert clf.names == names and torch.equal(clf.losses(PICTURES, probes=4), before)
    stream.close()
    scorer.score(PICTURES, TEXTS, probes=4)
    assert clf.names == names and torch.equal(clf.losses(PICTURES, probes=4), before)


def test_a_mask(scorer, maps):
    weights = np.zeros((16, 16))
    weights[:4, 2:] = 1
    weights[9, 9] = 0.5
    grid = torch.from_numpy(weights).unflatten(0, (8, 2)).unflatten(2, (8, 2)).mean(dim=(1, 3))
    found = scorer.score(PICTURES, TEXTS, pixel_weights=weights, probes=K)
    mean = maps.mean(dim=2).double()
    close(found.losses, (mean * grid).sum(dim=(2, 3)) / grid.sum())
    # One for each image, and the others as if no weights were beside them.
    mixed = scorer.score(PICTURES, TEXTS, pixel_weights=[None, weights, None], probes=K)
    plain = scorer.score(PICTURES, TEXTS, probes=K)
    close(mixed.losses[1], found.losses[1])
    close(mixed.losses[[0, 2]], plain.losses[[0, 2]])
    # Weights have no unit.
    scaled = scorer.score(PICTURES, TEXTS, pixel_weights=weights * 1e30, probes=K)
    close(scaled.losses, found.losses)


def test_a_mask_of_ones_changes_nothing(scorer):
    plain = scorer.score(PICTURES, TEXTS, probes=4)
    ones = scorer.score(PICTURES, TEXTS, pixel_weights=np.full((16, 16), 0.3), probes=4)
    assert torch.equal(ones.losses, plain.losses)


BAD = [
    (dict(texts=[]), "at least 1 texts, got 0"),
    (dict(texts=7), "expected texts as a list, got 7"),
    (dict(texts=["a", 3]), "texts that are not empty, got 3"),
    (dict(texts=["a", " "]), "texts that are not empty, got ' '"),
    (dict(texts=["a", "\udc80"]), "texts that are not empty"),
    (dict(probes=0), "at least 1"),
    (dict(seed=-1), "seed must be at least 0"),
    (dict(timesteps="learned"), "no learned timesteps"),
    (dict(images=[]), "at least one image, got none"),
    (dict(images=3), "expected an image as PIL image"),
    (dict(pixel_weights=np.ones((8, 16))), "the picture's own size, 16 x 16, got 16 x 8"),
    (dict(pixel_weights=np.zeros((16, 16))), "one above 0, got zeros only"),
    (dict(pixel_weights=-np.eye(16)), "finite and at least 0, got -1"),
    (dict(pixel_weights=np.full((16, 16), np.nan)), "finite and at least 0, got nan"),
    (dict(pixel_weights="nowhere.png"), "no such file"),
    (dict(pixel_weights={"a": 1}), "pixel weights as numbers"),
    (dict(pixel_weights=[None]), "for each of 3 images, got 1"),
    (dict(pixel_weights=[None, np.ones((3, 3)), None]), "image 1: expected pixel weights"),
]


@pytest.mark.parametrize("changes, message", BAD)
def test_bad_input(scorer, changes, message):
    given = {"images": PICTURES, "texts": TEXTS, **changes}
    with pytest.raises(DiveFastError, match=message) as told:
        scorer.score(given.pop("images"), given.pop("texts"), **given)
    assert "\n" not in str(told.value)


def test_bad_input_of_the_others(scorer):
    with pytest.raises(DiveFastError, match="a text for each of 3 images, got 2"):
        scorer.score_pairs(PICTURES, ["a", "b"], probes=4)
    with pytest.raises(DiveFastError, match="baseline of unconditional, mean, got 'none'"):
        scorer.retrieve(PICTURES, TEXTS, baseline="none")
    with pytest.raises(DiveFastError, match="ask for unconditional=True"):
        scorer.score(PICTURES, TEXTS, probes=2).lift()
    with pytest.raises(ImageError, match="central square"):
        weights = np.zeros((16, 40))
        weights[:, :12] = 1
        scorer.score(colour_picture((40, 16), 0), TEXTS, pixel_weights=weights, probes=2)


def test_models_without_texts_are_refused(dit_dir, layout_dir):
    for name in ("digits", str(dit_dir), str(layout_dir)):
        with pytest.raises(ModelError, match="expected a text-to-image model") as told:
            ImageTextScorer.from_pretrained(name, device="cpu")
        assert name in str(told.value)
    with pytest.raises(ModelError, match="expected a text-to-image model"):
        ImageTextScorer(DiffusionClassifier.from_pretrained("digits", device="cpu").model)


def test_a_mask_as_a_picture(scorer, tmp_path):
    grey = np.zeros((16, 16), dtype=np.uint8)
    grey[3:9, 3:11] = 255
    Image.fromarray(grey).save(tmp_path / "mask.png")
    numbers = scorer.score(PICTURES[0], TEXTS, pixel_weights=grey > 0, probes=4)
    for given in (tmp_path / "mask.png", Image.fromarray(grey), torch.from_numpy(grey)):
        found = scorer.score(PICTURES[0], TEXTS, pixel_weights=given, probes=4)
        close(found.losses, numbers.losses)
