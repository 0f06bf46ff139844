"""Why nothing was found: by the analytic model, whose losses are known."""

from __future__ import annotations

import pytest
from command import call
from PIL import Image
from tiny_prior import make_prior_against_objects
from toy_layout import PictureModel

from dive_fast import Detections, LayoutDetector
from dive_fast.strategies.layout import Box, Item
from dive_fast.strategies.layout.nothing import Nothing

SCENE = (Item(1, Box(1, 0, 3, 2)),)


def test_below_the_margin() -> None:
    """An object of the mean of three classes: of 4 lit values it explains 1 - (4/9 + 2/9)."""
    model = PictureModel()
    (picture,) = model.draw(SCENE)
    (found,) = LayoutDetector(model)(picture, margin=0.9999999, trace=True)
    nothing = found.trace["nothing"]
    assert len(found) == 0 and nothing.places == 1 and nothing.margin == 0.9999999
    assert nothing.share == pytest.approx(1 / 3, rel=1e-4) and nothing.with_prior is None
    assert found.reason == (
        "the best of 1 places explains 33.33% of the loss, and the margin asks for 100.00%"
    )


def test_by_the_prior() -> None:
    model = PictureModel()
    detector = LayoutDetector(model, make_prior_against_objects(model), prior_weight=1e4)
    (found,) = detector(model.draw(SCENE)[0], trace=True)
    nothing = found.trace["nothing"]
    assert len(found) == 0 and nothing.share == pytest.approx(1 / 3, rel=1e-4)
    assert nothing.with_prior < 0 and "after what the prior takes" in found.reason


def test_something_has_no_reason() -> None:
    model = PictureModel()
    (found,) = LayoutDetector(model)(model.draw(SCENE)[0])
    assert len(found) == 1 and found.reason is None and "reason" not in found.to_dict()


def test_no_place_stands_out() -> None:
    assert str(Nothing(0, 0.0, None, 0.05)).startswith("no place stands out")


def test_in_the_record_and_on_the_screen(tmp_path, capsys, layout_dir) -> None:
    empty = Detections([], [], [], ("a",), reason="because")
    assert empty.to_dict()["reason"] == "because"
    Image.new("RGB", (8, 8), 90).save(tmp_path / "a.png")
    asked = ("detect", tmp_path / "a.png", "--model", layout_dir, "--out", tmp_path / "run")
    few = ("--set", "margin=0.99", "--set", "rounds=0", "--probes", 4)
    said = call(capsys, *asked, *few)
    assert said.code == 0 and "a.png: nothing found: " in said.out
    assert "nothing was found in 1 of 1 images: dive-fast diagnose says" in said.err
