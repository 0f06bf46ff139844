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
from dive_fast.core.detection import DetectionRule
from dive_fast.data.coco import CocoDataset, CocoImage, read_coco, write_coco
from dive_fast.errors import DataError, DiveFastError, ModelError
from dive_fast.predict.fitting_layout_timesteps import _window
from dive_fast.predict.fitting_search import (
    LEAST_MARGIN,
    SMALL_MARGIN,
    Observed,
    choose_margin,
    choose_weight,
)
from dive_fast.strategies.layout import Box, Guided, Item

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


class TestSearch:
    """Margin, weight of the prior and beta together."""

    def test_all_is_found(self, detector, data) -> None:
        """Every object explains all of the loss, and nothing else is found."""
        fit = detector.fit_search(data, **SEARCH)
        assert (fit.precision, fit.recall, fit.annotated, fit.images) == (1.0, 1.0, 6, 3)
        assert fit.prior_weight is None and fit.margin == pytest.approx(math.sqrt(LEAST_MARGIN))
        assert detector.model.detection == DetectionRule(fit.margin)
        assert detector.model.inverse_temperature == fit.calibration.beta_after
        assert detector.identity()["strategy"]["margin"] == fit.margin
        assert detector.identity(strategy=Guided(margin=0.3))["strategy"]["margin"] == 0.3
        assert "so 100% of the 6 annotated objects of 3 images are found" in str(fit)
        asked = detector.layout_strategy("guided", {"margin": 0.2})
        assert asked.margin == 0.2

    def test_a_prior_that_speaks_against_what_is_there_gets_no_weight(self, detector, data) -> None:
        model = PictureModel()
        against = LayoutDetector(model, make_prior_against_objects(model))
        fit = against.fit_search(data, **SEARCH)
        assert fit.prior_weight == 0.0 == against.prior_weight
        found = against([image.path for image in data.images])
        assert [len(one.class_id) for one in found] == [1, 2, 3]

    def test_later_searches_have_as_many_probes(self, detector, data) -> None:
        detector.fit_search(data, probes=16)
        assert detector.model.detection.probes == 16
        assert len(detector.probe_list(Guided())) == 16 and detector.identity()["probes"] == 16
        assert len(detector.probe_list(Guided(), 40)) == 40
        found = detector.identity()["strategy"]
        numbers = [found[name] for name in ("rough_probes", "step_probes", "final_probes")]
        assert numbers == [2, 4, 8]
        detector.fit_search(data)  # with those of before
        assert detector.model.detection.probes == 16

    @pytest.mark.parametrize("astray", [True, False])
    def test_the_usual_margin_stays_where_its_search_is_better(
        self, detector, data, monkeypatch, astray: bool
    ) -> None:
        """A generous search finds two of four, or all, beside one that the usual search finds."""
        shares = torch.tensor([0.5, 0.4, 0.3, 0.2], dtype=torch.float64)
        losses = torch.stack([1 - shares, torch.ones(4)], dim=1).double()
        right, half = torch.zeros(4).long(), torch.tensor([0, 0, 1, 1])
        nothing = torch.zeros(4).long()
        tried = []

        def observed(data, progress, search, penalty):
            tried.append((search["strategy"].margin, len(search["strategy"].sizes)))
            wrong = (search["strategy"].margin == LEAST_MARGIN) == astray
            return Observed(losses, half if wrong else right, nothing, None, 4, 2)

        monkeypatch.setattr(detector, "_observed", observed)
        fit = detector.fit_search(data)
        usual = Guided.usual_margin
        assert tried == [(LEAST_MARGIN, 0), (usual, 0), (SMALL_MARGIN, 1), (usual, 1)]
        assert (fit.precision, fit.recall) == (1.0, 1.0)
        best = Guided.usual_margin if astray else math.sqrt(0.2 * LEAST_MARGIN)
        assert fit.margin == detector.model.detection.margin == pytest.approx(best)

    def test_a_scan_is_kept_where_its_search_is_better(self, detector, data, monkeypatch) -> None:
        """It finds three of four, others two; the windows are as large as the objects."""
        shares = torch.tensor([0.5, 0.4, 0.3, 0.2], dtype=torch.float64)
        losses = torch.stack([1 - shares, torch.ones(4)], dim=1).double()
        nothing = torch.zeros(4).long()

        def observed(data, progress, search, penalty):
            strategy = search["strategy"]
            best = strategy.sizes and strategy.margin == SMALL_MARGIN
            labels = torch.tensor([0, 0, 0 if best else 1, 1])
            return Observed(losses, labels, nothing, None, 4, 2)

        monkeypatch.setattr(detector, "_observed", observed)
        fit = detector.fit_search(data)
        assert (fit.margin, fit.recall) == (SMALL_MARGIN, 0.75) and fit.sizes
        assert fit.final_margin == pytest.approx(math.sqrt(0.3 * 0.2))  # between right and wrong
        rule = detector.model.detection
        assert (rule.sizes, rule.final_margin) == (fit.sizes, fit.final_margin)
        assert detector.identity()["strategy"]["sizes"] == fit.sizes
        assert "windows that are scanned" in str(fit)
        widths = [item.box.right - item.box.left for scene in SCENES for item in scene]
        assert min(widths) / 6 - 1e-4 <= fit.sizes[0][0] <= max(widths) / 6 + 1e-4

    def test_is_kept(self, detector, data, tmp_path: Path) -> None:
        (tmp_path / "dive_fast.json").write_text('{"mine": 1}')
        fit = detector.fit_search(data, **SEARCH)
        detector.save_fitted(tmp_path)
        content = json.loads((tmp_path / "dive_fast.json").read_text())
        assert content["mine"] == 1
        assert content["detection"] == {
            "margin": fit.margin, "prior_weight": None, "probes": None, "sizes": None,
            "final_margin": None,
        }  # fmt: skip
        other = LayoutDetector(PictureModel())
        other.load_fitted(tmp_path)
        assert other.identity() == detector.identity()

    def test_damaged(self, detector, tmp_path: Path) -> None:
        for wrong in ({"margin": 1.0, "prior_weight": None}, {"margin": 0.1}, 3):
            (tmp_path / "dive_fast.json").write_text(json.dumps({"detection": wrong}))
            with pytest.raises(ModelError, match="detection in .* cannot be used"):
                detector.load_fitted(tmp_path)

    def test_margin_and_weight_by_hand(self) -> None:
        """Five objects of one class; the two least certain are wrong, one is never found."""
        shares = torch.tensor([0.5, 0.4, 0.1, 0.02, 0.01], dtype=torch.float64)
        losses = torch.stack([1 - shares, torch.ones(5)], dim=1).double()
        labels = torch.tensor([0, 0, 0, 1, 1])
        observed = Observed(losses, labels, torch.zeros(5).long(), None, 4, 2)
        margin, precision, recall = choose_margin(observed, 10.0, None)
        assert margin == pytest.approx(math.sqrt(0.1 * 0.02))
        assert (precision, recall) == (1.0, 0.75)
        assert choose_weight(observed, 10.0, 0.05) is None
        # A prior that knows which are there, and one that says the contrary.
        knows = torch.where(labels[:, None] == torch.arange(2), 0.0, 5.0).double()
        assert choose_weight(observed._replace(prices=knows), 10.0, 0.05) == 1.0
        assert choose_weight(observed._replace(prices=-knows), 10.0, 0.05) == 0.0
        # With its part, the fourth is no better than nothing.
        margin, _, _ = choose_margin(observed._replace(prices=knows), 10.0, 1.0)
        assert margin == pytest.approx(math.sqrt((1 - 0.9 / 1.5) * LEAST_MARGIN))


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
            (
                ("--what", "shortlist"),
                "of a detector timesteps and search can be fitted, or beta alone, got shortlist",
            ),
            (("--what", "beta,search"), "can be fitted, or beta alone, got .*beta"),
            (("--set", "margin=0.1"), "margin is what is fitted: leave it out of --set"),
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


class TestTimesteps:
    def test_an_analytic_model(self, detector, data) -> None:
        """It explains annotated layouts without error, so every probe tells every rival."""
        model = detector.model
        model.predict = exact_but_for_noise(model)
        fit = detector.fit_timesteps(data)
        assert model.timesteps == fit.timesteps and fit.images == 3
        assert fit.apart[0] >= fit.apart[1] > 0
        density = torch.tensor(fit.timesteps.density)
        chosen = density.nonzero()[:, 0]
        assert set(density.tolist()) <= {0.0, 1.0} and len(chosen) >= 2
        assert chosen[-1] - chosen[0] + 1 == len(chosen)  # a window
        assert "tell layouts apart best" in str(fit)
        found = detector([image.path for image in data.images])
        assert [len(one.class_id) for one in found] == [1, 2, 3]

    def test_a_model_that_does_not_care(self, detector, data) -> None:
        detector.model.predict = lambda x_t, t, condition: x_t
        with pytest.raises(DiveFastError, match="no timestep tells annotated layouts from others"):
            detector.fit_timesteps(data)
        assert getattr(detector.model, "timesteps", None) is None
        with pytest.raises(DiveFastError, match="expected a CocoDataset to fit timesteps"):
            detector.fit_timesteps(3)

    def test_the_window_by_hand(self) -> None:
        """Bins 4 and 5 tell by 1 +- 0.1, all others by 1 +- 10."""
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(50, 3, 40, generator=generator, dtype=torch.float64)
        bins = torch.arange(40) // 2
        scale = torch.where((bins == 4) | (bins == 5), 0.1, 10.0)
        logs = torch.cat([torch.zeros(50, 1, 40), 1 + scale * noise], dim=1)
        same = torch.zeros(50, 3, dtype=torch.bool)
        low, high, (best, whole) = _window(logs.exp(), same, bins)
        assert (low, high) == (4, 6) and best > 10 > whole

    def test_a_window_that_is_only_luckier_is_not_taken(self) -> None:
        """All bins tell alike, of few images; the best two of them are so by chance."""
        generator = torch.Generator().manual_seed(0)
        # What an image's rivals have in common does not average out over bins.
        common = torch.randn(6, 3, 1, generator=generator, dtype=torch.float64)
        noise = torch.randn(6, 3, 40, generator=generator, dtype=torch.float64)
        logs = torch.cat([torch.zeros(6, 1, 40), 1 + common + 0.2 * noise], dim=1)
        same = torch.zeros(6, 3, dtype=torch.bool)
        low, high, (best, whole) = _window(logs.exp(), same, torch.arange(40) // 2)
        assert (low, high) == (0, 20) and best == whole

    def test_one_image_has_no_standard_error(self) -> None:
        logs = torch.cat([torch.zeros(1, 1, 40), torch.rand(1, 3, 40)], dim=1).double()
        low, high, _ = _window(
            logs.exp(), torch.zeros(1, 3, dtype=torch.bool), torch.arange(40) // 2
        )
        assert high - low >= 2


def exact_but_for_noise(model: PictureModel):
    """Its prediction, with an error of its own, so that no loss is 0."""

    def predict(x_t, t, condition):
        return PictureModel.predict(model, x_t, t, condition) + 0.01

    return predict


def test_numbers_of_probes_follow_the_list(detector) -> None:
    """An eighth, a quarter and a half, 6, 12 and 24 of 48; what is said stays."""
    assert vars(Guided().counted(48)) == vars(
        Guided(rough_probes=6, step_probes=12, final_probes=24)
    )
    few = Guided(final_probes=9).counted(4)
    assert (few.rough_probes, few.step_probes, few.final_probes) == (1, 1, 9)
    identity = detector.identity()["strategy"]
    assert (identity["rough_probes"], identity["step_probes"], identity["final_probes"]) == (
        6,
        12,
        24,
    )
