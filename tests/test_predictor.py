"""What classifier and detector share: one way through the engine, and one grammar."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_transformer import make_dit
from toy_layout import PictureModel
from toy_model import ToyModel

from dive_fast import DiffusionClassifier, DiveFastError, LayoutDetector
from dive_fast.engine import EngineOptions

N, CLASSES, PROBES = 3, 5, 4


def classifier(**options) -> DiffusionClassifier:
    model = make_dit()
    return DiffusionClassifier(model, batch_size=24, options=EngineOptions(**options))


def latents() -> torch.Tensor:
    return torch.randn(N, 2, 4, 4, generator=torch.Generator().manual_seed(2))


def fit_timesteps(clf: DiffusionClassifier) -> int:
    """Returns the evaluations that it takes: all classes on 20 probes, then 4 on 64."""
    clf.fit_timesteps(latents=latents(), labels=[0, 1, 2], probes=64, rivals=3)
    return N * (20 * (CLASSES - 1) + 4 * 64)


def fit_shortlist(clf: DiffusionClassifier) -> int:
    """A gradient at the mean, then all classes, which are few enough to go on to 100 probes."""
    clf.fit_shortlist(latents=latents(), probes=PROBES)
    return N * (2 * PROBES + 100 * CLASSES)


def calibrate(clf: DiffusionClassifier) -> int:
    clf.calibrate(latents=latents(), labels=[0, 1, 2], probes=PROBES)
    return N * PROBES * CLASSES


FITS = pytest.mark.parametrize("fit", [fit_timesteps, fit_shortlist, calibrate])


@FITS
def test_fitting_is_seen_in_the_last_run(fit) -> None:
    clf = classifier()
    expected = fit(clf)
    assert clf.last_run.evaluations == expected
    assert clf.last_run.batches >= expected / (2 * clf.batch_size)


@FITS
def test_fitting_runs_under_autocast(fit) -> None:
    clf, seen = classifier(cache="off", autocast="bfloat16"), []
    predict = clf.model.predict

    def watched(*arguments):
        seen.append(torch.is_autocast_enabled("cpu"))
        return predict(*arguments)

    clf.model.predict = watched
    fit(clf)
    assert seen and all(seen)


@FITS
def test_fitting_uses_the_cache(fit) -> None:
    clf = classifier(cache="exact")
    fit(clf)
    assert clf.last_run.cache_misses > 0


@FITS
def test_fitting_runs_through_the_compiler(fit, monkeypatch) -> None:
    compile, names = torch.compile, []

    def traced(function):
        names.append(function.__name__)
        return compile(function, backend="eager")

    monkeypatch.setattr(torch, "compile", traced)
    fit(classifier(cache="off", compile=True))
    assert names == ["predict"]


def test_a_batch_size_that_memory_halved_stays(caplog) -> None:
    model = ToyModel()
    model.memory = 10
    clf = DiffusionClassifier(model, batch_size=64)
    x0 = torch.randn(2, *model.latent_shape)
    clf.fit_shortlist(latents=x0, probes=8)
    assert "out of memory" in caplog.text
    assert clf.batch_size <= 10
    model.rows.clear()
    clf.fit_timesteps(latents=x0, labels=[0, 1], probes=64)
    clf(latents=x0, strategy="enumerate", probes=8)
    assert max(model.rows) <= 10


def scene() -> Image.Image:
    levels = np.zeros((6, 6, 3), dtype=np.uint8)
    levels[0:2, 1:3, 1] = 255
    return Image.fromarray(levels)


def test_both_stream_key_and_result_of_images_in_any_form(tmp_path: Path) -> None:
    scene().save(tmp_path / "scene.png")
    pairs = [("image", scene()), ("file", tmp_path / "scene.png"), ("array", np.asarray(scene()))]
    detector = LayoutDetector(PictureModel())
    found = dict(detector.stream(iter(pairs)))
    assert set(found) == {"image", "file", "array"}
    assert all(f.class_id.tolist() == [1] and f.evaluations > 0 for f in found.values())

    model = ToyModel()
    model.image_shape = (3, 4, 4)
    model.encode = lambda images: images[:, :2, :3, :3]
    answers = dict(DiffusionClassifier(model).stream(iter(pairs), strategy="enumerate", probes=4))
    assert set(answers) == {"image", "file", "array"}
    assert all(torch.equal(answers["image"].losses, a.losses) for a in answers.values())


def test_both_keep_a_trace_and_show_progress_if_asked(capsys) -> None:
    detector, clf = LayoutDetector(PictureModel()), DiffusionClassifier(ToyModel())
    x0 = torch.zeros(1, 2, 3, 3)
    assert detector(scene())[0].trace is None
    assert clf(latents=x0, probes=4)[0].trace is None
    assert capsys.readouterr().err == ""
    assert "begun" in detector(scene(), trace=True, progress=True)[0].trace
    assert clf(latents=x0, probes=4, trace=True, progress=True)[0].trace
    assert capsys.readouterr().err.count("1/1") >= 2


@pytest.mark.parametrize("given", [{}, {"images": [], "latents": []}])
def test_a_stream_takes_images_or_latents(given) -> None:
    with pytest.raises(DiveFastError, match="expected either images or latents"):
        list(DiffusionClassifier(ToyModel()).stream(**given))


def test_both_say_what_decides_their_answers() -> None:
    clf, detector = DiffusionClassifier(ToyModel()), LayoutDetector(PictureModel())
    assert (
        clf.identity(strategy="race", probes=7, seed=3).items()
        >= {
            "model": {"name": "toy"},
            "probes": 7,
            "beta": 9.0,
            "seed": 3,
        }.items()
    )
    assert clf.identity(preset="dive-paper")["strategy"]["name"] == "dive-paper"
    assert detector.identity(probes=5)["probes"] == 5
    assert "engine" not in clf.identity()
    clf.options = EngineOptions(autocast="bfloat16")
    assert clf.identity()["engine"] == {"autocast": "bfloat16"}
