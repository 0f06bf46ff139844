"""What a diagnosis says of the analytic model, whose losses are known without the product."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from command import assert_refused, call
from tiny_prior import make_prior_against_objects
from toy_layout import PictureModel

from dive_fast import LayoutDetector
from dive_fast.data.coco import CocoDataset, CocoImage
from dive_fast.errors import DataError, DiveFastError
from dive_fast.predict.diagnosing import _over_probes, moved
from dive_fast.predict.diagnosis import Diagnosis, Measured
from dive_fast.predict.matching import intersection_over_union
from dive_fast.strategies.layout import Board, Box, Guided, Item, LayoutAnswer
from dive_fast.strategies.layout.board import LayoutProbes, Steps, measure

NAMES = tuple(f"class {c}" for c in range(3))
SCENES = (
    (Item(0, Box(0, 1, 2, 4)),),
    (Item(1, Box(1, 0, 3, 2)), Item(2, Box(3, 3, 6, 6))),
)
CELLS = 3 * 6 * 6  # values of x0
PROBES = 12


@dataclass(frozen=True)
class Blind(LayoutProbes):
    """A search that answers without looking."""

    name: ClassVar[str] = "blind"
    loss: str = "l2"
    rounds: int = 2

    def search(self, board: Board) -> Steps:
        (loss,) = yield from measure(board, [()], torch.arange(1))
        return LayoutAnswer((), torch.empty(0, 4).double(), float(loss))


@pytest.fixture
def detector() -> LayoutDetector:
    return LayoutDetector(PictureModel())


@pytest.fixture
def data(detector, tmp_path: Path) -> CocoDataset:
    images = []
    for i, (items, picture) in enumerate(zip(SCENES, detector.model.draw(*SCENES), strict=True)):
        path = tmp_path / f"{i}.png"
        picture.save(path)
        boxes = torch.tensor([item.box for item in items]).float()
        ids = torch.tensor([item.class_id for item in items])
        images.append(CocoImage(i, path, (6, 6), boxes, ids, torch.zeros(len(items)).bool()))
    return CocoDataset(NAMES, (1, 2, 3), tuple(images), "boxes.json")


def snr(detector: LayoutDetector) -> torch.Tensor:
    """a^2 / s^2 at the probes of the diagnosis, in order of t."""
    t = detector.probe_list(Guided(), PROBES, 1).timesteps.sort().values
    alpha_bar = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
    return alpha_bar[t] / (1 - alpha_bar[t])


def test_gains_are_those_of_the_equation(detector, data) -> None:
    """Without its object a picture is black there: the error of eps is a / s in each lit value."""
    found = detector.diagnose(data, diagnosis_probes=PROBES)
    lit = torch.tensor([6.0, 4.0, 9.0], dtype=torch.float64)  # values of each object
    expected = snr(detector)[None] * (lit / CELLS)[:, None]
    torch.testing.assert_close(found.gain.mean, expected.mean(dim=1), rtol=1e-3, atol=1e-4)
    steps = expected[:, 1::2] - expected[:, ::2]
    error = steps.square().sum(dim=1).sqrt() / PROBES
    torch.testing.assert_close(found.gain.error, error, rtol=1e-3, atol=1e-4)
    assert found.class_id.tolist() == [0, 1, 2]
    torch.testing.assert_close(found.side, lit.sqrt())
    torch.testing.assert_close(found.share, torch.ones(3, dtype=torch.float64), rtol=1e-4, atol=0)
    # A box of 3 x 3 moved by 1: three values too few, three too many.
    moved_by = snr(detector).mean() * 6 / CELLS
    torch.testing.assert_close(found.place.mean[2], moved_by, rtol=1e-3, atol=1e-4)
    # The mean of three classes lacks two thirds of one channel and has a third of two others.
    wrong = (2 / 3) ** 2 + 2 * (1 / 3) ** 2
    of_any = snr(detector).mean() * wrong * lit / CELLS
    torch.testing.assert_close(found.label.mean, of_any, rtol=1e-3, atol=1e-4)


def test_what_is_found_is_right(detector, data) -> None:
    found = detector.diagnose(data, diagnosis_probes=PROBES)
    assert found.found.all() and found.found_named.all()
    assert found.counts.tolist() == [[1, 1], [2, 2]]
    assert not found.differs.any() and (found.search_gap, found.model_gap) == (0, 0)
    rows = found.by_class()
    assert [(row.name, row.n, row.found_named) for row in rows] == [(n, 1, 1.0) for n in NAMES]
    assert found.price is None and found.margin == 0.05
    assert detector.last_run.evaluations > 0 and found.evaluations > PROBES * (3 + 2 + 6)


def test_a_search_that_finds_nothing_is_the_gap(detector, data) -> None:
    found = detector.diagnose(data, diagnosis_probes=PROBES, rounds=0, strategy=Blind())
    assert found.counts[:, 1].tolist() == [0, 0] and not found.found.any()
    assert found.search_gap == 1 and "the search is a gap" in " ".join(found.advice())
    assert "and the annotated layout explains the image better: 100%" in str(found)


def test_a_prior_that_asks_for_more_than_objects_explain(data) -> None:
    model = PictureModel()
    detector = LayoutDetector(model, make_prior_against_objects(model))
    model.inverse_temperature = 1e-3
    found = detector.diagnose(data, diagnosis_probes=PROBES)
    assert found.found.all()  # the search goes without it
    assert (found.price > found.gain.mean).all()
    assert "The prior takes more for 100%" in " ".join(found.advice())


def made(
    gain, error, *, side=12.0, share=0.2, gap=(0.0,), margin=0.05, price=None, differs=True
) -> Diagnosis:
    """A diagnosis of such figures, all objects of one class."""
    n = len(gain)
    measured = Measured(torch.tensor(gain).double(), torch.tensor(error).double())
    return Diagnosis(
        names=("cell",), n_probes=48, evaluations=1,
        gap=Measured(torch.tensor(gap).double(), torch.full((len(gap),), 0.1).double()),
        differs=torch.full((len(gap),), differs),
        counts=torch.ones(len(gap), 2).long(),
        class_id=torch.zeros(n).long(),
        side=torch.full((n,), side).double(),
        gain=measured, share=torch.full((n,), share).double(), place=measured, label=measured,
        price=price, found=torch.zeros(n).bool(), found_named=torch.zeros(n).bool(), margin=margin,
    )  # fmt: skip


def test_the_error_is_that_of_noise_and_not_of_timesteps() -> None:
    """Noise of 0.1 on what rises with t: 0.1 / sqrt(K), whatever the slope, K odd or even."""
    for k in (400, 401):
        noise = 0.1 * torch.randn(50, k, dtype=torch.float64)
        found = _over_probes(torch.linspace(0, 3, k)[None] + noise)
        assert found.error.mean().item() == pytest.approx(0.1 / math.sqrt(k), rel=0.05)
        torch.testing.assert_close(found.mean, 1.5 + noise.mean(dim=1))


def test_how_many_probes_make_an_object_certain() -> None:
    """n = K (3 se / gain)^2."""
    (row,) = made([0.02, 0.02, 0.02], [0.01, 0.02, 0.03]).by_class()
    assert row.probes == pytest.approx(48 * 9)
    assert row.certain == 0
    (row,) = made([0.04, -0.01, 0.0], [0.01, 0.02, 0.03]).by_class()
    assert row.probes == math.inf and row.certain == pytest.approx(1 / 3)
    assert made([0.04, -0.01, 0.0], [0.01] * 3).to_dict()["by_class"][0]["probes"] is None


def test_advice_follows_the_figures() -> None:
    clear = ([0.1] * 5, [0.001] * 5)
    (only,) = made(*clear).advice()
    assert only.startswith("Nothing stands out")
    weak = ([0.01] * 5, [0.01] * 5)
    (small,) = made(*weak, side=5.0).advice()
    assert "use more pixels" in small and "432 probes" in small
    (large,) = made(*weak, side=20.0).advice()
    assert "train longer" in large
    (low,) = made(*clear, share=0.01).advice()
    assert "100% of the objects" in low and "margin=0.01" in low
    assert not any("margin" in x for x in made(*clear, share=0.01, margin=None).advice())
    (model,) = made(*clear, gap=(-1.0, 0.0)).advice()
    assert model.startswith("In 50% of the images the model prefers")
    (search,) = made(*clear, gap=(1.0, 0.0)).advice()
    assert search.startswith("In 50% of the images the annotated layout")
    # Boxes that fit a little better are no other layout.
    (same,) = made(*clear, gap=(-1.0, 0.0), differs=False).advice()
    assert same.startswith("Nothing stands out")


def test_sizes_are_in_pixels_of_the_model() -> None:
    assert [row.name for row in made([1.0], [0.1], side=3.9).by_size()] == ["0 to 4 px"]
    assert [row.name for row in made([1.0], [0.1], side=16.0).by_size()] == ["from 16 px"]


@pytest.mark.parametrize(
    "box", [Box(0, 0, 3, 3), Box(3, 3, 6, 6), Box(0, 2, 6, 5), Box(1, 0, 2, 6), Box(0, 0, 6, 6)]
)
def test_boxes_move_by_a_third_and_stay_inside(box) -> None:
    other = moved(box, 7)
    assert 0 <= other.left < other.right <= 6 and 0 <= other.top < other.bottom <= 6
    sizes = [(b.right - b.left, b.bottom - b.top) for b in (box, other)]
    assert sizes[0] == sizes[1]
    if box != Box(0, 0, 6, 6) and box != Box(0, 2, 6, 5) and box != Box(1, 0, 2, 6):
        pair = torch.tensor([box]).double(), torch.tensor([other]).double()
        assert intersection_over_union(*pair).item() == pytest.approx(0.5)


def test_bad_input(detector, data, tmp_path) -> None:
    with pytest.raises(DiveFastError, match="expected a CocoDataset to diagnose on, got 3"):
        detector.diagnose(3)
    with pytest.raises(DiveFastError, match="diagnosis_probes"):
        detector.diagnose(data, diagnosis_probes=1)
    with pytest.raises(DiveFastError, match="unknown setting 'depth'"):
        detector.diagnose(data, depth=3)
    for image in data.images:
        image.path.unlink()
    with pytest.raises(DataError, match="expected images of their annotated sizes, got none of 2"):
        detector.diagnose(data, diagnosis_probes=2)


def test_command(capsys, scenes_model) -> None:
    asked = ("diagnose", "--data", "scenes", "--model", scenes_model, "--limit", 1)
    settings = ("rounds=0", "rough_probes=1", "step_probes=1", "final_probes=1")
    few = ("--diagnosis-probes", 2, *(x for setting in settings for x in ("--set", setting)))
    said = call(capsys, *asked, *few)
    assert said.code == 0 and "explains" in said.out and "px" in said.out
    content = json.loads(call(capsys, *asked, *few, "--json").out)
    assert content["images"] == 1 and content["objects"] >= 1


def test_command_refuses(capsys) -> None:
    said = call(capsys, "diagnose", "--data", "digits")
    assert_refused(said, "a diagnosis is of a detector")
