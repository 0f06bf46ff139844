"""A run as columns: what each holds, and what a run may lack."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from run_records import record

from dive_fast.errors import RunError
from dive_fast.evaluation import RunDirectory
from dive_fast.evaluation.table import RunTable, table_of

RECORDS = [
    record("a", 0, [0.7, 0.2, 0.1], groups={"eye": "left", "age": 3}),
    record("b", 2, [0.5, 0.3, 0.2]),
    {"id": "c", "truth": 1, "error": "no image"},
    record("d", 1, [0.6, 0.0, 0.4], evaluations=30),
]


class TestColumns:
    def test_numbers(self) -> None:
        table = table_of(RECORDS)
        assert table.ids == ["a", "b", "d"] and len(table) == 3
        assert table.truth.tolist() == [0, 2, 1] and table.index.tolist() == [0, 0, 0]
        assert table.correct.tolist() == [True, False, False]
        np.testing.assert_allclose(table.probability, [0.7, 0.5, 0.6], rtol=1e-6)
        np.testing.assert_allclose(table.truth_probability, [0.7, 0.2, 0], rtol=1e-6)
        assert table.truth_rank.tolist() == [1, 3, 3]
        assert table.top.tolist() == [[0, 1, 2, -1, -1], [0, 1, 2, -1, -1], [0, 2, 1, -1, -1]]
        assert table.evaluations.tolist() == [10, 10, 30] and table.seconds.sum() == 1.5
        assert table.groups == {"eye": ["left", "", ""], "age": ["3", "", ""]}
        assert table.failed == {"c": "no image"}
        assert table.n_classes == 3 and table.names == ("c0", "c1", "c2")

    def test_posteriors(self) -> None:
        with table_of(RECORDS).posteriors() as found:
            expected = [[0.7, 0.2, 0.1], [0.5, 0.3, 0.2], [0.6, 0, 0.4]]
            np.testing.assert_allclose(found, expected, rtol=1e-6)

    def test_rank_of_a_probability_below_float32(self) -> None:
        """exp(-200) is 0 in float32, and still more than exp(-300)."""
        one = record("a", 1, [0.9, 0.1, 0.1, 0.1])
        one["log_posterior"] = [0.0, -200.0, -300.0, None]
        table = table_of([one])
        assert table.truth_rank.tolist() == [2] and table.truth_probability.tolist() == [0]

    def test_an_answer_that_is_not_the_most_probable(self) -> None:
        """A strategy's answer stands first, whatever its other classes' estimates say."""
        one = record("a", 1, [0.3, 0.5, 0.2], index=2, probability=0.2)
        assert table_of([one]).truth_rank.tolist() == [2]

    def test_nothing(self) -> None:
        table = table_of([])
        assert len(table) == 0 and table.top.shape == (0, 5) and table.n_classes == 0
        with table.posteriors() as found:
            assert found is None

    def test_figures_alone(self) -> None:
        few = {"truth": 0, "index": 1, "probability": 0.5, "evaluations": 1, "seconds": 0.0}
        table = table_of([{"id": "a", **few}, {"id": "b", **few, "truth": 4}])
        assert table.correct.tolist() == [False, False] and table.n_classes == 5
        with table.posteriors() as found:
            assert found is None

    def test_other_numbers_of_classes(self) -> None:
        with pytest.raises(RunError, match="the record 'b': expected 'log_posterior' of 2 classes"):
            table_of([record("a", 0, [0.5, 0.5]), record("b", 0, [0.5, 0.3, 0.2])])


class TestRead:
    def test_a_run(self, tmp_path: Path) -> None:
        facts = {"names": ["x", "y", "z"], "data": "photos"}
        with RunDirectory.open(tmp_path, {"seed": 1}, {"torch": "2"}, facts=facts) as run:
            for one in RECORDS:
                run.append(one)
            run.append({**record("c", 1, [0.1, 0.8, 0.1])})  # mended
        table = RunTable.read(tmp_path)
        assert table.ids == ["a", "b", "d", "c"] and not table.failed
        assert table.names == ("x", "y", "z") and table.data == "photos"
        assert table.config["seed"] == 1 and table.environment == {"torch": "2"}

    def test_the_last_facts_are_kept_and_not_compared(self, tmp_path: Path) -> None:
        RunDirectory.open(tmp_path, {}, facts={"data": "there", "names": ["x"]}).close()
        RunDirectory.open(tmp_path, {}, facts={"data": "here", "config": {"no": 1}}).close()
        assert RunTable.read(tmp_path).data == "here"
        assert RunTable.read(tmp_path).config == {"schema": 1}

    @pytest.mark.parametrize("path", [None, 3])
    def test_no_path(self, path: object) -> None:
        with pytest.raises(RunError, match="expected a run directory, got"):
            RunTable.read(path)

    def test_no_run(self, tmp_path: Path) -> None:
        with pytest.raises(RunError, match="cannot be read"):
            RunTable.read(tmp_path)

    def test_a_detector(self, tmp_path: Path) -> None:
        from dive_fast.evaluation.records import Form

        RunDirectory.open(tmp_path, {}, form=Form("detection")).close()
        with pytest.raises(RunError, match="expected a run of a classifier, got one of a detector"):
            RunTable.read(tmp_path)

    def test_without_truth(self, tmp_path: Path) -> None:
        with RunDirectory.open(tmp_path, {}) as run:
            run.append({k: v for k, v in RECORDS[0].items() if k != "truth"})
        with pytest.raises(RunError, match="the record 'a': expected a record with 'truth'"):
            RunTable.read(tmp_path)
