from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

from dive_fast.errors import RunError
from dive_fast.evaluation.rundir import RunDirectory, read_records

CONFIG = {"model": "digits", "seed": 0, "invert": {"lr": 0.01, "stages": (1, 2)}}


def record(i: int, **values: object) -> dict:
    return {"id": f"image-{i}", "label": i} | values


def lines(path: Path) -> list[dict]:
    content = (path / "results.jsonl").read_bytes()
    assert content == b"" or content.endswith(b"\n")
    return [json.loads(line) for line in content.splitlines()]


def python(script: str, path: Path, prefix: tuple[str, ...] = ()) -> subprocess.Popen:
    """Run a script in a process of its own: for failures that a process does not survive."""
    command = [*prefix, sys.executable, "-c", textwrap.dedent(script), str(path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    search = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(command, text=True, env=os.environ | {"PYTHONPATH": search}, **pipes)


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

    @pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"config": 3}', "\udcff"])
    def test_damaged_run_json(self, tmp_path: Path, content: str) -> None:
        (tmp_path / "run.json").write_bytes(content.encode(errors="surrogateescape"))
        with pytest.raises(RunError, match="'config', got a damaged file"):
            RunDirectory.open(tmp_path, CONFIG)

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

    def test_results_are_a_device(self, tmp_path: Path) -> None:
        RunDirectory.open(tmp_path, CONFIG).close()
        (tmp_path / "results.jsonl").unlink()
        (tmp_path / "results.jsonl").symlink_to(os.devnull)
        with pytest.raises(RunError, match="expected a regular file"):
            RunDirectory.open(tmp_path, CONFIG)

    def test_config_that_is_not_json(self, tmp_path: Path) -> None:
        with pytest.raises(RunError, match="for JSON, got set"):
            RunDirectory.open(tmp_path / "run", {"seeds": {1, 2}})
        assert not (tmp_path / "run").exists()


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


class TestDamagedResults:
    def prepare(self, path: Path, content: bytes) -> None:
        RunDirectory.open(path, CONFIG).close()
        (path / "results.jsonl").write_bytes(content)

    @pytest.mark.parametrize(
        "tail",
        [
            b"{",
            b'{"id": "image-1", "la',
            b'{"id": "image-1", "label": 1}',
            b'{"id": "image-1", \n',
            b'{"label": 1}\n',
            b"\0" * 100,
            b"\xff\xfe\n",
            b"\n",
        ],
    )
    def test_torn_last_line(self, tmp_path: Path, tail: bytes) -> None:
        whole = json.dumps(record(0)).encode() + b"\n"
        self.prepare(tmp_path, whole + tail)
        with RunDirectory.open(tmp_path, CONFIG) as run:
            assert dict(run.done()) == {"image-0": record(0)}
            assert (tmp_path / "results.jsonl").read_bytes() == whole
            run.append(record(1))
        assert lines(tmp_path) == [record(0), record(1)]

    def test_only_a_torn_line(self, tmp_path: Path) -> None:
        self.prepare(tmp_path, b'{"id": "im')
        with RunDirectory.open(tmp_path, CONFIG) as run:
            assert not run.done()
        assert lines(tmp_path) == []

    @pytest.mark.parametrize("bad", [b"{", b"[]", b'{"label": 1}', b"", b"\xff"])
    def test_damage_in_the_middle(self, tmp_path: Path, bad: bytes) -> None:
        content = b'{"id": "a"}\n' + bad + b'\n{"id": "b"}\n'
        self.prepare(tmp_path, content)
        with pytest.raises(RunError, match=r"results\.jsonl.*damaged line 2"):
            RunDirectory.open(tmp_path, CONFIG)
        assert (tmp_path / "results.jsonl").read_bytes() == content

    def test_first_of_duplicates_counts(self, tmp_path: Path) -> None:
        self.prepare(tmp_path, b'{"id": "a", "n": 1}\n{"id": "a", "n": 2}\n')
        with RunDirectory.open(tmp_path, CONFIG) as run:
            assert dict(run.done()) == {"a": {"id": "a", "n": 1}}


class TestLock:
    def test_second_writer_is_refused(self, tmp_path: Path) -> None:
        pytest.importorskip("fcntl")
        with RunDirectory.open(tmp_path, CONFIG) as run:
            with pytest.raises(RunError, match="another process is writing"):
                RunDirectory.open(tmp_path, CONFIG)
            run.append(record(0))
        with RunDirectory.open(tmp_path, CONFIG) as run:
            assert list(run.done()) == ["image-0"]


class TestKilled:
    def test_resumes_after_kill_9(self, tmp_path: Path) -> None:
        writer = python(
            """
            import sys
            from dive_fast.evaluation.rundir import RunDirectory
            run = RunDirectory.open(sys.argv[1], {"seed": 0})
            for i in range(10**9):
                run.append({"id": str(i), "losses": [0.5] * 2000})
                if i == 50:
                    print("go", flush=True)
            """,
            tmp_path,
        )
        assert writer.stdout.readline() == "go\n"
        with pytest.raises(RunError, match="another process is writing"):
            RunDirectory.open(tmp_path, {"seed": 0})
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
        with RunDirectory.open(tmp_path, {"seed": 0}) as run:
            n = len(run.done())
            assert n > 50 and list(run.done()) == [str(i) for i in range(n)]
            run.append({"id": str(n)})
        assert [r["id"] for r in lines(tmp_path)] == [str(i) for i in range(n + 1)]

    def test_resumes_when_killed_in_the_middle_of_a_line(self, tmp_path: Path) -> None:
        """The file-size limit lets through half a line, and its signal kills there and then."""
        writer = python(
            """
            import resource, signal, sys
            from dive_fast.evaluation.rundir import RunDirectory
            run = RunDirectory.open(sys.argv[1], {"seed": 0})
            run.append({"id": "0"})
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
            run.append({"id": "1", "text": "x" * 5000})
            """,
            tmp_path,
        )
        writer.communicate()
        assert writer.returncode == -signal.SIGXFSZ
        assert (tmp_path / "results.jsonl").stat().st_size == 1000
        with RunDirectory.open(tmp_path, {"seed": 0}) as run:
            assert list(run.done()) == ["0"]
        assert lines(tmp_path) == [{"id": "0"}]


class TestFullDisk:
    def test_half_a_line_is_cut_off_again(self, tmp_path: Path) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        with RunDirectory.open(tmp_path, CONFIG) as run:
            run.append(record(0))
            try:
                resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
                with pytest.raises(RunError, match=r"results\.jsonl: cannot be written \(File too"):
                    run.append(record(1, text="x" * 5000))
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            assert lines(tmp_path) == [record(0)] and list(run.done()) == ["image-0"]
            run.append(record(1))
        assert lines(tmp_path) == [record(0), record(1)]

    def test_no_room_for_run_json(self, tmp_path: Path) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
            with pytest.raises(RunError, match="cannot be written"):
                RunDirectory.open(tmp_path, CONFIG)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert [p.name for p in tmp_path.iterdir()] == [".lock"]
        with RunDirectory.open(tmp_path, CONFIG) as run:
            run.append(record(0))

    @pytest.mark.skipif(
        not (os.path.exists("/dev/full") and os.path.isdir("/proc/self/fd")),
        reason="needs /dev/full and /proc",
    )
    def test_results_that_can_neither_grow_nor_be_cut(self, tmp_path: Path) -> None:
        run = RunDirectory.open(tmp_path, CONFIG)
        run.append(record(0))
        (number,) = [
            int(fd)
            for fd in os.listdir("/proc/self/fd")
            if os.path.realpath(f"/proc/self/fd/{fd}") == str(tmp_path / "results.jsonl")
        ]
        full = os.open("/dev/full", os.O_WRONLY)
        os.dup2(full, number)
        os.close(full)
        with pytest.raises(RunError, match="No space left on device"):
            run.append(record(1))
        with pytest.raises(RunError, match="closed"):
            run.append(record(1))
        assert lines(tmp_path) == [record(0)]

    def test_small_file_system(self, tmp_path: Path) -> None:
        """A real one of 64 KiB, in a mount namespace of its own."""
        if not shutil.which("unshare") or subprocess.run(["unshare", "-rm", "true"]).returncode:
            pytest.skip("this system lets no user make a mount namespace")
        writer = python(
            """
            import subprocess, sys
            from dive_fast.errors import RunError
            from dive_fast.evaluation.rundir import RunDirectory
            path = sys.argv[1]
            if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", path]).returncode:
                sys.exit(3)
            with RunDirectory.open(path, {"seed": 0}) as run:
                try:
                    for i in range(1000):
                        run.append({"id": str(i), "text": "x" * 1000})
                except RunError as error:
                    print(error)
            with RunDirectory.open(path, {"seed": 0}) as run:
                print(*run.done())
            """,
            tmp_path,
            prefix=("unshare", "-rm"),
        )
        output, errors = writer.communicate()
        if writer.returncode == 3:
            pytest.skip("this system lets no user mount a file system")
        assert writer.returncode == 0, errors
        reason, kept = output.splitlines()
        assert reason.endswith("results.jsonl: cannot be written (No space left on device).")
        ids = kept.split()
        assert len(ids) > 30 and ids == [str(i) for i in range(len(ids))]
