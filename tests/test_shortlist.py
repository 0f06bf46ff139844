"""What a gradient says of every class, corrected by what was learned from a few images."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from command import assert_refused, call
from tiny import write_model
from toy_model import ToyModel

from dive_fast import DiffusionClassifier, DiveFastError, ModelError
from dive_fast.core.requests import Gradients
from dive_fast.core.shortlist import Shortlist, digest, estimate_shortlist
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


def ranks(classifier: DiffusionClassifier, x0: torch.Tensor) -> torch.Tensor:
    """Where enumeration's answer stands in the order of ``auto``."""
    full = classifier(latents=x0, strategy="enumerate", probes=60)
    auto = classifier(latents=x0, strategy=Auto(), probes=60, trace=True)
    orders = [answer.trace["order"].tolist() for answer in auto]
    return torch.tensor([o.index(f.index) for o, f in zip(orders, full, strict=True)])


def test_it_ranks_the_answer_higher_on_other_images(uneven_toy) -> None:
    classifier, x0 = uneven_toy
    before = ranks(classifier, x0[30:])
    learned = classifier.fit_shortlist(latents=x0[:30])
    after = ranks(classifier, x0[30:])
    assert after.double().mean() < 0.5 * before.double().mean()
    assert classifier.model.shortlist is learned
    assert len(learned.curvature) == C


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


def test_slope_and_curvature_are_recovered() -> None:
    generator = torch.Generator().manual_seed(0)
    linear = torch.randn(50, 12, generator=generator)
    curvature, base = torch.rand(12, generator=generator), torch.rand(50, generator=generator)
    slope, found = estimate_shortlist(base[:, None] + 1.5 * linear + curvature, base, linear)
    assert slope == 1.5
    torch.testing.assert_close(found, curvature, rtol=1e-4, atol=1e-5)


def test_it_costs_what_is_said(uneven_toy) -> None:
    classifier, x0 = uneven_toy
    counted = []
    model = classifier.model
    model.rows.clear()
    classifier.fit_shortlist(latents=x0[:5], probes=7)
    counted = sum(model.rows)  # forwards; the gradient's backwards come on top
    assert counted == 5 * 7 * (C + 1)


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
    shortlist = Shortlist(1.25, (0.1, 0.2), digest(("a", "b")))
    assert Shortlist.from_dict(json.loads(json.dumps(shortlist.to_dict()))) == shortlist
    assert shortlist.fits(Vocabulary(torch.eye(2), ("a", "b")))
    assert not shortlist.fits(Vocabulary(torch.eye(2), ("b", "a")))
    assert shortlist.correct(torch.tensor([4.0, 8.0])).tolist() == pytest.approx([5.1, 10.2])


def test_it_is_not_used_for_other_classes() -> None:
    """Classes of a model may change; ``auto`` then ranks as if nothing was learned."""
    model = ToyModel()
    x0, _ = model.toy.sample(3, torch.Generator().manual_seed(1))
    classifier = DiffusionClassifier(model)
    plain = classifier(latents=x0, strategy="auto", trace=True)
    curvature = (0.0, 50.0, 40.0, 30.0, 20.0, 10.0)
    model.shortlist = Shortlist(1.0, curvature, digest(model.vocabulary.names))
    fitted = classifier(latents=x0, strategy="auto", trace=True)
    assert [a.trace["order"].tolist() for a in fitted] == [[0, 5, 4, 3, 2, 1]] * 3
    assert fitted_shortlist(model) is model.shortlist
    model.vocabulary = Vocabulary(model.vocabulary.table, tuple("abcdef"))
    assert fitted_shortlist(model) is None
    renamed = classifier(latents=x0, strategy="auto", trace=True)
    for a, b in zip(plain, renamed, strict=True):
        assert a.evaluations == b.evaluations
        assert torch.equal(a.trace["order"], b.trace["order"])


@pytest.mark.parametrize(
    "values",
    [
        None,
        {"slope": 1.0},
        {"slope": 0.0, "curvature": [1.0], "classes": "x"},
        {"slope": 1.0, "curvature": [], "classes": "x"},
        {"slope": 1.0, "curvature": [float("nan")], "classes": "x"},
        {"slope": "1", "curvature": [1.0], "classes": "x"},
    ],
)
def test_bad_values(values) -> None:
    with pytest.raises(DiveFastError, match="shortlist"):
        Shortlist.from_dict(values)


def test_bad_input(uneven_toy, tmp_path: Path) -> None:
    classifier, x0 = uneven_toy
    with pytest.raises(DiveFastError, match="2 images or more, got 1"):
        classifier.fit_shortlist(latents=x0[:1])
    with pytest.raises(DiveFastError, match="generate must be at least 1, got 0"):
        classifier.fit_shortlist(generate=0)
    with pytest.raises(DiveFastError, match="got both"):
        classifier.fit_shortlist(latents=x0, generate=3)
    with pytest.raises(DiveFastError, match="number of probes must be at least 1, got 0"):
        classifier.fit_shortlist(latents=x0, probes=0)
    with pytest.raises(DiveFastError, match="of at least 2 images"):
        estimate_shortlist(torch.zeros(1, 3), torch.zeros(1), torch.zeros(1, 3))
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
