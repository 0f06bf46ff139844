"""A few damaged files and killed runs; ``tests.faults`` and ``tests.kills`` do thousands."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

if not hasattr(__import__("os"), "fork"):
    pytest.skip("cases run in forks", allow_module_level=True)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])


def test_damaged_files_end_in_sentences() -> None:
    done = run("tests.faults", "--cases", "40", "--seed", "7")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    counts = list(map(int, done.stdout.splitlines()[-1].split()[1:]))
    assert sum(counts) == sum(counts[:2]) == 40 and all(counts[:2])


def test_killed_runs_lose_nothing() -> None:
    done = run("tests.kills", "--runs", "1", "--kills", "4")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].endswith("0 lost, 0 doubled, 0 changed")
