"""A run directory: what is created, what is gone on with, and what is appended."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from rundir_inputs import CONFIG, lines, record

from dive_fast.errors import RunError
from dive_fast.evaluation.rundir import RunDirectory, read_records


class TestOpen:
    def test_new(self, tmp_path: Path) -> None:
        path = tmp_path / "some" / "run"
        with RunDirectory.open(str(path), CONFIG, {"torch": "2"}) as run:
            assert dict(run.done()) == {} and run.path == path
        stored = json.loads((path / "run.json").read_text())
        assert stored["config"] == {"schema": 1, **json.loads(json.dumps(CONFIG))}
        assert stored["environment"] == {"torch": "2"}
        assert lines(path) == []
        assert {p.name for p in path.iterdir()} == {"run.json", "results.jsonl", ".lock"}

    def test_resume(self, tmp_path: Path) -> None:
        with RunDirectory.open(tmp_path, CONFIG, {"host": "a"}) as run:
            run.append(record(0))
        with RunDirectory.open(tmp_path, CONFIG, {"host": "b"}) as run:
            assert dict(run.done()) == {"image-0": record(0)}
            run.append(record(1))
        assert lines(tmp_path) == [record(0), record(1)]
        assert json.loads((tmp_path / "run.json").read_text())["environment"] == {"host": "a"}

    @pytest.mark.parametrize(
        "change, message",
        [
            ({"seed": 1}, "seed is 0 there and 1 here"),
            ({"seed": False}, "seed is 0 there and False here"),
            ({"model": "other"}, "model is 'digits' there and 'other' here"),
            ({"limit": 5}, "limit is not set there and 5 here"),
            ({"invert": {"lr": 0.1, "stages": [1, 2]}}, r"invert\.lr is 0\.01 there and 0\.1 here"),
            ({"invert": {"stages": (1, 2)}}, r"invert\.lr is 0\.01 there and not set here"),
            ({"invert": {"lr": 0.01, "stages": (1, 3)}}, r"invert\.stages is \[1, 2\] there"),
            ({"invert": None}, "invert is {.*} there and None here"),
        ],
    )
    def test_another_configuration(self, tmp_path: Path, change: dict, message: str) -> None:
        with RunDirectory.open(tmp_path, CONFIG) as run:
            run.append(record(0))
        with pytest.raises(RunError, match=f"{message}.*choose another --out"):
            RunDirectory.open(tmp_path, CONFIG | change)
        with RunDirectory.open(tmp_path, CONFIG) as run:  # neither changed nor left locked
            assert list(run.done()) == ["image-0"]

    @pytest.mark.parametrize(("schema", "got"), [({}, "None"), ({"schema": 2}, "2")])
    def test_another_schema(self, tmp_path: Path, schema: dict, got: str) -> None:
        """Neither gone on with nor read: the same field may mean something else."""
        config = json.loads(json.dumps(CONFIG)) | schema
        (tmp_path / "run.json").write_text(json.dumps({"config": config, "environment": {}}))
        (tmp_path / "results.jsonl").write_text('{"id": "a", "label": 3, "prediction": 3}\n')
        message = f"expected a run with records of schema 1, got schema {got}; compute it anew"
        with pytest.raises(RunError, match=message):
            RunDirectory.open(tmp_path, CONFIG)
        with pytest.raises(RunError, match=message):
            read_records(tmp_path)

    def test_foreign_content(self, tmp_path: Path) -> None:
        (tmp_path / "thesis.tex").write_text("precious")
        with pytest.raises(RunError, match=r"got one with 'thesis\.tex'; choose another --out"):
            RunDirectory.open(tmp_path, CONFIG)
        assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]

    def test_results_without_run_json(self, tmp_path: Path) -> None:
        (tmp_path / "results.jsonl").write_text('{"id": "a"}\n')
        with pytest.raises(RunError, match="results.jsonl"):
            RunDirectory.open(tmp_path, CONFIG)

    def test_killed_before_run_json(self, tmp_path: Path) -> None:
        (tmp_path / ".lock").touch()
        (tmp_path / ".run.json.x1y2.tmp").write_text('{"conf')
        with RunDirectory.open(tmp_path, CONFIG) as run:
            run.append(record(0))
        assert not list(tmp_path.glob("*.tmp"))

    def test_path_is_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(RunError, match="expected a directory, got a file"):
            RunDirectory.open(tmp_path / "file", CONFIG)
        with pytest.raises(RunError, match="cannot be opened"):
            RunDirectory.open(tmp_path / "file" / "run", CONFIG)

    def test_name_with_nul(self) -> None:
        with pytest.raises(RunError, match="cannot be opened"):
            RunDirectory.open("a\0b", CONFIG)

    @pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs POSIX permissions")
    def test_unwritable(self, tmp_path: Path) -> None:
        if os.geteuid() == 0:
            pytest.skip("root may write everywhere")
        tmp_path.chmod(0o500)
        with pytest.raises(RunError, match="Permission denied"):
            RunDirectory.open(tmp_path / "run", CONFIG)

    @pytest.mark.parametrize("path", [None, 3, ["run"], b"run"])
    def test_no_path(self, path: object) -> None:
        with pytest.raises(RunError, match="expected a run directory, got"):
            RunDirectory.open(path, CONFIG)
        with pytest.raises(RunError, match="expected a run directory, got"):
            read_records(path)

    def test_config_that_is_no_dictionary(self, tmp_path: Path) -> None:
        for arguments in (([1],), (CONFIG, [1])):
            with pytest.raises(RunError, match="expected config and environment as dictionaries"):
                RunDirectory.open(tmp_path / "run", *arguments)
        assert not (tmp_path / "run").exists()

    def test_config_that_is_not_json(self, tmp_path: Path) -> None:
        with pytest.raises(RunError, match="for JSON, got set"):
            RunDirectory.open(tmp_path / "run", {"seeds": {1, 2}})
        assert not (tmp_path / "run").exists()


class TestOtherVersions:
    """A run goes on under other versions, says so, and remembers it."""

    def begin(self, path: Path, environment: object) -> None:
        RunDirectory.open(path, CONFIG, {}).close()
        content = json.loads((path / "run.json").read_text()) | {"environment": environment}
        (path / "run.json").write_text(json.dumps(content))

    def resume(self, path: Path, **environment: object) -> dict:
        RunDirectory.open(path, CONFIG, environment).close()
        return json.loads((path / "run.json").read_text())

    def test_warned_of(self, tmp_path: Path, caplog) -> None:
        begun = {"dive_fast": "0.1", "torch": "2.12.0", "python": "3.11"}
        self.begin(tmp_path, begun)
        here = {"dive_fast": "0.1", "torch": "2.13.0", "python": "3.12", "pillow": "11"}
        content = self.resume(tmp_path, **here)
        sentence = (
            f"{tmp_path} was begun with torch 2.12.0 and is gone on with torch 2.13.0: answers "
            "may differ."
        )
        assert caplog.messages == [sentence]
        assert content["environment"] == begun and content["resumed"] == [here]
        assert content["config"] == {"schema": 1, **json.loads(json.dumps(CONFIG))}
        # The same once more: warned of, and not recorded twice.
        assert self.resume(tmp_path, **here) == content
        assert caplog.messages == [sentence] * 2

    def test_several(self, tmp_path: Path, caplog) -> None:
        self.begin(tmp_path, {"dive_fast": "1", "torch": "2", "diffusers": "3"})
        self.resume(tmp_path, dive_fast="2", torch="2", diffusers="4")
        message = "begun with dive_fast 1 and diffusers 3 and is gone on with dive_fast 2 and diff"
        assert len(caplog.messages) == 1 and message in caplog.messages[0]

    def test_back_again(self, tmp_path: Path, caplog) -> None:
        """Some of the records are of the other version."""
        self.begin(tmp_path, {"torch": "2"})
        self.resume(tmp_path, torch="3")
        content = self.resume(tmp_path, torch="2")
        assert content["resumed"] == [{"torch": "3"}, {"torch": "2"}]
        assert "gone on with torch 3 and is gone on with torch 2" in caplog.messages[1]

    def test_what_changes_no_answer(self, tmp_path: Path, caplog) -> None:
        self.begin(tmp_path, {"torch": "2", "commit": "a", "threads": 2})
        content = self.resume(tmp_path, torch="2", commit="b", threads=1)
        assert caplog.messages == []
        assert content["resumed"] == [{"torch": "2", "commit": "b", "threads": 1}]

    @pytest.mark.parametrize(
        "environment", [None, [], "torch", 3, {}, {"torch": 2}, {"torch": None}, {"torch": ["2"]}]
    )
    def test_damaged(self, tmp_path: Path, environment: object, caplog) -> None:
        self.begin(tmp_path, environment)
        content = json.loads((tmp_path / "run.json").read_text()) | {"resumed": "often"}
        (tmp_path / "run.json").write_text(json.dumps(content))
        content = self.resume(tmp_path, torch="2")
        assert caplog.messages == [] and content["resumed"] == [{"torch": "2"}]
        assert content["environment"] == environment


class TestAppend:
    def test_values_are_strict_json(self, tmp_path: Path) -> None:
        values = {
            "nan": float("nan"),
            "losses": np.array([[1.5, np.inf]], np.float32),
            "tensor": torch.tensor([2.0, -torch.inf]),
            "index": np.int64(3),
            "ok": np.bool_(True),
            "pair": (1, None),
            "path": Path("a") / "b",
            "nested": {"x": [np.float32(0.5), np.float64("nan")]},
        }
        with RunDirectory.open(tmp_path, CONFIG) as run:
            run.append({"id": "ä\n\udcff"} | values)
            expected = dict(run.done())
        content = (tmp_path / "results.jsonl").read_text()
        stored = json.loads(content, parse_constant=lambda name: pytest.fail(name))
        assert stored == {
            "id": "ä\n\udcff",
            "nan": None,
            "losses": [[1.5, None]],
            "tensor": [2.0, None],
            "index": 3,
            "ok": True,
            "pair": [1, None],
            "path": os.path.join("a", "b"),
            "nested": {"x": [0.5, None]},
        }
        with RunDirectory.open(tmp_path, CONFIG) as run:
            assert dict(run.done()) == expected == {stored["id"]: stored}

    @pytest.mark.parametrize("bad", [{}, {"id": 3}, {"id": None}])
    def test_record_without_id(self, tmp_path: Path, bad: dict) -> None:
        with RunDirectory.open(tmp_path, CONFIG) as run:
            with pytest.raises(RunError, match="string 'id'"):
                run.append(bad)
        assert lines(tmp_path) == []

    def test_record_that_is_not_json(self, tmp_path: Path) -> None:
        with RunDirectory.open(tmp_path, CONFIG) as run:
            with pytest.raises(RunError, match="for JSON, got object"):
                run.append(record(0, value=object()))
            run.append(record(0))
        assert lines(tmp_path) == [record(0)]

    def test_nothing_is_repeated(self, tmp_path: Path) -> None:
        with RunDirectory.open(tmp_path, CONFIG) as run:
            run.append(record(0))
            with pytest.raises(RunError, match="'image-0' is already there"):
                run.append(record(0))
        assert lines(tmp_path) == [record(0)]

    def test_errors_may_be_mended(self, tmp_path: Path) -> None:
        """The same error is written once; what comes after an error takes its place."""
        broken, other = {"id": "image-0", "error": "lost"}, {"id": "image-0", "error": "damaged"}
        with RunDirectory.open(tmp_path, CONFIG) as run:
            run.append(broken)
            run.append(broken)
            run.append(other)
            assert not run.finished("image-0") and not run.finished("image-1")
        with RunDirectory.open(tmp_path, CONFIG) as run:
            assert dict(run.done()) == {"image-0": other}
            run.append(record(0))
            assert run.finished("image-0")
        assert lines(tmp_path) == [broken, other, record(0)]
        with RunDirectory.open(tmp_path, CONFIG) as run:
            assert dict(run.done()) == {"image-0": record(0)}

    def test_closed(self, tmp_path: Path) -> None:
        run = RunDirectory.open(tmp_path, CONFIG)
        run.close()
        run.close()
        with pytest.raises(RunError, match="closed"):
            run.append(record(0))

    def test_visible_to_others_at_once(self, tmp_path: Path) -> None:
        with RunDirectory.open(tmp_path, CONFIG) as run:
            run.append(record(0))
            assert lines(tmp_path) == [record(0)]


class TestLock:
    def test_second_writer_is_refused(self, tmp_path: Path) -> None:
        pytest.importorskip("fcntl")
        with RunDirectory.open(tmp_path, CONFIG) as run:
            with pytest.raises(RunError, match="another process is writing"):
                RunDirectory.open(tmp_path, CONFIG)
            run.append(record(0))
        with RunDirectory.open(tmp_path, CONFIG) as run:
            assert list(run.done()) == ["image-0"]
