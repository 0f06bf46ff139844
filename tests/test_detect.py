"""``LayoutDetector`` on the analytic layout model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from toy_layout import SCENE, PictureModel
from toy_model import ToyModel

from dive_fast.core.timesteps import TimestepWeights
from dive_fast.errors import DiveFastError, ImageError, ModelError
from dive_fast.predict.detector import LayoutDetector
from dive_fast.strategies.layout import Guided


@pytest.fixture(scope="module")
def detector() -> LayoutDetector:
    return LayoutDetector(PictureModel())


@pytest.fixture(scope="module")
def picture(detector) -> Image.Image:
    """Six pixels square: one channel a class."""
    return detector.model.draw(SCENE)[0]


def test_boxes_are_in_pixels_of_the_image(detector, picture) -> None:
    wide = picture.resize((60, 30), Image.Resampling.NEAREST)
    small, large = detector([picture, wide])
    expected = {1: [1.0, 0.0, 3.0, 2.0], 2: [3.0, 3.0, 6.0, 6.0]}
    for found, scale in ((small, (1, 1)), (large, (10, 5))):
        assert found.names == ("class 0", "class 1", "class 2")
        assert sorted(found.class_id.tolist()) == [1, 2]
        for c, box in zip(found.class_id.tolist(), found.xyxy.tolist(), strict=True):
            assert box == pytest.approx(
                [x * s for x, s in zip(expected[c], 2 * scale, strict=True)]
            )
        assert (found.confidence > 0.9).all() and (found.confidence <= 1).all()


def test_a_picture_without_objects(detector) -> None:
    (found,) = detector(np.zeros((6, 6, 3), dtype=np.uint8))
    assert len(found) == 0 and found.xyxy.shape == (0, 4)
    assert found.class_probabilities.shape == (0, 3)


@pytest.mark.parametrize("beta", [0.001, 1.0])
def test_the_posterior_of_every_class(picture, beta: float) -> None:
    model = PictureModel()
    model.inverse_temperature = beta
    detector = LayoutDetector(model)
    ((_, found),) = detector.stream([("a", picture)])
    rows = found.class_probabilities
    assert rows.shape == (2, 3) and rows.dtype == torch.float32
    assert torch.equal(found.confidence, rows[range(2), found.class_id])
    assert torch.equal(found.class_id, rows.argmax(dim=1))
    ((finished, _),) = detector._search([("a", picture)])
    losses = finished.answer.losses
    weights = (-beta * (losses - losses.min())).exp()
    torch.testing.assert_close(
        rows.double(), (weights / weights.sum(1, keepdim=True))[:, :3], rtol=1e-5, atol=1e-7
    )


def test_stream_reports_the_cost(detector, picture) -> None:
    ((key, found),) = detector.stream([("a", picture)], strategy=Guided())
    assert key == "a" and len(found) == 2
    assert found.evaluations == detector.last_run.evaluations > 0 and found.seconds > 0


def test_in_inference_mode(detector, picture) -> None:
    with torch.inference_mode():
        (found,) = detector(picture, strategy="invert", steps=3)
    assert found.xyxy.shape[1] == 4


def test_a_surer_model_is_surer_of_its_objects(picture) -> None:
    confidences = []
    for beta in (0.001, 1000.0):
        model = PictureModel()
        model.inverse_temperature = beta
        (found,) = LayoutDetector(model)(picture)
        confidences.append(found.confidence.mean().item())
    assert confidences[0] < confidences[1]


def test_a_model_without_a_layout() -> None:
    with pytest.raises(ModelError, match="expected a layout-to-image model, got toy, which has no"):
        LayoutDetector(ToyModel())


def test_losses_that_are_no_numbers(picture) -> None:
    class Broken(PictureModel):
        def picture(self, condition):
            return super().picture(condition) * torch.nan

    with pytest.raises(ModelError, match="expected finite losses"):
        LayoutDetector(Broken())(picture)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"strategy": "race"}, "expected a strategy for layouts of guided, invert, got 'race'"),
        ({"rough_probes": 0}, "rough_probes must be at least 1"),
        ({"rows": 1}, "unknown setting 'rows'"),
        ({"probes": 0}, "number of probes must be at least 1"),
    ],
)
def test_bad_settings(detector, picture, settings, said: str) -> None:
    with pytest.raises(DiveFastError, match=said):
        detector(picture, **settings)


def test_bad_pictures(detector, picture) -> None:
    with pytest.raises(ImageError, match="image 1: "):
        detector([picture, "nowhere.png"])
    with pytest.raises(ImageError, match="at least one image"):
        detector([])


def test_keys_of_a_stream_tell_pictures_apart(detector, picture) -> None:
    with pytest.raises(DiveFastError, match="expected a key for each image, got 'a' twice"):
        list(detector.stream([("a", picture), ("a", picture)]))


def test_probes_lie_where_the_model_says(picture) -> None:
    model = PictureModel()
    model.timesteps = TimestepWeights(1000, (0.0, 1.0, 0.0, 0.0), (1.0, 2.0, 1.0, 1.0))
    detector = LayoutDetector(model)
    assert detector.identity()["timesteps"] == model.timesteps.to_dict()
    (found,) = detector(picture)
    assert sorted(found.class_id.tolist()) == [1, 2]
    given = Guided().probes(12, 1000, model.latent_shape, 0)
    assert "timesteps" not in detector.identity(probes=given)
    model.timesteps = TimestepWeights(500, (1.0,), (1.0,))
    with pytest.raises(ModelError, match="1000 timesteps, but these were learned for 500"):
        detector(picture)
