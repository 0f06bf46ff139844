"""The map of where the answer explains a picture better: its values, its drawing and its course."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from dive_fast import DiffusionClassifier
from dive_fast.app import views
from dive_fast.app.asking import Look, Question, ask, watch_for
from dive_fast.app.shelf import Entry
from dive_fast.app.watch import ClassWatch
from dive_fast.app.where import MapSearch, first_probes, measured
from dive_fast.core.probes import ProbeList, low_discrepancy_probes
from dive_fast.models import resolve
from dive_fast.predict.explaining import NoOtherClass, runner_up
from dive_fast.predict.explanation import Explanation
from dive_fast.predict.overlay import BLUE, RED, smoothed


@pytest.fixture(scope="module")
def digits() -> Entry:
    return Entry(resolve("digits"), lambda c, t: DiffusionClassifier.from_pretrained("digits"))


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of odd sides, with an edge to tell apart."""
    path = tmp_path_factory.mktemp("pictures") / "picture.png"
    values = np.zeros((21, 17), dtype=np.uint8)
    values[4:17, 6:11] = 230
    Image.fromarray(values).save(path)
    return str(path)


def asked(entry: Entry, picture: str, **changes) -> list[Look]:
    question = replace(Question(picture, "enumerate", {}, 40, 3, True), **changes)
    return list(ask(entry, question, watch_for(entry)))


# -- values ----------------------------------------------------------------------------------------


def test_a_map_is_plain_arithmetic(digits, picture) -> None:
    """The squared errors of the two classes' predictions, pixel by pixel, on 32 of 40 probes."""
    clf = digits.ready()
    look = asked(digits, picture)[-1]
    found, where = look.found, look.where
    a, b = found.log_posterior.argsort(descending=True)[:2].tolist()
    assert (where.a, where.b) == (clf.names[a], clf.names[b])
    probes = low_discrepancy_probes(40, len(clf.model.schedule), clf.model.latent_shape, 3)
    if clf.model.timesteps is not None:
        probes = clf.model.timesteps.probes(40, clf.model.latent_shape, 3)
    x0, expected = clf.encode(picture)[0], torch.zeros(8, 8)
    for k in range(32):
        eps, t = probes.noise[k], probes.timesteps[k]
        x_t = clf.model.schedule.a[t] * x0 + clf.model.schedule.s[t] * eps
        two = clf.model.vocabulary.table[[a, b]]
        with torch.no_grad():
            predicted = clf.model.predict(x_t.expand(2, -1, -1, -1), t.expand(2), two)
        error = (predicted - eps).square().mean(dim=1)
        weight = 1.0 if probes.weights is None else probes.weights[k]
        expected += weight * (error[1] - error[0]) / 32
    torch.testing.assert_close(where.difference, expected, rtol=1e-3, atol=1e-5)
    assert where.n_probes == 32 and where.evaluations == 64
    assert where.picture.size == (8, 8) and where.picture.mode == "L"


def test_its_mean_is_the_difference_of_the_losses(digits, picture) -> None:
    clf = digits.ready()
    probes = low_discrepancy_probes(7, len(clf.model.schedule), clf.model.latent_shape, 1)
    # Rows for one pair and for three probes at a time; seven probes are three pairs and a half.
    for rows in (1, 7):
        search = MapSearch(4, 9, "l1", watch_for(digits), rows)
        given = {"probes": probes, "seed": 0}
        difference = measured(clf, clf.encode(picture), search, given).difference
        losses = clf.losses(picture, [4, 9], probes, loss="l1")[0, :, :6].mean(dim=1)
        torch.testing.assert_close(difference.mean(), losses[1] - losses[0])
        assert search.evaluations == 12


def test_classes_of_several_prompts(sd, picture) -> None:
    """Their loss is the mean of their prompts' losses, and so is their map."""
    prompts = {"cat": ["a cat", "two cats"], "dog": ["a dog", "two dogs"]}
    clf = DiffusionClassifier.from_pretrained(sd, classes=prompts, average="loss")
    entry = Entry(resolve(sd), lambda c, t: clf)
    look = asked(entry, picture, probes=6)[-1]
    where = look.where
    assert where.evaluations == 2 * 6 * 2 and look.evaluations == 24
    losses = dict(zip(clf.names, look.found.losses, strict=True))
    gap = losses[where.b] - losses[where.a]
    torch.testing.assert_close(where.difference.mean(), gap, rtol=1e-3, atol=1e-6)
    assert tuple(where.difference.shape) == tuple(clf.model.latent_shape[1:])
    assert where.image().width == where.image().height >= 384


@pytest.mark.parametrize(
    ("k", "unit", "taken"), [(100, 2, 32), (7, 2, 6), (1, 2, 1), (5, 1, 5), (40, 3, 30)]
)
def test_units_of_probes_are_whole(k, unit, taken) -> None:
    probes = ProbeList(torch.arange(k), torch.zeros(k, 1, 1, 1), unit=unit)
    assert first_probes(probes).tolist() == list(range(taken))


# -- its course ------------------------------------------------------------------------------------


def test_the_search_is_what_it_is_without_a_map(digits, picture) -> None:
    plain, looks = asked(digits, picture, where=False)[-1], asked(digits, picture)
    assert plain.where is None and isinstance(looks[-1].where, Explanation)
    assert looks[-1].found.losses.equal(plain.found.losses)
    assert looks[-1].evaluations == plain.evaluations == 400
    said = [look.where for look in looks[:-1] if look.state == "done"]
    assert said and all(text.startswith("Looking where: ") for text in said)
    assert all(text.endswith(" of 64 evaluations.") for text in said)


def test_stopping_the_map_keeps_the_answer(digits, picture, monkeypatch) -> None:
    """One pair of probes at a time, and stopped after two of its 16 pieces."""

    class StoppedLate(ClassWatch):
        reads = 0  # since the search had all it wanted

        @property
        def stopped(self) -> bool:
            self.reads += self.evaluations == 400
            return self.reads > 3

    watch = StoppedLate()
    monkeypatch.setattr(digits.ready(), "batch_size", 2)
    looks = list(ask(digits, Question(picture, "enumerate", {}, 40, 3, True), watch))
    assert looks[-1].state == "done" and looks[-1].where == "No map: stopped."
    assert looks[-1].evaluations == 400 and looks[-1].found is looks[-2].found
    assert watch.reads == 4
    assert "No map: stopped." in views.where(looks[-1])


def test_a_map_that_cannot_be_had_keeps_the_answer(digits, picture, monkeypatch) -> None:
    predict, found = digits.ready().model.predict, asked(digits, picture, where=False)[-1].found
    calls: list[int] = []

    def failing(x_t, t, condition):
        calls.append(len(x_t))
        if sum(calls) > 400:
            raise RuntimeError("no room")
        return predict(x_t, t, condition)

    broken = DiffusionClassifier(digits.predictor.model)
    monkeypatch.setattr(broken.model, "predict", failing)
    entry = Entry(resolve("digits"), lambda c, t: broken)
    broken.options = replace(broken.options, cache="off")
    look = asked(entry, picture)[-1]
    assert look.state == "done" and look.found.index == found.index
    assert look.where.startswith("No map: ") and "no room" in look.where


def test_one_measured_class_is_compared_with_none(digits, picture) -> None:
    found = asked(digits, picture, probes=2, where=False)[-1].found
    vocabulary = digits.ready().model.vocabulary
    assert runner_up(found, vocabulary) == found.top(2)[1]["index"]
    n_probes = torch.zeros_like(found.n_probes)
    n_probes[found.index] = 2
    with pytest.raises(NoOtherClass, match="only one class was measured"):
        runner_up(replace(found, n_probes=n_probes), vocabulary)


# -- its drawing -----------------------------------------------------------------------------------


def a_map(difference: torch.Tensor) -> Explanation:
    white = Image.new("RGB", (20, 20), "white")
    return Explanation(difference[None], (32,), "<i>three</i>", "five", 64, white)


def test_smoothing_keeps_the_mean() -> None:
    difference = torch.randn(13, 30, generator=torch.Generator().manual_seed(0))
    found = smoothed(difference)
    assert found.shape == (13, 30) and found.std() < difference.std()
    assert found.mean() == pytest.approx(difference.mean().item(), abs=1e-6)


def test_red_and_blue_have_one_scale() -> None:
    """1 on the left, -0.5 on the right; 0.85 of the colour at the most, on a grey of 191."""
    difference = torch.ones(4, 4)
    difference[:, 2:] = -0.5
    image = np.asarray(a_map(difference).image(z=None)).astype(float)
    assert image.shape == (400, 400, 3)
    for column, share, colour in ((0, 0.85, RED), (-1, 0.425, BLUE)):
        expected = (1 - share) * 191.5 + share * np.array(colour)
        assert np.abs(image[200, column] - expected).max() <= 2


def test_no_difference_has_no_colour() -> None:
    image = np.asarray(a_map(torch.zeros(3, 5)).image(z=None))
    assert (image == image[..., :1]).all()


def test_a_figure_names_both_classes() -> None:
    look = Look(None, 0, 0.0, "done", Image.new("L", (8, 8)), a_map(torch.full((4, 4), 0.25)))
    html = views.where(look)
    assert "<i>" not in html and "Where it is &lt;i&gt;three&lt;/i&gt; rather than five" in html
    assert 'alt="The picture in grey: red where &lt;i&gt;three&lt;/i&gt; explains it better' in html
    assert "on 32 probes: +0.25." in html and "took 64 evaluations in addition" in html
    assert "" == views.where(replace(look, where=None))
