"""What a gradient says of every class, corrected by what was learned from a few images."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from command import assert_refused, call
from tiny import write_model
from toy_model import ToyModel

from dive_fast import DiffusionClassifier, DiveFastError, ModelError
from dive_fast.core.requests import Gradients
from dive_fast.core.shortlist import Check, Shortlist, Survey, digest, estimate_shortlist
from dive_fast.core.vocabulary import Vocabulary
from dive_fast.models.files.sidecar import fitted_shortlist
from dive_fast.models.protocol import optional
from dive_fast.strategies import Auto

C = 40


@pytest.fixture(scope="module")
def uneven_toy() -> tuple[DiffusionClassifier, torch.Tensor]:
    """Classes whose means differ in length, so that a first-order estimate alone goes wrong."""
    model = ToyModel(n_classes=C, spread=0.7)
    table = model.toy.table * torch.linspace(0.3, 1.6, C)[:, None]
    model.toy.table = table
    model.vocabulary = Vocabulary(table, model.vocabulary.names)
    x0, _ = model.toy.sample(60, torch.Generator().manual_seed(1))
    return DiffusionClassifier(model), x0


def test_it_spares_evaluations_on_other_images(uneven_toy) -> None:
    classifier, x0 = uneven_toy
    full = classifier(latents=x0[30:], strategy="enumerate")
    before = classifier(latents=x0[30:], strategy="auto")
    learned = classifier.fit_shortlist(latents=x0[:30])
    after = classifier(latents=x0[30:], strategy="auto")
    assert classifier.model.shortlist is learned and len(learned.curvature) == C
    costs = [sum(a.evaluations for a in found) for found in (after, before)]
    assert costs[0] < 0.7 * costs[1]
    assert sum(a.index == f.index for a, f in zip(after, full, strict=True)) >= 28


def test_the_correction_is_exact_for_a_network_linear_in_its_condition(uneven_toy) -> None:
    """L(y_c) - L(v0) - g . (v_c - v0) is the same for every image: the toy is linear in v."""
    classifier, x0 = uneven_toy
    curvatures = []
    for part in (x0[:10], x0[10:20]):
        vocabulary = classifier.model.vocabulary
        losses = classifier.losses(latents=part, probes=24).mean(dim=2)
        lines, bases = [], []
        for x in part:
            reply = gradient_at_mean(classifier, x)
            bases.append(reply.losses.mean())
            lines.append((vocabulary.table - vocabulary.mean()) @ reply.gradients[0])
        left = losses - torch.stack(bases)[:, None] - torch.stack(lines)
        torch.testing.assert_close(left, left[:1].expand_as(left), rtol=1e-3, atol=1e-4)
        curvatures.append(left.mean(dim=0))
    torch.testing.assert_close(*curvatures, rtol=1e-3, atol=1e-4)


def gradient_at_mean(classifier: DiffusionClassifier, x0: torch.Tensor):
    from dive_fast.core.probes import low_discrepancy_probes
    from dive_fast.core.requests import Answer
    from dive_fast.engine import Engine, Job
    from dive_fast.engine.objective import Objective

    model = classifier.model

    def search():
        reply = yield Gradients(model.vocabulary.mean()[None], torch.arange(24))
        return Answer(0, torch.zeros(C), torch.zeros(C), {"reply": reply})

    probes = low_discrepancy_probes(24, len(model.schedule), model.latent_shape)
    (found,) = Engine(model).run([Job(0, x0, search())], probes, Objective())
    return found.answer.trace["reply"]


def survey(n_images: int, slope: float = 1.5, noise: float = 0.0) -> tuple[Survey, torch.Tensor]:
    """Losses that are ``slope`` of the gradient's words, a curvature by class, and noise."""
    generator = torch.Generator().manual_seed(0)
    slopes = torch.randn(n_images, 12, 4, generator=generator, dtype=torch.float64)
    curvature = torch.rand(12, generator=generator, dtype=torch.float64)
    base = torch.rand(n_images, 4, generator=generator, dtype=torch.float64)
    of_images = noise * torch.randn(n_images, 12, 1, generator=generator, dtype=torch.float64)
    losses = base[:, None] + slope * slopes + curvature[:, None] + of_images
    return Survey(losses, base, slopes), curvature


def test_slope_control_and_curvature_are_recovered() -> None:
    found, curvature = survey(50)
    learned, without = estimate_shortlist(found, "x")
    assert learned.slope == 1.5 and learned.classes == "x" and learned.checks == ()
    assert learned.control == pytest.approx(1.5), "l goes with e between units as it does over all"
    assert learned.error == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(
        torch.tensor(learned.curvature).double(), curvature, rtol=0, atol=1e-6
    )
    assert len(without) == 50


def test_the_error_is_that_of_images_left_out() -> None:
    """Every class misses by N(0, 0.1^2) an image: tau^2 = 0.1^2 (1 + 1 / (B - 1))."""
    found, _ = survey(400, noise=0.1)
    learned, _ = estimate_shortlist(found, "x")
    assert learned.error == pytest.approx(0.1, rel=0.1)


def test_one_left_out_knows_nothing_of_its_image() -> None:
    found, _ = survey(5, noise=0.2)
    _, without = estimate_shortlist(found, "x")
    left = found.losses.mean(dim=2) - found.base.mean(dim=1)[:, None]
    left = left - without[0].slope * found.slopes.mean(dim=2)
    for i, one in enumerate(without):
        others = torch.stack([left[j] for j in range(5) if j != i]).mean(dim=0)
        assert one.curvature == pytest.approx(others.tolist(), abs=1e-9)


def test_it_costs_what_is_said(uneven_toy) -> None:
    """7 probes are 3 pairs; the best 16 of 40 classes go on to 100."""
    classifier, x0 = uneven_toy
    model = classifier.model
    model.rows.clear()
    classifier.fit_shortlist(latents=x0[:5], probes=7)
    counted = sum(model.rows)  # forwards; the gradient's backwards come on top
    assert counted == 5 * (6 * (C + 1) + 94 * 16)


def test_it_is_tried_on_every_image_with_what_the_others_say(uneven_toy) -> None:
    classifier, x0 = uneven_toy
    learned = classifier.fit_shortlist(latents=x0[:20])
    levels = [check.min_agreement for check in learned.checks]
    assert levels == sorted(levels) and 0.95 in levels
    assert all(check.images == 20 for check in learned.checks)
    costs = [check.evaluations for check in learned.checks]
    assert costs == sorted(costs), "more certainty costs more"
    assert costs[-1] < 100 * C
    # A check is a replay of what the engine does, up to what an image says of its own curvature.
    classifier.model.shortlist = dataclasses.replace(learned, checks=())
    found = classifier(latents=x0[:20], strategy=Auto(min_agreement=levels[0]))
    mean = sum(a.evaluations for a in found) / 20
    assert mean == pytest.approx(costs[0], rel=0.2)


def test_what_is_worse_than_nothing_is_left_out(caplog) -> None:
    """Two classes are all measured at once: no shortlist can make that cheaper."""
    model = ToyModel(n_classes=2)
    x0, _ = model.toy.sample(40, torch.Generator().manual_seed(2))
    classifier = DiffusionClassifier(model)
    model.shortlist = Shortlist(1.0, (0.0, 0.0), 0.1, 1.0, digest(model.vocabulary.names))
    learned = classifier.fit_shortlist(latents=x0)
    assert model.shortlist is None and len(learned.curvature) == 2
    assert "the shortlist is left out: on images left out auto needs" in caplog.text


def test_an_older_one_is_told_and_left_out(tmp_path: Path, caplog) -> None:
    directory = write_model(tmp_path / "model")
    old = {"slope": 1.0, "curvature": [0.0] * 4, "classes": "x"}
    (directory / "dive_fast.json").write_text(json.dumps({"beta": 7.0, "shortlist": old}))
    classifier = DiffusionClassifier.from_pretrained(directory)
    assert optional(classifier.model, "shortlist") is None
    assert classifier.model.inverse_temperature == 7.0, "what else was fitted stays"
    assert "is of an earlier version: fit it again." in caplog.text


def test_a_check_holds_for_a_new_image() -> None:
    """(wrong + 1) / (images + 1) <= 1 - p, or all right where no number would do."""
    for p, images, wrong, kept in [
        (0.9, 19, 1, True),  # 2 / 20 = 0.1
        (0.9, 19, 2, False),
        (0.95, 19, 0, True),
        (0.95, 18, 0, True),  # 1 / 19 > 0.05, but all were right
        (0.95, 18, 1, False),
        (0.8, 9, 1, True),
        (0.8, 9, 2, False),
        (0.999, 10, 0, True),
    ]:
        assert Check(0.9, images, wrong, 10.0).keeps(p) is kept, (p, images, wrong)


def test_what_is_asked_for_follows_the_checks() -> None:
    """At 0.8, 0.9, 0.99: 3, 1, 0 of 39 were wrong, shares of 4, 2 and 1 in 40."""
    checks = tuple(Check(p, 39, wrong, 50.0) for p, wrong in ((0.8, 3), (0.9, 1), (0.99, 0)))
    shortlist = Shortlist(1.0, (0.0, 0.0), 0.1, 1.0, "x", checks)
    assert shortlist.needed(0.5) == 0.8, "nothing below was tried"
    assert shortlist.needed(0.85) == 0.85, "0.8 would do, but not less than what is asked"
    assert shortlist.needed(0.9) == 0.9, "4 / 40 = 0.1"
    assert shortlist.needed(0.95) == 0.95, "2 / 40 = 0.05"
    assert shortlist.needed(0.96) == 0.99
    assert shortlist.needed(0.999) == 0.999, "all right is the best that 39 images can tell"
    worse = tuple(Check(p, 39, 9, 50.0) for p in (0.8, 0.99))
    assert dataclasses.replace(shortlist, checks=worse).needed(0.9) is None
    assert dataclasses.replace(shortlist, checks=()).needed(0.9) == 0.9


def test_auto_goes_without_one_that_no_check_kept() -> None:
    model = ToyModel()
    x0, _ = model.toy.sample(4, torch.Generator().manual_seed(1))
    classifier = DiffusionClassifier(model)
    plain = classifier(latents=x0, strategy="auto", trace=True)
    checks = (Check(0.95, 50, 20, 9.0), Check(0.999, 50, 20, 9.0))
    # Misleading: the answer would always be class 0.
    curvature, names = (0.0, 50.0, 40.0, 30.0, 20.0, 10.0), digest(model.vocabulary.names)
    model.shortlist = Shortlist(1.0, curvature, 0.01, 1.0, names, checks)
    found = classifier(latents=x0, strategy="auto", trace=True)
    for a, b in zip(plain, found, strict=True):
        assert (a.index, a.evaluations) == (b.index, b.evaluations)


def test_it_is_kept_beside_the_model_for_these_classes_only(tmp_path: Path) -> None:
    directory = write_model(tmp_path / "model")
    classifier = DiffusionClassifier.from_pretrained(directory)
    x0 = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    learned = classifier.fit_shortlist(latents=x0, probes=4)
    classifier.save_fitted()
    again = DiffusionClassifier.from_pretrained(directory)
    assert again.model.shortlist.slope == learned.slope
    assert again.model.shortlist.curvature == pytest.approx(learned.curvature, rel=1e-5)

    index = json.loads((directory / "model_index.json").read_text())
    index["id2label"]["0"] = "another"
    (directory / "model_index.json").write_text(json.dumps(index))
    assert optional(DiffusionClassifier.from_pretrained(directory).model, "shortlist") is None


def test_round_trip_and_other_vocabularies() -> None:
    checks = (Check(0.9, 20, 1, 33.5), Check(0.99, 20, 0, 70.25))
    shortlist = Shortlist(1.25, (0.1, 0.2), 0.01, 0.8, digest(("a", "b")), checks)
    assert Shortlist.from_dict(json.loads(json.dumps(shortlist.to_dict()))) == shortlist
    assert shortlist.fits(Vocabulary(torch.eye(2), ("a", "b")))
    assert not shortlist.fits(Vocabulary(torch.eye(2), ("b", "a")))


def test_it_is_not_used_for_other_classes() -> None:
    """Classes of a model may change; ``auto`` then ranks as if nothing was learned."""
    model = ToyModel()
    x0, _ = model.toy.sample(3, torch.Generator().manual_seed(1))
    classifier = DiffusionClassifier(model)
    plain = classifier(latents=x0, strategy="auto", trace=True)
    curvature = (0.0, 50.0, 40.0, 30.0, 20.0, 10.0)
    names = digest(model.vocabulary.names)
    model.shortlist = Shortlist(1.0, curvature, 0.01, 1.0, names)
    fitted = classifier(latents=x0, strategy="auto", trace=True)
    assert [a.trace["order"].tolist() for a in fitted] == [[0, 5, 4, 3, 2, 1]] * 3
    assert fitted_shortlist(model) is model.shortlist
    model.vocabulary = Vocabulary(model.vocabulary.table, tuple("abcdef"))
    assert fitted_shortlist(model) is None
    renamed = classifier(latents=x0, strategy="auto", trace=True)
    for a, b in zip(plain, renamed, strict=True):
        assert a.evaluations == b.evaluations
        assert torch.equal(a.trace["order"], b.trace["order"])


GOOD = {
    "slope": 1.0,
    "curvature": [1.0],
    "error": 0.1,
    "control": 1.0,
    "classes": "x",
    "checks": [{"min_agreement": 0.9, "images": 9, "wrong": 1, "evaluations": 12.5}],
}


@pytest.mark.parametrize(
    "change",
    [
        {"slope": 0.0},
        {"slope": "1"},
        {"curvature": []},
        {"curvature": [float("nan")]},
        {"curvature": [1e39]},
        {"error": -0.1},
        {"error": None},
        {"control": float("inf")},
        {"control": "1"},
        {"classes": 3},
        {"more": 1},
    ],
)
def test_bad_values(change) -> None:
    Shortlist.from_dict(GOOD)
    with pytest.raises(DiveFastError, match="shortlist"):
        Shortlist.from_dict(GOOD | change)
    for values in (None, [], {key: GOOD[key] for key in list(GOOD)[1:]}):
        with pytest.raises(DiveFastError, match="a shortlist must hold exactly"):
            Shortlist.from_dict(values)


@pytest.mark.parametrize(
    "change",
    [
        {"min_agreement": 1.0},
        {"min_agreement": 0},
        {"min_agreement": "0.9"},
        {"images": 0},
        {"images": 2.5},
        {"wrong": -1},
        {"wrong": 10},
        {"wrong": True},
        {"evaluations": float("nan")},
        {"evaluations": None},
        {"more": 1},
    ],
)
def test_bad_checks(change) -> None:
    (check,) = GOOD["checks"]
    with pytest.raises(DiveFastError, match="check"):
        Shortlist.from_dict(GOOD | {"checks": [check | change]})


@pytest.mark.parametrize("checks", [None, {}, "all", [3], [{}], [None]])
def test_checks_that_are_none(checks) -> None:
    with pytest.raises(DiveFastError, match="the checks of a shortlist must be a list"):
        Shortlist.from_dict(GOOD | {"checks": checks})


def test_bad_input(uneven_toy, tmp_path: Path) -> None:
    classifier, x0 = uneven_toy
    with pytest.raises(DiveFastError, match="2 images or more, got 1"):
        classifier.fit_shortlist(latents=x0[:1])
    with pytest.raises(DiveFastError, match="generate must be at least 1, got 0"):
        classifier.fit_shortlist(generate=0)
    with pytest.raises(DiveFastError, match="got both"):
        classifier.fit_shortlist(latents=x0, generate=3)
    for probes in (0, 3, -1):
        with pytest.raises(DiveFastError, match=f"probes must be at least 4, got {probes}"):
            classifier.fit_shortlist(latents=x0, probes=probes)
    with pytest.raises(DiveFastError, match="seed"):
        classifier.fit_shortlist(latents=x0, seed="now")
    one, two = torch.zeros(1, 3, 2), torch.zeros(2, 3, 2)
    for losses, slopes in ((one, one), (two, two[:, :2]), (two[0], two[0])):
        with pytest.raises(DiveFastError, match="of at least 2 images"):
            estimate_shortlist(Survey(losses, torch.zeros(len(losses), 2), slopes), "x")
    directory = write_model(tmp_path / "model")
    (directory / "dive_fast.json").write_text('{"shortlist": {"slope": 1}}')
    with pytest.raises(ModelError, match="shortlist in .* cannot be used"):
        DiffusionClassifier.from_pretrained(directory)


def test_settings_on_the_command_line(tmp_path: Path, capsys) -> None:
    directory = write_model(tmp_path / "model")
    from PIL import Image

    Image.new("L", (8, 8), 90).save(tmp_path / "grey.png")
    common = ("classify", tmp_path / "grey.png", "--model", directory, "--probes", 9)
    said = call(capsys, *common, "--set", "min_agreement=0.8", "--set", "shortlist=2", "--json")
    assert said.code == 0
    for setting, message in (
        ("min_agreement", "expected --set NAME=VALUE, got 'min_agreement'"),
        ("min_agreement=2", "min_agreement must lie between 0 and 1, got 2"),
        ("min_agreement=high", "min_agreement must be a number, got 'high'"),
        ("growth=true", "growth must be a number, got True"),
        ("speed=9", "unknown setting 'speed'"),
    ):
        assert_refused(call(capsys, *common, "--set", setting), message)
    said = call(capsys, *common, "--preset", "diffusion-classifier", "--set", "n_samples=3")
    assert_refused(said, "n_samples=3: not a value that the strategy takes")
