"""Decoders that print: libtiff writes what it finds damaged to the process's stderr by itself."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator

_STDERR = 2
_LOCK = threading.Lock()


@contextlib.contextmanager
def native_stderr_closed() -> Iterator[None]:
    """What libraries in C print is lost; the decoder's error comes as an exception besides."""
    with _LOCK, contextlib.ExitStack() as stack:
        try:
            kept = os.dup(_STDERR)
        except OSError:  # there is none
            yield
            return
        stack.callback(os.close, kept)
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), _STDERR)
        stack.callback(os.dup2, kept, _STDERR)
        yield
