"""What is written behind an option, read: each refuses what it cannot be in a sentence."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Sequence


def count(text: str) -> int:
    """A whole number of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return value


def seed(text: str) -> int:
    """A whole number that every generator takes."""
    try:
        value = int(text)
    except ValueError:
        value = -1
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(
            f"expected a whole number from 0 to 2^63 - 1, got {text!r}"
        )
    return value


def weight(text: str) -> float:
    """A number of at least 0."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, got {text!r}")
    return value


def share(text: str) -> float:
    """A number above 0 and below 1."""
    value = number(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"expected a share above 0 and below 1, got {text!r}")
    return value


def number(text: str) -> float:
    """Any number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}")
    return value


def log_target(text: str) -> str:
    """What ``--log-to`` takes."""
    from dive_fast.errors import DiveFastError
    from dive_fast.logs import check_log_to

    try:
        return check_log_to(text)
    except DiveFastError as error:
        raise argparse.ArgumentTypeError(str(error).rstrip(".")) from error


def row_or_name(text: str, names: Sequence[str]) -> int | str:
    """What names a class: its name, else its row where it is a number."""
    is_number = text not in names and re.fullmatch(r"[0-9]{1,18}", text)
    return int(text) if is_number else text


def readers(text: str) -> int | None:
    """A whole number, or None for "auto"."""
    if text == "auto":
        return None
    try:
        value = int(text)
    except ValueError:
        value = -1
    if value < 0:
        raise argparse.ArgumentTypeError(f"expected a whole number or auto, got {text!r}")
    return value
