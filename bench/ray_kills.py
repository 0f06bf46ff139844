"""Runs on Ray whose workers and drivers are killed again and again: nothing lost, nothing twice.

    python -m bench.ray_kills --kills 20

``dive-fast evaluate --ray --workers 2`` evaluates held-out digits. At random moments of its start
and its work a random worker or the driver itself is killed (SIGKILL); where it was the driver, the
run is begun again. When all kills are done the run is left to end and
compared with one that nobody disturbed, without Ray; two minutes later no process of a killed
driver's cluster may be there. A row is appended to bench/results/ray_kills.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil

from bench.records import RESULTS, append_line
from dive_fast.evaluation import read_records
from dive_fast.evaluation.machine import machine

WORKER = "ray::Worker"  # how Ray calls the process of a worker


class Run:
    """One run that goes on however often its driver is killed.

    Attributes:
        out: its directory.
        orphans: processes of clusters whose driver was killed.
    """

    def __init__(self, out: Path, command: list[str]) -> None:
        self.out = out
        self.orphans: list[psutil.Process] = []
        self._command = [sys.executable, "-m", "dive_fast", *command, "--out", str(out)]
        self._driver: subprocess.Popen | None = None

    def alive(self) -> bool:
        return self._driver is not None and self._driver.poll() is None

    def begin(self) -> None:
        environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
        self._driver = subprocess.Popen(
            self._command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def lines(self) -> set[str]:
        """The ids of what is recorded; the last line may be torn."""
        path = self.out / "results.jsonl"
        if not path.exists():
            return set()
        return {json.loads(line)["id"] for line in path.read_bytes().split(b"\n")[:-1]}

    def workers(self) -> list[psutil.Process]:
        found = []
        for process in psutil.Process(self._driver.pid).children(recursive=True):
            try:
                if process.cmdline()[:1] and process.cmdline()[0].startswith(WORKER):
                    found.append(process)
            except psutil.Error:  # it ended meanwhile
                continue
        return found

    def kill_worker(self, rng: random.Random) -> bool:
        """Whether there was one."""
        try:
            rng.choice(self.workers()).kill()
        except (IndexError, psutil.Error):
            return False
        return True

    def kill_driver(self) -> None:
        family = psutil.Process(self._driver.pid).children(recursive=True)
        self._driver.kill()
        self._driver.wait()
        self.orphans += family

    def end(self) -> int:
        """The exit code of an undisturbed end."""
        if not self.alive():
            self.begin()
        return self._driver.wait()


def disturb(run: Run, kills: int, images: int, rng: random.Random) -> tuple[Counter, int]:
    """Kills; returns how many of what, and how many records were gone afterwards."""
    done, seen, lost = Counter(), set(), 0
    while done.total() < kills:
        if not run.alive():
            run.begin()
        # So that there is something left to do when the last kill comes.
        goal = len(seen) + rng.uniform(0, 0.8 * images / kills)
        early = rng.random() < 0.2  # while it starts: no record has come
        if early:
            time.sleep(rng.uniform(0, 8))
        while not early and run.alive() and len(run.lines()) < goal:
            time.sleep(rng.uniform(0, 0.05))
        if not run.alive():
            raise SystemExit(f"the run ended after {done.total()} kills: give more --images")
        if rng.random() < 0.5:
            run.kill_driver()
            done["driver, while it starts" if early else "driver"] += 1
        elif run.kill_worker(rng):
            done["worker"] += 1
        there = run.lines()
        lost += len(seen - there)
        seen |= there
        print(f"{done.total()} kills, {len(seen)} records", flush=True)
    return done, lost


def answers(out: Path) -> dict[str, tuple]:
    return {key: (r.get("index"), r.get("losses")) for key, r in read_records(out).items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--images", type=int, default=397)
    parser.add_argument("--probes", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    asked = ["evaluate", "--data", "digits", "--limit", str(options.images)]
    asked += ["--strategy", "enumerate", "--probes", str(options.probes), "--batch-size", "40"]
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="ray-kills-") as folder:
        whole = Run(Path(folder) / "whole", asked)
        run = Run(Path(folder) / "run", [*asked, "--ray", "--workers", "2"])
        if whole.end():
            raise SystemExit("a run that nobody disturbed failed")
        done, lost = disturb(run, options.kills, options.images, random.Random(options.seed))
        code = run.end()
        expected, found = answers(whole.out), answers(run.out)
        _, stayed = psutil.wait_procs(run.orphans, timeout=120)
        lines = [json.loads(line)["id"] for line in (run.out / "results.jsonl").open()]
    row = {
        "kills": dict(done),
        "images": options.images,
        "exit_code": code,
        "lost": lost + len(expected.keys() - found.keys()),
        "doubled": len(lines) - len(set(lines)),
        "changed": sum(found[key] != expected[key] for key in found.keys() & expected.keys()),
        "stayed_behind": len(stayed),
        "seconds": time.monotonic() - start,
    }
    append_line(RESULTS / "ray_kills.jsonl", row, machine())
    print(row)
    return int(
        any(row[name] for name in ("exit_code", "lost", "doubled", "changed", "stayed_behind"))
    )


if __name__ == "__main__":
    sys.exit(main())
