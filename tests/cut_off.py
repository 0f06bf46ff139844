"""Cuts a training off in the middle of a step, as Ctrl-C does."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator

import pytest


@contextlib.contextmanager
def cut_off() -> Iterator[Callable[[], None]]:
    """Yields Ctrl-C as a function. What stands inside has to end by it.

    Test runners may ignore Ctrl-C in their workers, so its usual meaning is restored here.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            yield lambda: signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
