"""JSON files, and what a library's error says, each for one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dive_fast.core.config import Config
from dive_fast.errors import ModelError


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``, with or without a byte order mark.

    NaN and infinity are let through, as schedulers have them; ``Config`` refuses them by name.

    Raises:
        ModelError: missing, unreadable, no JSON object, or with an entry that stands there twice.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content: dict[str, Any] = {}
        for key, value in pairs:
            if key in content:
                raise ModelError(f"{path} states {key!r} twice.")
            content[key] = value
        return content

    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=unique)
    except FileNotFoundError as error:
        raise ModelError(f"expected {path.name} in {path.parent}, found none.") from error
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}.") from error
    except ModelError:
        raise
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} must hold a JSON object, got {type(content).__name__}.")
    return content


def read_config(path: Path) -> Config:
    """``read_json`` for those who read values of it."""
    return Config(path, read_json(path))


def first_line(error: BaseException) -> str:
    """The first line of a library's message that says something, ended by a full stop."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # "Error(s) in loading state_dict for ...:" only announces the next line.
    lines = [line for line in lines if not line.endswith(":")] or [type(error).__name__]
    line = lines[0]
    if isinstance(error, KeyError):  # its message is the key alone
        line = f"{line} is not known"
    return line if line.endswith(".") else line + "."


def root_cause(error: BaseException) -> BaseException:
    """What went wrong first: diffusers says of every unreadable file that it is unreadable."""
    while error.__context__ is not None:
        error = error.__context__
    return error
