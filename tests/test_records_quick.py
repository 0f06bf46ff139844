"""Long lists of a record are checked at once, and left out unread where no figure needs them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from report_runs import ANSWERS, NAMES, answer, write_run

from dive_fast.errors import RunError
from dive_fast.evaluation.records import NOT_IN_FIGURES, Form
from dive_fast.evaluation.runfiles import each_result
from dive_fast.evaluation.table import RunTable


def wrong(**fields: object) -> str | None:
    return Form("classification").wrong({**answer("a", 0, [0.6, 0.4], NAMES), **fields})


@pytest.mark.parametrize(
    "values",
    [[1.5, None], [1, 2.5], [0.0, -3], [None, None], [1e308, 1e308], [-1e308, -1e308], [2**70, 0]],
)
def test_numbers_that_are_right(values: list) -> None:
    """Also such whose sum is no number."""
    assert wrong(losses=values) is None


@pytest.mark.parametrize(
    "values",
    [[1.5, True], [float("nan"), 1.0], [1.0, float("inf")], [1.0, "2"], [10**400, 1.0], [[1.0], 1]],
)
def test_numbers_that_are_wrong(values: list) -> None:
    assert "expected 'losses' to be a list of numbers or null, got" in wrong(losses=values)


@pytest.mark.parametrize(("values", "ok"), [([0, 5], True), ([0, -1], False), ([1, True], False),
                                            ([1, 2.0], False), ([1, None], False)])  # fmt: skip
def test_whole_numbers(values: list, ok: bool) -> None:
    assert (wrong(n_probes=values) is None) == ok


class TestLeftOut:
    def test_a_table_is_the_same(self, tmp_path: Path) -> None:
        """Whatever lies in the lists that it does not need."""
        one = RunTable.read(write_run(tmp_path / "a"))
        others = [dict(r) for r in ANSWERS]
        for record in others[:4]:
            record.update(losses=[None] * 3, n_probes=[0] * 3, log_odds_bound=[-1.5] * 3)
        other = RunTable.read(write_run(tmp_path / "b", others))
        assert one.ids == other.ids and one.index.tolist() == other.index.tolist()
        assert one.truth_probability.tolist() == other.truth_probability.tolist()

    @pytest.mark.parametrize(
        ("text", "kept"),
        [
            ('{"id": "a", "losses": [1, null], "n_probes": [], "seconds": 2}', {"id", "seconds"}),
            ('{"losses": [1.5], "id": "a", "log_odds_bound": [1]}', {"id", "log_odds_bound"}),
            ('{"id":"a","losses":[1],"seconds":2}', {"id", "losses", "seconds"}),
            ('{"id": "a", "losses": ["x], "], "seconds": 2}', {"id", "losses", "seconds"}),
            ('{"id": "a", "losses": [[1], [2]], "seconds": 2}', {"id", "losses", "seconds"}),
            (json.dumps({"id": '"losses": [1], ', "seconds": 2}), {"id", "seconds"}),
        ],
    )
    def test_lines(self, tmp_path: Path, text: str, kept: set[str]) -> None:
        path = tmp_path / "results.jsonl"
        path.write_text(f"{text}\n")
        ((start, end, record),) = each_result(path, None, NOT_IN_FIGURES)
        assert set(record) == kept and (start, end) == (0, len(text) + 1)
        assert all(record[key] == json.loads(text)[key] for key in kept)

    def test_a_line_that_lost_a_bracket(self, tmp_path: Path) -> None:
        """Its other fields are not taken for what is left out."""
        run = write_run(tmp_path / "run")
        results = run / "results.jsonl"
        lines = results.read_text().replace('"losses": [1.0, 1.0, 1.0], ', '"losses": [1.0, ', 1)
        results.write_text(lines)
        with pytest.raises(RunError, match="damaged line 1"):
            RunTable.read(run)

    def test_the_answer_is_checked(self, tmp_path: Path) -> None:
        run = write_run(tmp_path / "run")
        results = run / "results.jsonl"
        results.write_text(results.read_text().replace('"index": 0', '"index": 7', 1))
        with pytest.raises(RunError, match="line 1"):
            RunTable.read(run)
