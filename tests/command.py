"""The command line called in process, and what it says."""

from __future__ import annotations

import re
from typing import NamedTuple

import pytest

from dive_fast.cli import main


class Said(NamedTuple):
    """Exit code, stdout and stderr of one command."""

    code: int
    out: str
    err: str


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> Said:
    """``dive-fast ARGUMENTS``; an exception other than argparse's exit comes through."""
    capsys.readouterr()
    try:
        code = main([str(a) for a in arguments])
    except SystemExit as exit:
        code = int(exit.code or 0)
    return Said(code, *capsys.readouterr())


def assert_refused(said: Said, message: str) -> None:
    """Exit code 2, and one sentence on stderr that matches the regular expression."""
    assert said.code == 2, said
    lines = said.err.splitlines()
    assert len(lines) == 1, said.err
    assert re.match(r"dive-fast( [\w-]+)?: ", lines[0]) and lines[0][-1] in ".)", said.err
    assert re.search(message, lines[0]), f"{message!r} is not in {lines[0]!r}"


def words(value: object) -> str:
    """A test's id: the arguments, without the message that is expected."""
    return " ".join(value) if isinstance(value, list) else "refused"
