"""One and two threads of torch, on idle cores and beside busy processes, by how long OpenMP spins.

    python -m bench.threads --rounds 5

Every variant is a process of its own, for OpenMP reads its settings once; they take turns, so that
other load on the machine meets all alike. "default" is torch as it comes, "short" has the
GOMP_SPINCOUNT that the command line sets, "sleeps" OMP_WAIT_POLICY=PASSIVE. Beside them run 0, 1 or
2 processes that are always busy. Before it counts, a variant's answers are compared with those of
one thread. Appends to bench/results/threads.jsonl.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from statistics import median

import torch

from bench.records import RESULTS, append_line
from dive_fast import DiffusionClassifier
from dive_fast.core.threads import SPINS
from dive_fast.data.digits import load_digits
from dive_fast.evaluation.machine import machine

WAITS = {
    "default": {},
    "short": {"GOMP_SPINCOUNT": str(SPINS)},
    "sleeps": {"OMP_WAIT_POLICY": "PASSIVE"},
}
VARIANTS = [("default", 1), *((wait, 2) for wait in WAITS)]
# How many images make a turn of about half a second on one idle core.
IMAGES = {"digits": 20, "mnist": 4}
OURS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(IMAGES), choices=list(IMAGES))
    parser.add_argument("--rounds", type=int, default=5, help="turns of each variant (default: 5)")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        child(arguments.child)
        return
    for model in arguments.models:
        with contextlib.ExitStack() as stack:
            children = {v: stack.enter_context(started(model, v[0])) for v in VARIANTS}
            expected = turn(children[VARIANTS[0]], 1)[1]
            for busy in (0, 1, 2):
                with neighbours(busy):
                    measure(model, children, busy, arguments.rounds, expected)


def measure(model: str, children: dict, busy: int, rounds: int, expected: str) -> None:
    """Times all variants beside so many busy processes, and records them."""
    seconds: dict = {variant: [] for variant in children}
    for _ in range(rounds):
        for variant, process in children.items():
            took, answers = turn(process, variant[1])
            assert answers == expected, (variant, answers, expected)
            seconds[variant].append(took)
    print(f"\n{model}, {busy} busy processes beside, {rounds} rounds of {IMAGES[model]} images")
    for (wait, threads), times in seconds.items():
        row = {
            "model": model,
            "busy": busy,
            "waiting": wait,
            "threads": threads,
            "rounds": rounds,
            "n": IMAGES[model],
            "seconds_per_image": median(times) / IMAGES[model],
            "spread": [t / IMAGES[model] for t in (min(times), max(times))],
        }
        print(
            f"{wait:7} {threads} {1e3 * row['seconds_per_image']:8.1f} ms an image  "
            f"[{1e3 * row['spread'][0]:.1f}, {1e3 * row['spread'][1]:.1f}]",
            flush=True,
        )
        append_line(RESULTS / "threads.jsonl", row, machine())


def turn(process: subprocess.Popen, threads: int) -> tuple[float, str]:
    """Seconds and answers of one turn of a variant."""
    print(threads, file=process.stdin, flush=True)
    took, answers = process.stdout.readline().split()
    return float(took), answers


def child(model: str) -> None:
    """One turn for every line on stdin, which says how many threads."""
    classifier = DiffusionClassifier.from_pretrained(model)
    if model == "digits":
        images = list(load_digits("train").images[: IMAGES[model]])
    else:
        images = list(torch.rand(IMAGES[model], 1, 28, 28, generator=torch.manual_seed(0)))
    asked = {"strategy": "enumerate", "probes": 10}
    classifier(images[:2], **asked)
    for line in sys.stdin:
        torch.set_num_threads(int(line))
        start = time.perf_counter()
        found = classifier(images, **asked)
        took = time.perf_counter() - start
        print(took, ",".join(str(answer.index) for answer in found), flush=True)


@contextlib.contextmanager
def started(model: str, wait: str) -> Iterator[subprocess.Popen]:
    """A variant's process, which waits for its turns."""
    free = {name: value for name, value in os.environ.items() if name not in OURS}
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.threads", "--child", model],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**free, **WAITS[wait]},
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


@contextlib.contextmanager
def neighbours(count: int) -> Iterator[None]:
    """So many processes that are always busy."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        time.sleep(0.5)
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


if __name__ == "__main__":
    main()
