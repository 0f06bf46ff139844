"""One command in a process of its own, and how it ended."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

SECONDS = 60  # of the processor, for a command that takes about one
MEMORY = 4 * 2**30  # bytes beside what the libraries take
MOST_LINES = 12  # of warnings and errors; a file with a thousand faults is no reason for more
_STARTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.spawn")
_OURS = ("git", "uname")  # evaluation.machine asks them about the checkout and the machine
_TRACEBACK = 70  # exit code: an exception came through


@dataclass(frozen=True)
class Ending:
    """How a command ended.

    Attributes:
        outcome: "sentence", "right", "untidy", "traceback", "crash", "hang" or "child process".
        out, err: what it printed.
    """

    outcome: str
    out: str
    err: str


def run(prepare: Callable[[], list[str]], folder: Path) -> Ending:
    """Calls ``dive-fast`` with what ``prepare`` says, in a fork.

    Args:
        prepare: makes the damaged files and gives the arguments; called in the fork.
        folder: an empty one for what is printed.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        _child(prepare, folder)
    deadline = time.monotonic() + 10 * SECONDS
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            status = signal.SIGXCPU
            break
        time.sleep(0.01)
    return _ending(status, folder)


def _child(prepare: Callable[[], list[str]], folder: Path) -> None:
    code = _TRACEBACK
    try:
        # What is printed must be found even if the process dies.
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        arguments = prepare()
        (folder / "arguments.json").write_text(json.dumps(arguments))
        _limit()
        _watch(folder / "started")
        code = _main(arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _main(arguments: list[str]) -> int:
    from dive_fast.cli import main

    try:
        return main(arguments)
    except SystemExit as exit:
        return int(exit.code or 0)


def _limit() -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 5))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _watch(path: Path) -> None:
    """Notes what starts another process from now on."""

    def hook(event: str, arguments: tuple) -> None:
        if event.startswith(_STARTS):
            command = str(arguments[0] if arguments else event)
            if Path(command).name not in _OURS:
                with open(path, "a") as file:
                    file.write(f"{event} {command}\n")

    sys.addaudithook(hook)


def _ending(status: int, folder: Path) -> Ending:
    out, err = (
        (folder / name).read_bytes().decode(errors="replace") if (folder / name).exists() else ""
        for name in ("out", "err")
    )
    return Ending(_outcome(status, out, err, (folder / "started").exists()), out, err)


def _outcome(status: int, out: str, err: str, started: bool) -> str:
    if started:
        return "child process"
    if os.WIFSIGNALED(status) or status == signal.SIGXCPU:
        return "hang" if status & 0x7F == signal.SIGXCPU else "crash"
    code = os.WEXITSTATUS(status)
    if code not in (0, 2) or "Traceback" in err:
        return "traceback"
    lines = err.splitlines()
    tidy = all(re.match(r"dive-fast( [\w-]+)?: ", line) for line in lines)
    if not tidy or len(lines) > MOST_LINES:
        return "untidy"
    if code == 2:
        return "sentence" if lines else "untidy"
    return "right" if _is_right(out) else "untidy"


def _is_right(out: str) -> bool:
    """An answer that can be one: finite, probabilities within [0, 1], labels that print."""
    if not out.startswith(("{", "[")):
        return True
    try:
        found = json.loads(out, parse_constant=_refuse)
    except ValueError:
        return False
    records = found if isinstance(found, list) else [found]
    if not all(r["label"].isprintable() for r in records if "label" in r):
        return False
    shares = [r[key] for r in records for key in ("probability", "accuracy", "AP") if key in r]
    return all(x is None or (math.isfinite(x) and -1e-6 <= x <= 1 + 1e-6) for x in shares)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")
