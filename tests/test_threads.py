"""How many threads torch gets: what is measured, what the user said, and what is left alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dive_fast
from dive_fast.cli import main
from dive_fast.core import threads
from dive_fast.core.threads import choose_again, choose_threads, cores, free_cores, spin_shortly
from dive_fast.errors import DiveFastError


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch: pytest.MonkeyPatch):
    """Nothing said to OpenMP, and this process' threads as before in the end."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    before = torch.get_num_threads()
    yield
    threads._choice = None
    torch.set_num_threads(before)


class Clock:
    """Looked at every ten seconds: how many cores were busy, and how many by us."""

    def __init__(self, busy: list[float], own: list[float]) -> None:
        self.rates = iter(zip(busy, own, strict=True))
        self.seen = threads._Seen(-1e6, 0.0, 0.0)  # long ago: it is always time to look again

    def look(self) -> threads._Seen:
        busy, own = next(self.rates)
        clock, total, ours = self.seen
        self.seen = threads._Seen(clock + 10, total + 10 * busy, ours + 10 * own)
        return self.seen


def test_a_short_spin_unless_the_user_said_something() -> None:
    said: dict[str, str] = {}
    spin_shortly(said)
    assert said == {"GOMP_SPINCOUNT": "10000"}
    for name, value in (("OMP_WAIT_POLICY", "ACTIVE"), ("GOMP_SPINCOUNT", "7")):
        said = {name: value}
        spin_shortly(said)
        assert said == {name: value}


@pytest.mark.parametrize(
    ("busy", "own", "n_cores", "free"),
    [(0.0, 0.0, 4, 4.0), (3.0, 2.0, 4, 3.0), (2.0, 0.7, 2, 0.7), (1.0, 1.2, 2, 2.0)],
)
def test_free_is_what_others_leave(
    monkeypatch: pytest.MonkeyPatch, busy: float, own: float, n_cores: int, free: float
) -> None:
    clock = Clock([0.0, busy], [0.0, own])
    monkeypatch.setattr(threads, "_look", clock.look)
    monkeypatch.setattr(threads, "cores", lambda: n_cores)
    assert free_cores(0.0) == pytest.approx(free)


@pytest.mark.parametrize(
    ("free", "chosen"),
    [(8.0, 3), (3.2, 3), (2.9, 3), (2.6, 2), (2.0, 2), (1.0, 1), (0.2, 1), (0.0, 1), (None, 3)],
)
def test_one_thread_for_every_free_core(
    monkeypatch: pytest.MonkeyPatch, free: float | None, chosen: int
) -> None:
    monkeypatch.setattr(threads, "free_cores", lambda: free)
    torch.set_num_threads(3)
    assert choose_threads() == torch.get_num_threads() == chosen


def test_what_the_user_said_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "free_cores", lambda: 1.0)
    torch.set_num_threads(2)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        with monkeypatch.context() as said:
            said.setenv(name, "2")
            assert choose_threads(again=0.0) == 2
            choose_again()
            assert torch.get_num_threads() == 2
    assert dive_fast.choose_threads(3) == torch.get_num_threads() == 3


@pytest.mark.parametrize("count", [0, -1, 1.5, "2", True])
def test_no_number_of_threads(count: object) -> None:
    with pytest.raises(DiveFastError, match="threads"):
        choose_threads(count)


def test_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    # At first another process needs two of four cores, then none, then we are left one.
    clock = Clock([2.0, 2.0, 2.0, 2.0, 4.0], [0.0, 0.0, 0.0, 2.0, 1.0])
    monkeypatch.setattr(threads, "_look", clock.look)
    monkeypatch.setattr(threads, "cores", lambda: 4)
    monkeypatch.setattr(threads, "INTERVAL", 0.0)
    torch.set_num_threads(4)
    found = [choose_threads(again=0.0)]
    for _ in range(2):
        choose_again()
        found.append(torch.get_num_threads())
    assert found == [2, 4, 1]


def test_not_looked_at_before_it_is_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "free_cores", lambda: 1.0)
    torch.set_num_threads(2)
    assert choose_threads(again=3600.0) == 1
    monkeypatch.setattr(threads, "_look", lambda: pytest.fail("looked"))
    choose_again()


def test_who_sets_threads_himself_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock([0.0] * 4, [0.0] * 4)
    monkeypatch.setattr(threads, "_look", clock.look)
    torch.set_num_threads(2)
    choose_threads(again=0.0)
    torch.set_num_threads(3)
    choose_again()
    choose_again()
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize(
    ("name", "text", "bound"),
    [
        ("cpu.max", "150000 100000", 1),
        ("cpu.max", "max 100000", None),
        ("cpu.max", "50000 100000", 1),
        ("cpu/cpu.cfs_quota_us", "200000", 2),
        ("cpu/cpu.cfs_quota_us", "-1", None),
    ],
)
def test_the_quota_of_a_container(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, text: str, bound: int | None
) -> None:
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000")
    (tmp_path / name).write_text(text)
    monkeypatch.setattr(threads, "_CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert cores() == (8 if bound is None else bound)


def test_only_the_cores_that_are_ours_count(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # user nice system idle iowait irq softirq steal guest guest_nice, in hundredths of a second
    lines = "cpu 0 0 0 0 0 0 0 0 0 0\ncpu0 9 9 9 9 9 9 9 9 0 0\ncpu1 10 20 30 99 99 1 2 3 5 5\n"
    monkeypatch.setattr(threads, "_STAT", tmp_path / "stat")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1}, raising=False)
    assert threads._look() is None  # another system
    (tmp_path / "stat").write_text(lines)
    assert threads._look().busy == pytest.approx(66 / os.sysconf("SC_CLK_TCK"))
    (tmp_path / "stat").write_text("cpu1 none\n")
    assert threads._look() is None


def test_a_command_leaves_its_caller_alone(tmp_path: Path) -> None:
    torch.set_num_threads(3)
    out = str(tmp_path / "run")
    assert (
        main(["evaluate", "--data", "digits", "--out", out, "--limit", "2", "--probes", "2"]) == 0
    )
    assert torch.get_num_threads() == 3
    assert "GOMP_SPINCOUNT" not in os.environ


def test_a_command_of_its_own_chooses(tmp_path: Path) -> None:
    """As many as are free of those that it may have, and the run says how many."""
    command = [sys.executable, "-m", "dive_fast", "evaluate", "--data", "digits", "--limit", "2"]
    for asked, allowed in ((["--threads", "2"], {2}), ([], set(range(1, cores() + 1)))):
        out = tmp_path / str(len(asked))
        subprocess.run([*command, "--out", str(out), "--probes", "2", *asked], check=True)
        said = json.loads((out / "run.json").read_text())["environment"]
        assert said["threads"] in allowed


def test_a_bad_number_of_threads(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["classify", "x.png", "--threads", "0"])
    assert left.value.code == 2
    assert "expected a whole number of at least 1, got '0'" in capsys.readouterr().err
