"""The runner of classify, detect and evaluate: what is left to do, errors, and what is recorded."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from dive_fast import Classification, Detections
from dive_fast.errors import ImageError, ModelError, RunError
from dive_fast.evaluation import RunDirectory, read_records
from dive_fast.evaluation.run import Source, run_over


@dataclass(frozen=True)
class Doubled:
    """An answer."""

    number: int

    def to_dict(self) -> dict:
        return {"doubled": 2 * self.number}


def unreadable() -> int:
    raise ImageError("expected a number, got none.")


def backwards(pairs: Iterable[tuple[str, int]]) -> Iterator[tuple[str, Doubled]]:
    """Answers two at a time, the last one first."""
    waiting = []
    for pair in pairs:
        waiting.append(pair)
        if len(waiting) == 2:
            yield from ((key, Doubled(n)) for key, n in reversed(waiting))
            waiting = []
    yield from ((key, Doubled(n)) for key, n in waiting)


def source(number: int) -> Source:
    return Source(str(number), lambda: number, {"truth": -number})


def test_every_source_gets_a_record(tmp_path: Path) -> None:
    with RunDirectory.open(tmp_path, {}) as run:
        run_over([source(n) for n in (3, 1, 2)], backwards, run)
    records = read_records(tmp_path)
    assert list(records) == ["1", "3", "2"]  # as they came
    assert records["3"] == {"id": "3", "truth": -3, "doubled": 6}


def test_what_is_finished_is_not_read_again(tmp_path: Path) -> None:
    with RunDirectory.open(tmp_path, {}) as run:
        run_over([source(1)], backwards, run)
        run_over([Source("1", unreadable), source(2)], backwards, run)
    assert [record["doubled"] for record in read_records(tmp_path).values()] == [2, 4]


def test_errors_are_recorded_and_told_once(tmp_path: Path, caplog) -> None:
    sources = [
        Source("7", unreadable, {"truth": 1}, name="seven.png"),
        Source("8", unreadable),  # told by somebody else
        source(2),
    ]
    with RunDirectory.open(tmp_path, {}) as run:
        run_over(sources, backwards, run)
    assert caplog.messages == ["seven.png: expected a number, got none."]
    records = read_records(tmp_path)
    assert records["7"] == {"id": "7", "truth": 1, "error": "expected a number, got none."}
    assert records["2"]["doubled"] == 4
    # Mended: it is read again.
    with RunDirectory.open(tmp_path, {}) as run:
        run_over([Source("7", lambda: 7)], backwards, run)
    assert read_records(tmp_path)["7"] == {"id": "7", "doubled": 14}


def test_other_errors_stop_the_run(tmp_path: Path) -> None:
    def broken() -> int:
        raise ModelError("no model.")

    with RunDirectory.open(tmp_path, {}) as run, pytest.raises(ModelError):
        run_over([source(1), source(2), Source("3", broken), source(4)], backwards, run)
    assert list(read_records(tmp_path)) == ["2", "1"]


def test_a_record_of_ones_own(tmp_path: Path) -> None:
    def record(key: str, answer: Doubled, number: int) -> dict:
        return {"key": key, "answer": answer.number, "image": number}

    with RunDirectory.open(tmp_path, {}) as run:
        run_over([source(5)], backwards, run, record=record)
    assert read_records(tmp_path)["5"] == {
        "id": "5", "truth": -5, "key": "5", "answer": 5, "image": 5,
    }  # fmt: skip


def test_the_page_lists_every_field() -> None:
    page = (Path(__file__).parents[1] / "docs" / "records.md").read_text(encoding="utf-8")
    first_cells = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    listed = {name for cell in first_cells for name in re.findall(r"`(\w+)`", cell)}
    c = torch.zeros(2)
    found = Classification("a", 0, c, c, c + 1, c > 0, c, ("a", "b"), 1, 0.5).to_dict()
    found |= Detections([], [], [], ("a", "b"), [], reason="because").to_dict()
    of_runs = {"id", "truth", "groups", "error", "drawn", "log_likelihood", "log_likelihood_error"}
    assert listed == {*of_runs, *found}


@pytest.mark.parametrize("missing", ["run.json", "results.jsonl"])
def test_reading_what_is_not_there(missing: str, tmp_path: Path) -> None:
    RunDirectory.open(tmp_path, {}).close()
    (tmp_path / missing).unlink()
    with pytest.raises(RunError, match=f"{missing}: cannot be read \\(No such file"):
        read_records(tmp_path)
