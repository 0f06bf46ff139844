"""Loggers with the real libraries: what is on the disk, who goes on where, what a failure costs."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path

import log_readers
import pytest

from dive_fast.errors import DiveFastError, RunError
from dive_fast.logs import LOGGERS, Logger, check_log_to, logging_to

CONFIG = {"strategy": {"name": "auto", "settings": (1, 2)}, "data": Path("digits"), "seed": 3}
PLAIN = {"strategy": {"name": "auto", "settings": [1, 2]}, "data": "digits", "seed": 3}


@pytest.fixture(autouse=True)
def _own_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is sent, asked for in a terminal, or written to the user's home."""
    for name in [name for name in os.environ if name.startswith(("WANDB_", "TRACKIO_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("CONFIG", "CACHE", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / "wandb-home"))
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio-home"))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "runs" / "auto").mkdir(parents=True)
    return tmp_path / "runs" / "auto"


def two_sittings(log_to: str, out: Path) -> None:
    """One that is cut off behind step 20, and one that finishes."""
    with logging_to(log_to, out, CONFIG, 0) as logger:
        logger.log(10, {"accuracy": 0.5, "failed": 0})
        logger.log(20, {"accuracy": 0.75, "failed": 1})
    with logging_to(log_to, out, CONFIG, 20) as logger:
        logger.log(30, {"accuracy": 0.25, "failed": 1})
        logger.finish({"n": 29, "nll": None, "by_class": {"cat": 0.5}, "accuracy": 0.25})


EXPECTED = {
    "accuracy": [(10, 0.5), (20, 0.75), (30, 0.25)],
    "failed": [(10, 0), (20, 1), (30, 1)],
}
SUMMARY = {"summary/n": [(30, 29)], "summary/accuracy": [(30, 0.25)]}


class TestTensorBoard:
    pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

    @pytest.fixture(autouse=True)
    def _needed(self) -> None:
        pytest.importorskip("tensorboard", reason="needs the extra tensorboard")

    def test_two_sittings(self, out: Path) -> None:
        two_sittings("tensorboard", out)
        assert log_readers.tensorboard(out / "tensorboard") == {**EXPECTED, **SUMMARY}
        assert log_readers.tensorboard_config(out / "tensorboard") == PLAIN

    def test_what_a_killed_sitting_logged_too_early_is_taken_back(self, out: Path) -> None:
        """It had logged step 30, and its records end at 25."""
        with logging_to("tensorboard", out, CONFIG, 0) as logger:
            for step in (10, 20, 30):
                logger.log(step, {"accuracy": 1.0})
        with logging_to("tensorboard", out, CONFIG, 25) as logger:
            logger.log(35, {"accuracy": 0.0})
        found = log_readers.tensorboard(out / "tensorboard")
        assert found == {"accuracy": [(10, 1), (20, 1), (35, 0)]}

    def test_a_directory_of_ones_own(self, out: Path, tmp_path: Path) -> None:
        two_sittings(f"tensorboard:{tmp_path / 'else' / 'where'}", out)
        found = log_readers.tensorboard(tmp_path / "else" / "where")
        assert found == {**EXPECTED, **SUMMARY}
        assert list(out.iterdir()) == []

    def test_a_directory_that_cannot_be(self, out: Path, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(RunError, match="^logging to tensorboard cannot begin: .*file"):
            two_sittings(f"tensorboard:{tmp_path / 'file' / 'below'}", out)

    def test_a_full_disk(self, out: Path) -> None:
        """The writer is told of it in its thread; the run learns it once, and goes on."""
        pytest.importorskip("resource", reason="no limits of file sizes here")
        program = """
            import logging, resource
            from dive_fast.logs import logging_to

            logging.basicConfig(format="%(message)s")
            resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
            with logging_to("tensorboard", out, {}, 0) as logger:
                for step in range(3000):
                    logger.log(step, {"loss": 1.0})
                logger.finish({"loss": 1.0})
            print("all steps")
        """
        done = child(program, out)
        assert (done.returncode, done.stdout) == (0, "all steps\n"), done.stderr
        assert done.stderr.count("failed and ends here, the run goes on: ") == 1


def child(program: str, out: Path) -> subprocess.CompletedProcess[str]:
    """Runs it where ``two_sittings`` and ``out`` are known.

    In a process of its own, since both libraries read the environment once, and have written
    everything when the process ends.
    """
    head = f"""
        import sys
        from pathlib import Path
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_logs import two_sittings
        out = Path({str(out)!r})
    """
    program = textwrap.dedent(head) + textwrap.dedent(program)
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )


class TestWandB:
    @pytest.fixture(autouse=True)
    def _needed(self) -> None:
        pytest.importorskip("wandb", reason="needs the extra wandb")

    def test_two_sittings(self, out: Path) -> None:
        done = child("two_sittings('wandb', out)", out)
        assert (done.returncode, done.stdout) == (0, ""), done.stderr  # stdout is for answers
        first, second = (log_readers.wandb(path) for path in log_readers.wandb_files(out))
        found = {name: first[0][name] + second[0][name] for name in EXPECTED}
        assert found == EXPECTED and set(first[0]) == set(EXPECTED)
        assert second[1].items() >= {"n": 29, "accuracy": 0.25, "failed": 1}.items()
        assert "nll" not in second[1] and "by_class" not in second[1]
        assert first[2].items() >= PLAIN.items()
        assert first[3] == second[3] == (out / ".log_id").read_text().strip()

    def test_a_run_that_the_caller_has_open_stays_so(self, out: Path, tmp_path: Path) -> None:
        program = f"""
            import wandb
            mine = wandb.init(project="mine", dir={str(tmp_path)!r})
            two_sittings("wandb", out)
            assert wandb.run is mine
            mine.log({{"still": 1.0}})
        """
        done = child(program, out)
        assert done.returncode == 0, done.stderr
        (path,) = log_readers.wandb_files(tmp_path)
        assert log_readers.wandb(path)[0] == {"still": [(0, 1)]}

    def test_nobody_is_logged_in(self, out: Path, tmp_path: Path, monkeypatch) -> None:
        monkeypatch.setenv("WANDB_MODE", "online")
        monkeypatch.setenv("NETRC", str(tmp_path / "none"))
        done = child("two_sittings('wandb', out)", out)
        assert "RunError: logging to wandb cannot begin: No API key configured" in done.stderr


class TestTrackio:
    @pytest.fixture(autouse=True)
    def _needed(self) -> None:
        pytest.importorskip("trackio", reason="needs the extra trackio")

    def test_two_sittings(self, out: Path, tmp_path: Path) -> None:
        program = """
            for log_to in ("trackio", "trackio:other"):
                two_sittings(log_to, out)
        """
        done = child(program, out)
        assert (done.returncode, done.stdout) == (0, ""), done.stderr
        for project in ("dive_fast", "other"):
            found, configs = log_readers.trackio(tmp_path / "trackio-home", project)
            assert found == {**EXPECTED, **SUMMARY}
            name = f"auto-{(out / '.log_id').read_text().strip()}"
            assert list(configs) == [name]
            assert configs[name].items() >= PLAIN.items()


class Failing:
    """A logger of the user's own, whose network is gone from some step on."""

    def __init__(self, fails_at: int) -> None:
        self.fails_at, self.seen = fails_at, []

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        if step >= self.fails_at:
            raise ConnectionError("the network is gone\nsince noon")
        self.seen.append((step, dict(figures)))

    def finish(self, summary: Mapping[str, float] | None) -> None:
        self.seen.append(summary)


def test_one_of_the_users_own(out: Path) -> None:
    logger = Failing(fails_at=100)
    assert isinstance(logger, Logger)
    two_sittings(logger, out)
    steps = [(10, {"accuracy": 0.5, "failed": 0}), (20, {"accuracy": 0.75, "failed": 1})]
    assert logger.seen[:3] == [*steps, None]
    assert logger.seen[3:] == [
        (30, {"accuracy": 0.25, "failed": 1}),
        {"n": 29, "accuracy": 0.25},
    ]
    assert list(out.iterdir()) == []


def test_a_failure_is_told_once(out: Path, caplog) -> None:
    logger = Failing(fails_at=20)
    with caplog.at_level(logging.WARNING), logging_to(logger, out, CONFIG, 0) as forgiving:
        for step in (10, 20, 30, 40):
            forgiving.log(step, {"loss": 1.0})
        forgiving.finish({"loss": 1.0})
    assert logger.seen == [(10, {"loss": 1.0})]
    said = "logging to Failing failed and ends here, the run goes on: the network is gone."
    assert caplog.messages == [said]


def test_what_is_no_figure_is_left_out(out: Path) -> None:
    logger = Failing(fails_at=100)
    with logging_to(logger, out, CONFIG, 0) as forgiving:
        forgiving.log(1, {"a": float("nan"), "b": "text", "c": True})
        forgiving.log(2, {"a": float("inf"), "b": None})
    assert logger.seen == [(1, {"c": 1.0}), None]


def test_interrupts_come_through(out: Path) -> None:
    class Interrupted(Failing):
        def log(self, step: int, figures: Mapping[str, float]) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), logging_to(Interrupted(0), out, CONFIG, 0) as logger:
        logger.log(1, {"a": 1.0})


class TestBadInput:
    @pytest.mark.parametrize(
        "log_to",
        ["mlflow", "", "tensorboard:", "wandb: ", 3, Path("tensorboard"), Failing],
        ids=str,
    )
    def test_no_logger(self, log_to: object, out: Path) -> None:
        known = "tensorboard or tensorboard:DIR, wandb or wandb:PROJECT, trackio or trackio:PROJECT"
        with pytest.raises(DiveFastError, match=f"^expected to log to {known}, got .*\\.$"):
            check_log_to(log_to)
        with pytest.raises(DiveFastError, match="^expected to log to"):
            two_sittings(log_to, out)
        assert list(out.iterdir()) == []

    @pytest.mark.parametrize("name", LOGGERS)
    def test_not_installed(self, name: str, out: Path, monkeypatch) -> None:
        monkeypatch.setitem(sys.modules, name, None)
        sentence = (
            f"^logging to {name} needs {name}, which is not installed: "
            rf"pip install 'dive_fast\[{name}\]'\.$"
        )
        with pytest.raises(DiveFastError, match=sentence):
            check_log_to(name)
