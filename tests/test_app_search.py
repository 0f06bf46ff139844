"""Searches that are watched and stopped, classes that are changed, and what is shown of answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pictures import noise_picture
from PIL import Image
from tiny_geodiffusion import write_geodiffusion

from dive_fast import DiffusionClassifier, LayoutDetector
from dive_fast.app import views
from dive_fast.app.asking import Look, Question, ask, watch_for
from dive_fast.app.examples import of_the_zoo, pictures
from dive_fast.app.shelf import Entry, Prompted, Shelf
from dive_fast.app.watch import ClassWatch, Watched
from dive_fast.errors import DiveFastError, ImageError, ModelError
from dive_fast.models import resolve
from dive_fast.predict.classification import Classification
from dive_fast.strategies import resolve_strategy


@pytest.fixture(scope="module")
def digits() -> Entry:
    return Entry(resolve("digits"), lambda c, t: DiffusionClassifier.from_pretrained("digits"))


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    from dive_fast.data.digits import load_digits

    part = load_digits("test")
    path = tmp_path_factory.mktemp("pictures") / "three.png"
    Image.fromarray(part.images[(part.labels == 3).argmax()]).save(path)
    return path


def last(looks: list[Look]) -> Look:
    assert [look.state for look in looks[:-1]] == ["running"] * (len(looks) - 1)
    return looks[-1]


@pytest.mark.parametrize("strategy", ["auto", "enumerate", "race", "invert"])
def test_a_watched_search_answers_as_an_unwatched_one(digits, three, strategy) -> None:
    watch = watch_for(digits)
    look = last(list(ask(digits, Question(str(three), strategy, {}, 20, 3), watch)))
    plain = digits.predictor(str(three), strategy=strategy, probes=20, seed=3)[0]
    assert look.state == "done" and look.found.label == "three"
    # The batches are others, which float32 may notice in its last digits.
    torch.testing.assert_close(look.found.losses, plain.losses, equal_nan=True)
    assert look.evaluations == watch.evaluations == plain.evaluations
    assert look.found.n_probes.equal(plain.n_probes)


def test_what_is_seen_in_between_is_the_answer_in_the_end(digits, three) -> None:
    watch = watch_for(digits)
    look = last(list(ask(digits, Question(str(three), "enumerate", {}, 12), watch)))
    seen = watch.answer()
    assert seen.index == look.found.index
    torch.testing.assert_close(seen.losses, look.found.losses)


def test_a_large_request_comes_in_pieces(digits, three) -> None:
    """7 rows at a time of 10 classes on 5 probes: 7 + 3 for each probe."""
    clf = digits.ready()

    class Counted(ClassWatch):
        rows: list[int] = []

        def add(self, request, reply) -> None:
            super().add(request, reply)
            self.rows.append(len(request.conditions) * len(request.probe_ids))

    watch = Counted()
    probes = clf.probe_list(resolve_strategy("enumerate", None, {}), 5)
    given = Watched(resolve_strategy("enumerate", None, {}), watch, rows=7)
    watched = clf(str(three), strategy=given, probes=probes)[0]
    plain = clf(str(three), strategy="enumerate", probes=probes)[0]
    assert watch.rows == [7, 3] * 5
    torch.testing.assert_close(watched.losses, plain.losses)


def test_a_search_is_stopped_and_says_what_it_knew(digits, three) -> None:
    watch = watch_for(digits)
    add = watch.add

    def stop_after_two(request, reply) -> None:
        if watch.evaluations > 0:
            watch.stop()
        add(request, reply)

    watch.add = stop_after_two
    look = last(list(ask(digits, Question(str(three), "enumerate", {}, 2000), watch)))
    assert look.state == "stopped" and 0 < look.evaluations < 20_000
    assert look.found.label == "three"
    assert int(look.found.n_probes.sum()) == look.evaluations


def test_closing_the_looks_ends_the_search(digits, three) -> None:
    watch = watch_for(digits)
    looks = ask(digits, Question(str(three), "enumerate", {}, 20_000), watch)
    assert next(looks).state == "running"
    looks.close()
    count = watch.evaluations
    assert watch.stopped and count < 200_000
    assert list(ask(digits, Question(str(three), "auto"), watch_for(digits)))[-1].state == "done"
    assert watch.evaluations == count


def test_layouts_are_seen_as_they_come(layout_dir, tmp_path) -> None:
    load = lambda c, t: LayoutDetector.from_pretrained(layout_dir)  # noqa: E731
    entry = Entry(resolve(layout_dir), load)
    assert entry.detects and not entry.prompted
    noise_picture((40, 20), 80).save(tmp_path / "noise.png")
    path, watch = str(tmp_path / "noise.png"), watch_for(entry)
    look = last(list(ask(entry, Question(path, "guided", {}, 12), watch)))
    (plain,) = entry.predictor(path, probes=12)
    assert watch.items is not None
    torch.testing.assert_close(look.found.xyxy, plain.xyxy)
    torch.testing.assert_close(look.found.class_probabilities, plain.class_probabilities)
    assert look.evaluations == watch.evaluations == plain.evaluations
    image = views.drawing(look, entry.predictor.names)
    assert image.tobytes() == plain.draw(path).tobytes()
    table = views.table(look)
    assert table.count("<tr>") == (1 + len(plain) if len(plain) else 0)


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ({"path": "nowhere.png"}, "nowhere.png"),
        ({"settings": {"min_agreement": 2.0}}, "min_agreement must lie between 0 and 1"),
        ({"settings": {"budget": 1}}, "budget must be at least"),
        ({"probes": 0}, "probes"),
        ({"seed": -1}, "seed"),
        ({"strategy": "guess"}, "expected a strategy of"),
    ],
)
def test_bad_questions(digits, three, question, message) -> None:
    asked = replace(Question(str(three), "auto"), **question)
    with pytest.raises(DiveFastError, match=message):
        list(ask(digits, asked, watch_for(digits)))


# -- classes ---------------------------------------------------------------------------------------


def loads_of(directory: Path, predictor: type, **options) -> tuple[Entry, list]:
    """A model that counts how often it is loaded."""
    loads: list = []

    def load(classes, templates):
        loads.append((classes, templates))
        classes = ["cat", "dog"] if classes is None else classes
        return predictor.from_pretrained(directory, classes=classes, templates=templates, **options)

    return Entry(resolve(directory), load), loads


def test_other_classes_need_no_weights_again(sd) -> None:
    entry, loads = loads_of(sd, DiffusionClassifier)
    assert entry.prompted and not entry.detects and entry.first is None
    model = entry.ready().model
    assert entry.first.names == ("cat", "dog")
    first = model.vocabulary.table.clone()
    assert entry.ask_about("cat\n dog \n\n", "") is False  # the same
    assert model.vocabulary.table.equal(first)
    assert entry.ask_about("a fox\na cat\nan owl", "{}!") is False
    assert entry.predictor.names == ("a fox", "a cat", "an owl")
    expected = DiffusionClassifier.from_pretrained(
        sd, classes=["a fox", "a cat", "an owl"], templates=["{}!"]
    )
    assert model.vocabulary.table.equal(expected.model.vocabulary.table)
    assert entry.ask_about("cat\ndog", "") is False
    assert model.vocabulary.table.equal(first)
    assert len(loads) == 1 and entry.predictor.model is model


def test_the_prompts_of_a_file_come_back(sd) -> None:
    prompts = {"cat": "a cat, up close", "dog": ["a dog", "two dogs"]}
    entry = Entry(
        resolve(sd), lambda c, t: DiffusionClassifier.from_pretrained(sd, classes=prompts)
    )
    table = entry.ready().model.vocabulary.table.clone()
    entry.ask_about("fox\nowl", "")
    entry.ask_about("cat\ndog", "")
    assert entry.predictor.model.vocabulary.table.equal(table)


def test_a_model_that_cannot_change_its_classes_is_loaded_again(tmp_path) -> None:
    directory = write_geodiffusion(tmp_path / "geo")
    entry, loads = loads_of(directory, LayoutDetector)
    assert entry.detects and entry.prompted
    entry.ready()
    assert entry.ask_about("fox", "") is True  # a detector may have one class
    assert entry.predictor.names == ("fox",)
    assert loads == [(None, None), (("fox",), None)]


@pytest.mark.parametrize(
    ("classes", "template", "message"),
    [
        ("", "", "expected at least 2 classes, one a line, got none"),
        (" \n\n", "", "got none"),
        ("cat", "", "expected at least 2 classes, one a line, got 1"),
        ("cat\ndog\ncat ", "", "expected every class once, got 'cat' more than once"),
        ("cat\ndog", "a photo", "a template needs {} where the class goes, got 'a photo'"),
    ],
)
def test_bad_classes_change_nothing(sd, classes, template, message) -> None:
    entry, _ = loads_of(sd, DiffusionClassifier)
    entry.ready()
    with pytest.raises(DiveFastError) as caught:
        entry.ask_about(classes, template)
    assert message in str(caught.value)
    assert entry.predictor.names == ("cat", "dog")
    assert entry.ask_about("cat\ndog", "") is False


def test_a_shelf_has_one_model_on_the_device(digits) -> None:
    """Where all are on the CPU nothing moves; ``meta`` stands for an accelerator."""
    other = Entry(resolve("mnist"), lambda c, t: DiffusionClassifier.from_pretrained("mnist"))
    shelf = Shelf([digits, other])
    assert shelf.names == ("digits", "mnist")
    with shelf.taken("mnist") as taken:
        assert taken is other and other.predictor is not None
    moved: list[str] = []
    other.predictor.model.to = lambda device, dtype: moved.append(str(device))
    other.predictor.model.device = torch.device("meta")
    other._device = torch.device("meta")
    with shelf.taken("digits"):
        assert moved == ["cpu"]
    other.predictor.model.device = torch.device("cpu")  # as ``to`` would have said
    with shelf.taken("mnist"):
        assert moved == ["cpu", "meta"]
    with pytest.raises(DiveFastError, match="expected a model of 'digits', 'mnist', got 'cat'"):
        shelf["cat"]


def test_a_model_that_cannot_be_loaded_is_tried_again() -> None:
    tried = []

    def load(classes, templates):
        tried.append(1)
        raise ModelError("broken.")

    shelf = Shelf([Entry(resolve("digits"), load)])
    for _ in range(2):
        with pytest.raises(ModelError, match=r"^broken\.$"), shelf.taken("digits"):
            pass
    assert len(tried) == 2


# -- what is shown ---------------------------------------------------------------------------------


@pytest.fixture
def answer() -> Classification:
    """Odds of 3 : 1 for the first of two classes in question; one given up, one not measured."""
    p = torch.tensor([0.72, 0.24, 0.04, 0.0])
    return Classification(
        label="<b>one</b>",
        index=0,
        log_posterior=p.log(),
        losses=torch.tensor([0.5, 0.6, 0.7, torch.nan]),
        n_probes=torch.tensor([24, 24, 6, 0]),
        eliminated=torch.tensor([False, False, True, False]),
        log_odds_bound=torch.tensor([torch.nan, torch.nan, -2.302585, torch.nan]),
        names=("<b>one</b>", "two", "three", "four"),
        evaluations=1234,
        seconds=1.5,
    )


def look_at(found, state: str = "done") -> Look:
    return Look(found, 1234, 1.54, state, Image.new("L", (8, 8)))


def test_a_table_of_classes(answer) -> None:
    table = views.table(look_at(answer))
    assert "<b>" not in table and "&lt;b&gt;one&lt;/b&gt;" in table
    cells = ["72.0%", "1 : 1", "0.5000", "24", "answer", "24.0%", "1 : 3", "0.6000", "measured"]
    cells += ["4.0%", "1 : 18", "6", "given up, at most 1 : 10"]
    places = [table.index(f"<td>{cell}</td>") for cell in cells]
    assert len(places) == len(cells)
    assert "four" not in table and "1 class never measured." in table
    running = views.table(look_at(answer, "running"))
    assert "<td>leads</td>" in running and "<td>in question</td>" in running


@pytest.mark.parametrize(
    ("found", "state", "text"),
    [
        (True, "done", "&lt;b&gt;one&lt;/b&gt;, 72.0% (1,234 evaluations, 1.5 s)"),
        (True, "running", "So far: &lt;b&gt;one&lt;/b&gt;, 72.0%"),
        (True, "stopped", "Stopped: &lt;b&gt;one"),
        (False, "running", "So far: nothing compared yet"),
        (False, "stopped", "Stopped: nothing compared yet"),
    ],
)
def test_a_status(answer, found, state, text) -> None:
    status = views.status(look_at(answer if found else None, state))
    assert text in status and f"told {state}" in status


def test_bars_have_the_measured_classes_only(answer) -> None:
    bars = views.bars(look_at(answer))
    assert bars == pytest.approx({"<b>one</b>": 0.72, "two": 0.24, "three": 0.04})
    assert views.bars(look_at(None)) is None and views.drawing(look_at(answer), ()) is None


def test_examples_are_what_the_model_was_made_for(digits, three, tmp_path) -> None:
    paths = of_the_zoo(digits, tmp_path)
    assert [Path(path).stem for path in paths[:4]] == ["zero", "one", "two", "three"]
    clf = digits.ready()
    # Enlarged, and yet the same input.
    assert clf.encode(paths[3]).equal(clf.encode(three))
    other = Entry(resolve("mnist"), lambda c, t: None)
    assert of_the_zoo(other, tmp_path) == []


def test_examples_of_ones_own(tmp_path, three) -> None:
    assert pictures([str(three)]) == [str(three)]
    with pytest.raises(ImageError, match="nowhere"):
        pictures([str(tmp_path / "nowhere.png")])


def test_one_class_a_line() -> None:
    found: Callable = Prompted.read
    assert found(" a cat\r\n\n b ", " x {} ", 2) == Prompted(("a cat", "b"), "x {}")
