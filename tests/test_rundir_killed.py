"""A run whose process is killed, or whose disk is full: what was written stays whole."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from rundir_inputs import CONFIG, lines, record

from dive_fast.errors import RunError
from dive_fast.evaluation.rundir import RunDirectory


def python(script: str, path: Path, prefix: tuple[str, ...] = ()) -> subprocess.Popen:
    """Run a script in a process of its own: for failures that a process does not survive."""
    command = [*prefix, sys.executable, "-c", textwrap.dedent(script), str(path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    search = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(command, text=True, env=os.environ | {"PYTHONPATH": search}, **pipes)


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
