"""What a report refuses, and its command."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from command import assert_refused, call
from html_tree import parse
from report_runs import ANSWERS, write_folder, write_run

pytest.importorskip("jinja2", reason="reports need jinja2")
pytest.importorskip("matplotlib", reason="reports need matplotlib")
pytest.importorskip("sklearn", reason="reports need scikit-learn")

from dive_fast.errors import DataError, DiveFastError, RunError  # noqa: E402
from dive_fast.report import write_report  # noqa: E402


class TestRefusals:
    @pytest.mark.parametrize(
        ("runs", "message"),
        [
            ([], "expected at least one run directory, got none"),
            (["nowhere"], "nowhere: expected a run directory, got nothing there"),
            (["run/run.json"], "expected a run directory, got a file"),
            (["run", "./run"], "expected each run once, got it twice"),
            (["empty"], "expected a run with answers, got one without"),
            (["failed"], r"got one without \(1 images failed\)"),
            (["folder"], "cannot be read"),
            ([3], "expected a run directory, got 3"),
            (3, "expected run directories, got 3"),
        ],
    )
    def test_runs(self, tmp_path: Path, monkeypatch, runs: list, message: str) -> None:
        monkeypatch.chdir(tmp_path)
        write_run(tmp_path / "run")
        write_run(tmp_path / "empty", [])
        write_run(tmp_path / "failed", ANSWERS[-1:])
        (tmp_path / "folder").mkdir()
        with pytest.raises(RunError, match=message):
            write_report(runs, "page.html")
        assert not (tmp_path / "page.html").exists()

    @pytest.mark.parametrize(
        ("out", "message"),
        [
            ("folder.html", "expected a file to write, got a directory"),
            ("run/results.jsonl", "expected a name that ends with .html, got another"),
            ("there/is/none.html", "expected a directory to write into"),
            (None, "expected a file to write, got None"),
        ],
    )
    def test_out(self, tmp_path: Path, monkeypatch, out: object, message: str) -> None:
        monkeypatch.chdir(tmp_path)
        run = write_run(tmp_path / "run")
        before = (run / "results.jsonl").read_bytes()
        (tmp_path / "folder.html").mkdir()
        with pytest.raises(RunError, match=message):
            write_report(run, out)
        assert (run / "results.jsonl").read_bytes() == before

    @pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
    def test_a_folder_that_may_not_be_written(self, tmp_path: Path) -> None:
        run = write_run(tmp_path / "run")
        tmp_path.chmod(0o500)
        with pytest.raises(RunError, match="cannot be written"):
            write_report(run, tmp_path / "page.html")

    def test_a_pipe(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "page.html")
        with pytest.raises(RunError, match="expected a regular file"):
            write_report(write_run(tmp_path / "run"), tmp_path / "page.html")

    @pytest.mark.parametrize("name", ["data", "images"])
    def test_data_of_another_type(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(DataError, match=f"expected {name} as a text or a path, got 3"):
            write_report(write_run(tmp_path / "run"), tmp_path / "page.html", **{name: 3})

    @pytest.mark.parametrize("pictures", [-1, 1.5, True])
    def test_numbers_of_pictures(self, tmp_path: Path, pictures: object) -> None:
        with pytest.raises(DiveFastError, match="pictures must be"):
            write_report(write_run(tmp_path / "run"), tmp_path / "page.html", pictures=pictures)

    @pytest.mark.parametrize("module", ["jinja2", "matplotlib", "sklearn"])
    def test_a_missing_package(self, tmp_path: Path, monkeypatch, module: str) -> None:
        monkeypatch.setattr(
            "importlib.util.find_spec", lambda name: None if name == module else True
        )
        with pytest.raises(DiveFastError, match=r"pip install 'dive_fast\[report\]'"):
            write_report(write_run(tmp_path / "run"), tmp_path / "page.html")

    def test_an_old_page_is_replaced_whole(self, tmp_path: Path, monkeypatch) -> None:
        run, out = write_run(tmp_path / "run"), tmp_path / "page.html"
        out.write_text("old")
        monkeypatch.setattr("dive_fast.report.page.render", lambda *parts: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            write_report(run, out)
        assert out.read_text() == "old"
        monkeypatch.undo()
        write_report(run, out)
        assert parse(out.read_text()).one("h1").text == "run"
        assert sorted(p.name for p in tmp_path.iterdir()) == ["page.html", "run"]


class TestCommand:
    def test_a_page(self, tmp_path: Path, capsys) -> None:
        folder = write_folder(tmp_path / "photos")
        run, out = write_run(tmp_path / "run"), tmp_path / "page.html"
        said = call(capsys, "report", run, "--out", out, "--data", folder, "--pictures", 1)
        assert said.code == 0 and said.out == f"{out}\n" and said.err == ""
        assert len(parse(out.read_text()).all("img")) == 2

    def test_no_pictures(self, tmp_path: Path, capsys) -> None:
        run, out = write_run(tmp_path / "run"), tmp_path / "page.html"
        said = call(capsys, "report", run, "--out", out, "--no-pictures")
        assert said.code == 0 and said.err == ""

    def test_a_page_without_its_pictures(self, tmp_path: Path, capsys) -> None:
        run, out = write_run(tmp_path / "run"), tmp_path / "page.html"
        said = call(capsys, "report", run, "--out", out)
        assert said.code == 0 and out.exists()
        assert (
            said.err == "dive-fast: run: the run does not say where its images lie; --data can.\n"
        )

    def test_refused(self, tmp_path: Path, capsys) -> None:
        said = call(capsys, "report", tmp_path / "none", "--out", tmp_path / "page.html")
        assert_refused(said, "expected a run directory, got nothing there")
        said = call(capsys, "report", tmp_path, "--out", tmp_path / "page.html")
        assert_refused(said, "cannot be read")
        assert_refused(call(capsys, "report", tmp_path), "--out")
