"""What readers are sent in tests: it must be importable where they run."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from dive_fast.errors import DataError, ImageError


@dataclass(frozen=True)
class Number:
    """Gives its number as a tensor, and who read it."""

    number: int
    seconds: float = 0.0

    def __call__(self) -> tuple[torch.Tensor, int]:
        time.sleep(self.seconds)
        return torch.tensor([self.number]), os.getpid()


@dataclass(frozen=True)
class Entry:
    """One of many numbers."""

    numbers: Sequence[int]
    index: int

    def __call__(self) -> int:
        return self.numbers[self.index]


@dataclass(frozen=True)
class Picture:
    """An image of 5 x 3 pixels, no two alike."""

    mode: str

    def __call__(self) -> Image.Image:
        n = 15 * len(self.mode)
        return Image.frombytes(self.mode, (5, 3), bytes(range(n)))


def unreadable() -> int:
    raise ImageError("x.png: expected an image, got none.")


def damaged() -> int:
    raise DataError("the data set is damaged.")


def impossible() -> int:
    raise KeyError("a mistake in somebody's code")


def odd() -> int:
    warnings.warn("an odd image", UserWarning, stacklevel=1)
    return 7


def alive(pid: int) -> bool:
    """Whether there is such a process that is no zombie."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone(pids: set[int], within: float = 20.0) -> bool:
    """Whether all of them end in so many seconds."""
    end = time.monotonic() + within
    while any(alive(pid) for pid in pids):
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True
