"""What a record of a run must hold: what is missing or wrong is one sentence, with its line."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from command import assert_refused, call
from rundir_inputs import lines

from dive_fast import Classification, Detections, RunError
from dive_fast.evaluation import RunDirectory, read_records, summarise
from dive_fast.evaluation.records import Form, check_detection

NAMES = ("one", "two", "three")


def classification(**values: object) -> dict:
    posterior = torch.tensor([0.2, 0.7, 0.1]).log()
    nothing = torch.full((3,), math.nan)
    found = Classification(
        "two", 1, posterior, torch.rand(3), torch.tensor([4, 4, 2]),
        torch.tensor([False, False, True]), nothing, NAMES, 10, 0.5,
    ).to_dict()  # fmt: skip
    return {"id": "a", "truth": 2, **found, **values}


def detection(**values: object) -> dict:
    found = Detections(
        [[0, 1, 5, 6.5], [2, 2, 3, 3]], [0, 2], [0.9, 0.5], NAMES,
        [[0.9, 0.1, 0], [0.2, 0.2, 0.5]], 10, 0.5,
    ).to_dict()  # fmt: skip
    return {"id": "a", **found, **values}


def without(record: dict, name: str) -> dict:
    return {key: value for key, value in record.items() if key != name}


def forms(kind: str) -> list[Form]:
    """From what knows the least to what knows the most."""
    truths = {"a": 2, "b": 0} if kind == "classification" else None
    return [Form(), Form(kind), Form(kind, NAMES, truths)]


@pytest.mark.parametrize("kind", ["classification", "detection"])
def test_what_is_written_is_right(kind: str) -> None:
    record = classification() if kind == "classification" else detection()
    failure = {"id": "b", "truth": 0, "error": "expected an image, got none."}
    for form in forms(kind):
        assert form.wrong(record) is None and form.wrong(failure) is None
        assert form.wrong(json.loads(json.dumps(record))) is None


# No field may be one of these.
BAD = (None, "x", {"x": 1}, math.nan, -(10**400), [[]], -1, True)


@pytest.mark.parametrize("name", sorted(set(classification()) - {"id"}))
def test_a_field_of_a_classification_is_missing(name: str) -> None:
    wrong = Form("classification", NAMES, {"a": 2}).wrong(without(classification(), name))
    assert wrong == f"expected a record with '{name}', got one without"
    for value in BAD:
        if (name, value) != ("label", "x"):  # known to be wrong where the names are known
            for form in forms("classification"):
                assert form.wrong(classification(**{name: value})) is not None, (value, form)


@pytest.mark.parametrize("name", sorted(set(detection()) - {"id"}))
def test_a_field_of_a_detection_is_missing(name: str) -> None:
    if name != "class_probabilities":  # not known of every detector
        wrong = Form("detection").wrong(without(detection(), name))
        assert wrong == f"expected a record with '{name}', got one without"
    for value in BAD:
        for form in forms("detection"):
            assert form.wrong(detection(**{name: value})) is not None, (value, form)


TOP = [{"label": "two", "index": 1, "score": 0.7}]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"index": 3}, r"'index' to be a row in \[0, 3\), got 3"),
        ({"index": 0}, "'top' to begin with row 0, the answer, got 1"),
        ({"index": 1.0}, "'index' to be a row"),
        ({"label": "one"}, "row 1 to have the label 'two', got 'one'"),
        ({"truth": 1}, "'truth' to be 2 as in the data, got 1"),
        ({"truth": 7}, "'truth' to be a row"),
        ({"probability": 1.5}, r"'probability' to be a number in \[0, 1\], got 1.5"),
        ({"seconds": -0.5}, "'seconds' to be a number of at least 0"),
        ({"evaluations": 2.5}, "'evaluations' to be a whole number"),
        ({"losses": [1.0, 2.0]}, "'losses' to have 3 items, got 2"),
        ({"n_probes": [1, 2, 3, 4]}, "'n_probes' to have 3 items, got 4"),
        ({"losses": [1.0, "2", 0]}, "'losses' to be a list .* got '2' at position 1"),
        ({"losses": [1.0, math.inf, 0]}, "got inf at position 1"),
        ({"eliminated": [3]}, r"'eliminated' to be a list of rows in \[0, 3\), got 3"),
        ({"top": [{"label": "two", "index": 1}]}, "'top' to be a list of"),
        ({"top": [*TOP, {"label": "four", "index": 3, "score": 0}]}, r"'top' to hold rows in"),
        ({"top": [*TOP, {"label": "one", "index": 2, "score": 0}]}, "row 2 to have the label"),
        ({"error": None}, "'error' to be a text, got None"),
        ({"error": "bad", "truth": 1}, "'truth' to be 2"),
    ],
    ids=str,
)
def test_a_classification_that_does_not_agree(values: dict, message: str) -> None:
    wrong = Form("classification", NAMES, {"a": 2}).wrong(classification(**values))
    assert wrong is not None and re.search(message, wrong), wrong


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"labels": ["one"]}, "'labels' to have 2 items, got 1"),
        ({"confidences": [0.5] * 3}, "'confidences' to have 2 items, got 3"),
        ({"confidences": [0.5, 1.5]}, "got 1.5 at position 1"),
        ({"indices": [0, 3]}, r"rows in \[0, 3\), got 3 at position 1"),
        ({"labels": ["one", "two"]}, "row 2 to have the label 'three', got 'two'"),
        ({"boxes": [[0, 1, 5, 6], [2, 2, 3]]}, "at position 1"),
        ({"boxes": [[0, 1, 5, 6], [2, 2, 2, 3]]}, r"got \[2, 2, 2, 3\] at position 1"),
        ({"boxes": [[0, 1, 5, math.nan], [2, 2, 3, 3]]}, "at position 0"),
        ({"class_probabilities": [[0.5, 0.5, 0]]}, "to have 2 items, got 1"),
        ({"class_probabilities": [[0.5, 0.5], [0.5, 0.5]]}, "the same classes for all"),
        ({"class_probabilities": [[0.9, 0.5, 0]] * 2}, "sum to at most 1"),
        ({"drawn": 3}, "'drawn' to be a text"),
        ({"error": 3}, "'error' to be a text"),
    ],
    ids=str,
)
def test_a_detection_that_does_not_agree(values: dict, message: str) -> None:
    wrong = Form("detection", NAMES).wrong(detection(**values))
    assert wrong is not None and re.search(message, wrong), wrong
    with pytest.raises(RunError, match="the record 'a': expected"):
        check_detection(detection(**values), NAMES)


def write(path: Path, form: Form | None, *records: dict) -> None:
    RunDirectory.open(path, {}, form=form).close()
    (path / "results.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.mark.parametrize("known", [True, False], ids=["known", "older"])
def test_reading_says_file_and_line(known: bool, tmp_path: Path) -> None:
    form = Form("classification") if known else None
    write(tmp_path, form, classification(), classification(id="b", index="x"))
    with pytest.raises(RunError, match=r"results\.jsonl: line 2: expected 'index' to be .*'x'\."):
        read_records(tmp_path)
    (tmp_path / "results.jsonl").write_text('{"id": "b", "error": 3}\n')
    with pytest.raises(RunError, match=r"line 1: expected 'error' to be a text"):
        read_records(tmp_path)


def test_records_of_the_other_kind(tmp_path: Path) -> None:
    write(tmp_path / "a", Form("classification"), classification(), detection(id="b"))
    write(tmp_path / "b", Form("detection"), detection(), classification(id="b"))
    with pytest.raises(RunError, match="line 2: expected a record with 'label', got one without"):
        read_records(tmp_path / "a")
    with pytest.raises(RunError, match="line 2: expected a record with 'boxes', got one without"):
        read_records(tmp_path / "b")
    with pytest.raises(RunError, match="are of a detection there and of a classification here"):
        RunDirectory.open(tmp_path / "b", {}, form=Form("classification"))
    content = json.loads((tmp_path / "a" / "run.json").read_text()) | {"records": "poem"}
    (tmp_path / "a" / "run.json").write_text(json.dumps(content))
    with pytest.raises(
        RunError, match="'records' to be classification or detection or choice or task"
    ):
        read_records(tmp_path / "a")


def test_no_wrong_record_is_written(tmp_path: Path) -> None:
    with RunDirectory.open(tmp_path, {}, form=Form("classification", NAMES)) as run:
        with pytest.raises(RunError, match="the record 'a': expected 'probability'"):
            run.append(classification(probability=math.nan))
        run.append(classification(losses=np.array([1, np.nan, np.inf])))
    assert [record["losses"] for record in lines(tmp_path)] == [[1.0, None, None]]
    assert read_records(tmp_path).keys() == {"a"}


@pytest.mark.parametrize("name", ["truth", "index", "probability", "evaluations", "seconds"])
def test_figures_of_records_that_lack_something(name: str) -> None:
    with pytest.raises(RunError, match=f"the record 'a': expected a record with '{name}'"):
        summarise([classification(id="b"), without(classification(), name)])
    with pytest.raises(RunError, match=f"the record 'a': expected '{name}' to be"):
        summarise([classification(**{name: "x"})])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, dit_dir: Path) -> tuple[Path, tuple]:
    """A finished evaluation of four images, and the command that made it."""
    from dive_fast.cli import main

    folder = tmp_path_factory.mktemp("records")
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 8), dtype=np.uint8)
    np.savez(folder / "data.npz", images=pixels, labels=np.arange(4))
    command = ("evaluate", "--model", dit_dir, "--data", folder / "data.npz", "--probes", 2)
    assert main([str(word) for word in (*command, "--out", folder / "run")]) == 0
    return folder / "run", command


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"truth": 0}, "line 2: expected 'truth' to be . as in the data, got 0"),
        ({"index": 99}, r"line 2: expected 'index' to be a row in \[0, 4\), got 99"),
        ({"seconds": "long"}, "line 2: expected 'seconds' to be a number"),
        ({"label": "none"}, "line 2: expected row . to have the label"),
        ({"error": []}, "line 2: expected 'error' to be a text"),
    ],
    ids=str,
)
def test_on_the_command_line(run, values: dict, message: str, tmp_path: Path, capsys) -> None:
    done, command = run
    shutil.copytree(done, tmp_path / "run")
    records = sorted(lines(done), key=lambda record: record["truth"])
    records[1] |= values
    content = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "run" / "results.jsonl").write_text(content)
    said = call(capsys, *command, "--out", tmp_path / "run")
    assert_refused(said, message)
    assert said.out == ""
    assert (tmp_path / "run" / "results.jsonl").read_text() == content
