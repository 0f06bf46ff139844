"""``LayoutDetector`` with a prior: where it comes from, what it changes, what a run records."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from command import assert_refused, call
from PIL import Image
from tiny_layout import make_layout_model
from tiny_prior import make_prior, make_prior_against_objects
from toy_layout import SCENE, PictureModel

from dive_fast import LayoutDetector, zoo
from dive_fast.errors import ModelError
from dive_fast.models import load_model, resolve
from dive_fast.priors import LayoutPrior

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


def save_prior(model: Path, out: Path) -> LayoutPrior:
    loaded = load_model(model)
    prior = make_prior(loaded.layout_format, loaded.vocabulary.table, width=36)
    prior.save_pretrained(out)
    return prior


@pytest.fixture(scope="module")
def prior_dir(layout_dir, tmp_path_factory) -> Path:
    """A layout model with a prior beside it."""
    directory = tmp_path_factory.mktemp("models") / "layout"
    shutil.copytree(layout_dir, directory)
    save_prior(directory, directory / "prior")
    return directory


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> Path:
    """Other weights and no prior."""
    directory = tmp_path_factory.mktemp("bare")
    make_layout_model(seed=1).save_pretrained(directory)
    return directory


@pytest.fixture
def picture(tmp_path) -> Path:
    path = tmp_path / "a.png"
    Image.new("L", (8, 8), 90).save(path)
    return path


@pytest.fixture(scope="module")
def picture_model() -> PictureModel:
    return PictureModel()


@pytest.fixture(scope="module")
def scene(picture_model) -> Image.Image:
    return picture_model.draw(SCENE)[0]


@pytest.fixture(scope="module")
def against_objects(picture_model) -> LayoutPrior:
    return make_prior_against_objects(picture_model)


class TestOnAnalyticModel:
    @pytest.mark.parametrize("strategy", ["guided", "invert"])
    def test_a_heavy_prior_wins(self, picture_model, against_objects, scene, strategy: str) -> None:
        settings = {"strategy": strategy}
        (alone,) = LayoutDetector(picture_model)(scene, **settings)
        (unweighted,) = LayoutDetector(picture_model, against_objects, prior_weight=0)(
            scene, **settings
        )
        (weighted,) = LayoutDetector(picture_model, against_objects, prior_weight=1e4)(
            scene, **settings
        )
        assert replace(unweighted, seconds=0).to_dict() == replace(alone, seconds=0).to_dict()
        assert len(alone) > 0 and len(weighted) == 0

    def test_identity(self, picture_model, against_objects) -> None:
        alone = LayoutDetector(picture_model).identity()
        assert "prior" not in alone
        assert LayoutDetector(picture_model, against_objects, prior_weight=0).identity() == alone
        given = LayoutDetector(
            picture_model, against_objects, prior_weight=0.3, prior_probes=4
        ).identity()
        assert set(given.pop("prior")) == {"weight", "probes", "weights"}
        assert given == alone
        for settings in ({"prior_weight": 0.2}, {"prior_probes": 5}):
            changed = LayoutDetector(picture_model, against_objects, **settings).identity()
            assert (
                changed["prior"]
                != LayoutDetector(picture_model, against_objects).identity()["prior"]
            )

    @pytest.mark.parametrize(
        ("settings", "said"),
        [
            ({"prior_weight": -1}, "prior_weight must be a number of at least 0, got -1"),
            ({"prior_weight": float("inf")}, "prior_weight must be a number of at least 0"),
            ({"prior_probes": 0}, "1 probe at least, got .* and 0 probes"),
        ],
    )
    def test_bad_settings(self, picture_model, against_objects, settings, said: str) -> None:
        with pytest.raises(ModelError, match=said):
            LayoutDetector(picture_model, against_objects, **settings)

    def test_a_prior_of_another_model(self, picture_model) -> None:
        with pytest.raises(ModelError, match="layouts and the token table of toy layout, got one"):
            LayoutDetector(picture_model, make_prior())

    def test_a_weight_without_a_prior(self, picture_model) -> None:
        with pytest.raises(ModelError, match="prior_weight is 0.1, but toy layout has no prior"):
            LayoutDetector(picture_model, prior_weight=0.1)


class TestFromPretrained:
    def test_the_models_own(self, prior_dir: Path, bare: Path) -> None:
        detector = LayoutDetector.from_pretrained(prior_dir)
        # Nobody fitted its beta.
        assert detector.prior is not None and detector.prior_weight == 0
        assert detector.prior_is_left_out and "prior" not in detector.identity()
        detector.model.inverse_temperature = 77.0
        assert detector.prior_weight == 0.5 and not detector.prior_is_left_out
        assert not any(p.requires_grad for p in detector.prior.parameters())
        assert "prior" in detector.identity()
        for without in (
            LayoutDetector.from_pretrained(prior_dir, prior=None),
            LayoutDetector.from_pretrained(bare),
        ):
            assert without.prior is None and "prior" not in without.identity()

    def test_one_that_is_still_in_training(self, tmp_path: Path) -> None:
        make_layout_model().save_pretrained(tmp_path)
        (tmp_path / "prior").mkdir()
        (tmp_path / "prior" / "training.jsonl").touch()
        assert LayoutDetector.from_pretrained(tmp_path).prior is None

    def test_of_a_path(self, bare: Path, tmp_path: Path) -> None:
        saved = save_prior(bare, tmp_path)
        detector = LayoutDetector.from_pretrained(bare, tmp_path, prior_weight=2, prior_probes=3)
        assert detector.identity()["prior"] == {
            **LayoutDetector(load_model(bare), saved, prior_weight=1).identity()["prior"],
            "weight": 2.0,
            "probes": 3,
        }

    def test_of_the_zoo(self, prior_dir: Path, monkeypatch) -> None:
        monkeypatch.setattr(zoo, "_WEIGHTS", prior_dir.parent)
        name = prior_dir.name
        assert name in zoo.names()
        assert resolve(name).prior == prior_dir / "prior"
        assert LayoutDetector.from_pretrained(name).prior is not None

    def test_of_another_model(self, prior_dir: Path, bare: Path) -> None:
        with pytest.raises(ModelError, match="prior holds a prior of another model"):
            LayoutDetector.from_pretrained(bare, prior_dir / "prior")

    def test_nothing_there(self, bare: Path, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match="expected the folder prior"):
            LayoutDetector.from_pretrained(bare, tmp_path / "prior")

    def test_a_model_without_layouts(self) -> None:
        with pytest.raises(ModelError, match="digits, which has no layout"):
            LayoutDetector.from_pretrained("digits", "nowhere")


class TestCommand:
    def config(self, capsys, model: Path, picture: Path, out: Path, *arguments) -> dict:
        said = call(capsys, "detect", picture, "--model", model, "--out", out, *FAST, *arguments)
        assert said.code == 0, said.err
        return json.loads((out / "run.json").read_text())["config"]

    def test_prior_and_weight(self, prior_dir, picture, tmp_path, capsys) -> None:
        half = ("--prior-weight", 0.5)
        own = self.config(capsys, prior_dir, picture, tmp_path / "1", *half)
        path = self.config(
            capsys, prior_dir, picture, tmp_path / "2", "--prior", prior_dir / "prior", *half
        )
        heavy = self.config(capsys, prior_dir, picture, tmp_path / "3", "--prior-weight", 7)
        none = self.config(capsys, prior_dir, picture, tmp_path / "4", "--prior", "none")
        assert own == path and own["prior"]["weight"] == 0.5
        assert heavy["prior"]["weight"] == 7 and "prior" not in none

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (("--prior-weight", "-1"), "expected a number of at least 0, got '-1'"),
            (("--prior-weight", "much"), "expected a number of at least 0, got 'much'"),
            (("--prior", "nowhere"), "expected the folder nowhere"),
            (("--prior", "none", "--prior-weight", "1"), "prior_weight is 1.0, but .* no prior"),
        ],
    )
    def test_refused(self, prior_dir, picture, tmp_path, capsys, arguments, said: str) -> None:
        out = tmp_path / "run"
        found = call(capsys, "detect", picture, "--model", prior_dir, "--out", out, *arguments)
        assert_refused(found, said)
        assert not out.exists()

    def test_a_prior_without_a_fitted_beta(self, prior_dir, picture, tmp_path, capsys) -> None:
        """Left out unless it is given a weight, and said; a fitted one counts without a word."""
        left_out = "is not fitted, so its prior is left out"
        heavy = r"is not fitted, so a prior of weight 2 may be far too heavy"
        fitted = tmp_path / "model"
        shutil.copytree(prior_dir, fitted)
        detector = LayoutDetector.from_pretrained(fitted)
        detector.model.inverse_temperature = 77.0
        detector.save_fitted()
        weights = {}
        for number, (source, more, sentence) in enumerate(
            [
                (prior_dir, (), left_out),
                (prior_dir, ("--prior-weight", "2"), heavy),
                (prior_dir, ("--prior", "none"), None),
                (fitted, (), None),
            ]
        ):
            out = tmp_path / str(number)
            said = call(capsys, "detect", picture, "--model", source, "--out", out, *FAST, *more)
            assert said.code == 0
            assert "beta" not in said.err if sentence is None else sentence in said.err
            prior = json.loads((out / "run.json").read_text())["config"].get("prior")
            weights[number] = prior and prior["weight"]
        assert weights == {0: None, 1: 2.0, 2: None, 3: 0.5}

    @pytest.mark.parametrize("option", [("--prior", "none"), ("--prior-weight", "1")])
    def test_classifiers_have_none(self, tmp_path, capsys, option) -> None:
        said = call(capsys, "evaluate", "--data", "digits", "--out", tmp_path / "run", *option)
        assert_refused(said, f"{option[0]} is for detectors; digits is for classifiers")
