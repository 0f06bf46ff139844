"""Runs that are killed again and again: nothing is lost, nothing is there twice.

    python -m tests.kills --runs 20 --kills 500

Each run evaluates the same held-out digits. It is killed (SIGKILL) again and again, at random
moments of its start or when a record or two have come, then left to end, and compared with a run
that nobody disturbed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

DIGITS, PROBES = 200, 4


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.kills", description=__doc__)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--kills", type=int, default=20, help="over all runs")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    _import()
    lost = doubled = changed = killed = 0
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        whole = Path(folder) / "whole"
        _wait(_start(whole))
        expected = _answers(whole)
        assert len(expected) == DIGITS
        size = (whole / "results.jsonl").stat().st_size / DIGITS
        for number in range(options.runs):
            rng = random.Random(f"{options.seed} {number}")
            out = Path(folder) / f"run-{number}"
            wanted = options.kills * (number + 1) // options.runs - killed
            seen: set[str] = set()
            left = wanted
            while left:
                early = len(seen) == DIGITS or rng.random() < 0.3
                # Short lives, so that there is something left to kill when the last one comes.
                growth = None if early else rng.uniform(0, 0.5 * DIGITS / wanted * size)
                hit, gone = _kill_once(out, seen, growth, rng)
                left, lost = left - hit, lost + gone
            killed += wanted
            there = len(seen)
            _wait(_start(out))
            lines = [json.loads(line)["id"] for line in (out / "results.jsonl").open()]
            doubled += len(lines) - len(set(lines))
            found = _answers(out)
            lost += len(expected.keys() - found.keys())
            changed += sum(found[key] != expected[key] for key in found.keys() & expected.keys())
            print(f"run {number}: {wanted} kills, {there} records by then", flush=True)
    found = f"{lost} lost, {doubled} doubled, {changed} changed"
    print(f"{killed} kills over {options.runs} runs of {DIGITS} images: {found}")
    return int(lost + doubled + changed > 0)


def _kill_once(
    out: Path, seen: set[str], growth: float | None, rng: random.Random
) -> tuple[bool, int]:
    """Starts the run and kills it; whether that came in time, and how many records are gone.

    Args:
        growth: kill when results.jsonl has grown by so many bytes; None: while the run starts.
    """
    path = out / "results.jsonl"
    before, end = _size(path), time.monotonic() + rng.uniform(0, 0.4)
    hit = False
    pid = _start(out)
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        if time.monotonic() > end if growth is None else _size(path) >= before + growth:
            time.sleep(rng.uniform(0, 0.002))
            os.kill(pid, signal.SIGKILL)
            hit = os.WIFSIGNALED(os.waitpid(pid, 0)[1])
            break
        time.sleep(0.0005)
    there = _whole_lines(out)
    gone = len(seen - there)
    seen |= there
    return hit, gone


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _whole_lines(out: Path) -> set[str]:
    """The ids of what is recorded; the last line may be torn."""
    path = out / "results.jsonl"
    if not path.exists():
        return set()
    lines = path.read_bytes().split(b"\n")[:-1]
    return {json.loads(line)["id"] for line in lines}


def _answers(out: Path) -> dict[str, tuple]:
    from dive_fast.evaluation import read_records

    return {key: (r["index"], tuple(r["losses"])) for key, r in read_records(out).items()}


def _start(out: Path) -> int:
    """``dive-fast evaluate`` in a fork, which has loaded the libraries already."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        quiet = os.open(os.devnull, os.O_RDWR)
        for number in (0, 1, 2):
            os.dup2(quiet, number)
        from dive_fast.cli import main as command

        code = command(
            ["evaluate", "--data", "digits", "--limit", str(DIGITS), "--strategy", "enumerate",
             "--probes", str(PROBES), "--batch-size", "40", "--out", str(out)]
        )  # fmt: skip
    finally:
        os._exit(code)


def _wait(pid: int) -> None:
    if os.waitpid(pid, 0)[1]:
        raise SystemExit("a run that nobody disturbed failed")


def _import() -> None:
    """Nothing is computed here: torch's threads do not survive a fork."""
    import torch
    from sklearn import datasets  # noqa: F401

    import dive_fast.evaluation
    import dive_fast.predict.classifier  # noqa: F401
    from dive_fast.models.dit import model  # noqa: F401

    torch.set_num_threads(1)


if __name__ == "__main__":
    sys.exit(main())
