"""Windows that are scanned: where they lie, what they find, and how their sizes are fitted."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from layout_searches import SCENES, drive, make_board, run
from toy_layout import PictureModel, ToyLayoutModel

from dive_fast import LayoutDetector
from dive_fast.core.detection import DetectionRule
from dive_fast.data.coco import read_coco
from dive_fast.errors import DiveFastError
from dive_fast.predict.fitting_search import LEAST_MARGIN, SMALL_MARGIN, searches, usual_sizes
from dive_fast.strategies.layout import ANY, Box, Guided, InvertLayout, Item, guided
from dive_fast.strategies.layout.scan import MOST_WINDOWS, promising, scanned, windows
from dive_fast.strategies.layout.settle import settle


class Faint(ToyLayoutModel):
    """The right half has little light."""

    def picture(self, condition: torch.Tensor) -> torch.Tensor:
        return super().picture(condition) * torch.tensor([1.0, 1.0, 1.0, 0.15, 0.15, 0.15])


class TestWindows:
    def test_by_hand(self) -> None:
        """Of 3 x 6 lines on 9 lines: a line apart across, two down, one and two beyond."""
        across = [(0, 2), (0, 3), (1, 4), (2, 5), (3, 6), (4, 7), (5, 8), (6, 8)]
        down = [(0, 4), (0, 6), (2, 8), (4, 8)]
        expected = {Box(a, t, b, d) for a, b in across for t, d in down}
        found = windows([(3 / 8, 6 / 8)], 9)
        assert len(found) == len(set(found)) and set(found) == expected

    @pytest.mark.parametrize("grid", [2, 3, 5, 17, 33])
    @pytest.mark.parametrize("size", [(1.0, 1.0), (0.4, 0.3), (0.2, 1.0), (1.0, 0.15)])
    def test_lie_on_the_grid_and_cover_it(self, grid: int, size: tuple[float, float]) -> None:
        covered = np.zeros((grid - 1, grid - 1), dtype=bool)
        for box in windows([size], grid):
            assert 0 <= box.left < box.right < grid and 0 <= box.top < box.bottom < grid
            covered[box.top : box.bottom, box.left : box.right] = True
        assert covered.all()

    def test_sizes_that_take_too_many_are_left_out(self) -> None:
        usual, small = (0.5, 0.5), (0.05, 0.05)
        assert windows([small], 33) == []
        assert windows([small, usual, small], 33) == windows([usual], 33)
        assert 0 < len(windows([usual, (0.3, 0.6)], 33)) <= MOST_WINDOWS
        assert windows([], 33) == []
        assert scanned([small, usual, small, (0.3, 0.6)], 33) == (usual, (0.3, 0.6))
        assert scanned([usual, usual], 33) == (usual,) and scanned([], 33) == ()


class TestPromising:
    SCENE = (Item(0, Box(0, 0, 2, 2)), Item(2, Box(3, 3, 6, 6)))

    def found(self, begin, most: int = 6, sizes=((0.5, 0.5),), margin: float = 0.02) -> list[Box]:
        seen: list[Box] = []

        def scan(state):
            state.margin = margin
            seen.extend((yield from promising(state, sizes, most)))

        drive(ToyLayoutModel(), self.SCENE, begin, scan)
        return seen

    def test_is_where_something_is_missing(self) -> None:
        """The object itself first; no other window within it, none of what is there."""
        found = self.found(self.SCENE[:1])
        assert found[0] == Box(3, 3, 6, 6)
        assert all(box.right > 3 and box.bottom > 3 for box in found)
        assert self.found(self.SCENE[:1], most=1) == found[:1]

    def test_nothing_where_all_is_there(self) -> None:
        assert self.found(self.SCENE) == []
        assert self.found(self.SCENE[:1], sizes=((0.01, 0.01),), margin=0.99) == []


class TestSearch:
    SCENE = (Item(0, Box(0, 0, 2, 2)), Item(2, Box(3, 3, 6, 6)))

    def test_finds_what_no_error_map_shows(self) -> None:
        model = Faint()
        board = make_board(model)
        ((without, cost),) = run(model, board, Guided(margin=0.01), (self.SCENE,))
        assert without.items == self.SCENE[:1]
        scanning = Guided(margin=0.01, sizes=((0.5, 0.5),))
        ((found, more),) = run(model, board, scanning, (self.SCENE,))
        assert set(found.items) == set(self.SCENE) and cost < more < cost + 5000

    def test_all_else_is_found_as_without(self) -> None:
        model = ToyLayoutModel()
        answers = run(model, make_board(model), Guided(sizes=((0.4, 0.4), (0.6, 0.3))))
        for scene, (answer, _) in zip(SCENES, answers, strict=True):
            assert set(answer.items) == set(scene)

    def test_no_more_objects_than_may_be(self) -> None:
        model = Faint()
        strategy = Guided(margin=0.01, sizes=((0.5, 0.5),), max_objects=1)
        ((answer, _),) = run(model, make_board(model), strategy, (self.SCENE,))
        assert len(answer.items) == 1

    def test_in_the_end_more_may_be_asked(self, monkeypatch) -> None:
        """The last decision takes ``final_margin``, else the margin."""
        asked = []

        def noted(board, items, probe_ids, margin):
            asked.append(margin)
            return (yield from settle(board, items, probe_ids, margin))

        monkeypatch.setattr(guided, "settle", noted)
        model = ToyLayoutModel()
        for strategy in (Guided(), Guided(margin=0.1), Guided(margin=0.1, final_margin=0.2)):
            ((answer, _),) = run(model, make_board(model), strategy, (self.SCENE,))
            assert set(answer.items) == set(self.SCENE)
        assert asked == [0.05, 0.1, 0.2]
        with pytest.raises(DiveFastError, match=r"final_margin must be in \[0, 1\), got 1"):
            Guided(final_margin=1.0)
        with pytest.raises(DiveFastError, match=r"final_margin must be in \[0, 1\), got 1"):
            DetectionRule(final_margin=1.0)

    @pytest.mark.parametrize(
        "sizes",
        [3, "wide", ((0.5,),), ((0.5, 0.0),), ((0.5, 1.5),), ((math.nan, 0.5),), ((True, 1),)],
    )
    def test_bad_sizes(self, sizes: object) -> None:
        with pytest.raises(DiveFastError, match="sizes must be pairs of a width and a height"):
            Guided(sizes=sizes)
        with pytest.raises(DiveFastError, match="sizes must be pairs of a width and a height"):
            DetectionRule(sizes=sizes)

    def test_lists_are_taken(self) -> None:
        assert Guided(sizes=[[0.5, 1]]).sizes == ((0.5, 1.0),)


class TestFit:
    def data(self, tmp_path, boxes, sizes=((100, 50),)):
        """COCO annotations of boxes (image, category, x, y, w, h)."""
        images = [
            {"id": i, "file_name": f"{i}.png", "width": w, "height": h}
            for i, (w, h) in enumerate(sizes)
        ]
        annotations = [
            {"id": n, "image_id": i, "category_id": c, "bbox": box, "iscrowd": crowd}
            for n, (i, c, box, crowd) in enumerate(boxes, 1)
        ]
        categories = [
            {"id": 3, "name": "class 0"},
            {"id": 7, "name": "class 1"},
            {"id": 9, "name": "x"},
        ]
        path = tmp_path / "boxes.json"
        content = {"images": images, "annotations": annotations, "categories": categories}
        path.write_text(json.dumps(content))
        return read_coco(path, None)

    def test_usual_sizes(self, tmp_path) -> None:
        """Medians as shares of the image, crowds and unknown classes aside; frequent ones first."""
        boxes = [
            (0, 7, [0, 0, 10, 10], 0), (0, 7, [0, 0, 20, 10], 0), (0, 7, [0, 0, 30, 20], 0),
            (0, 3, [0, 0, 80, 40], 0), (0, 9, [0, 0, 1, 1], 0), (0, 3, [0, 0, 2, 2], 1),
        ]  # fmt: skip
        data = self.data(tmp_path, boxes)
        assert usual_sizes(data, {3: 0, 7: 1}) == ((0.2, 0.2), (0.8, 0.8))
        assert usual_sizes(data, {3: 0}) == ((0.8, 0.8),) and usual_sizes(data, {}) == ()

    def test_sizes_that_are_nearly_the_same_are_one(self, tmp_path) -> None:
        boxes = [
            (0, 7, [0, 0, 20, 20], 0), (1, 7, [0, 0, 40, 40], 0),
            (0, 3, [0, 0, 24, 20], 0),
        ]  # fmt: skip
        data = self.data(tmp_path, boxes, ((100, 50), (200, 100)))
        assert usual_sizes(data, {3: 0, 7: 1}) == ((0.2, 0.4),)

    def test_what_is_judged(self) -> None:
        """Without a scan first, so that of equals the cheaper one is kept."""
        found = searches(Guided(margin=0.1, rounds=1), ((0.5, 0.5),))
        assert [(each.margin, each.sizes) for each in found] == [
            (LEAST_MARGIN, ()),
            (Guided.usual_margin, ()),
            (SMALL_MARGIN, ((0.5, 0.5),)),
            (Guided.usual_margin, ((0.5, 0.5),)),
        ]
        assert all(each.rounds == 1 for each in found)
        assert len(searches(Guided(margin=0.1), ())) == 2
        of_invert = searches(InvertLayout(margin=0.1), ((0.5, 0.5),))
        assert [each.margin for each in of_invert] == [LEAST_MARGIN, InvertLayout.usual_margin]

    def test_a_detector_takes_the_fitted_sizes(self) -> None:
        detector = LayoutDetector(PictureModel())
        assert detector.layout_strategy("guided", {}).sizes == ()
        detector.model.detection = DetectionRule(0.1, None, None, ((0.5, 0.25),), 0.2)
        taken = detector.layout_strategy("guided", {})
        assert (taken.margin, taken.sizes, taken.final_margin) == (0.1, ((0.5, 0.25),), 0.2)
        taken = detector.layout_strategy("guided", {"margin": 0.3})
        assert (taken.margin, taken.sizes, taken.final_margin) == (0.3, ((0.5, 0.25),), None)
        taken = detector.layout_strategy("guided", {"final_margin": 0.4})
        assert (taken.margin, taken.final_margin) == (0.1, 0.4)
        assert detector.layout_strategy("guided", {"sizes": ()}).sizes == ()
        assert "sizes" not in dataclasses.asdict(detector.layout_strategy("invert", {}))

    def test_rules_of_earlier_versions_are_read(self) -> None:
        old = {"margin": 0.1, "prior_weight": None, "probes": 24}
        assert DetectionRule.from_dict(old) == DetectionRule(0.1, None, 24)
        rule = DetectionRule(0.1, None, 24, ((0.5, 0.25),), 0.2)
        assert DetectionRule.from_dict(rule.to_dict()) == rule
        with pytest.raises(DiveFastError, match="expected final_margin, margin, prior_weight"):
            DetectionRule.from_dict(old | {"more": 1})


def test_any_class_is_asked() -> None:
    """Windows stand for objects of no known class."""
    asked = []

    class Seen(ToyLayoutModel):
        def picture(self, condition: torch.Tensor) -> torch.Tensor:
            asked.append(condition)
            return super().picture(condition)

    model = Seen()
    scene = (Item(1, Box(2, 2, 5, 5)),)

    def scan(state):
        asked.clear()
        yield from promising(state, ((0.5, 0.5),), 3)

    drive(model, scene, (), scan)
    first = model.layout_format.class_range[0]
    named = [c.view(len(c), 3, 3, -1)[:, 0, 0, first : first + 3] for c in asked]
    together = torch.cat(named)
    assert (together.max(dim=1).values < 1).any() and ANY == -1
