"""Loads the compiled library, once, and remembers why when there is none."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import torch

LIBRARY_PATH = Path(__file__).parent.with_name("_C.so")
# Written by setup.py on every build, whether the extension was compiled or not.
BUILD_RECORD_PATH = Path(__file__).parent.with_name("_build_record.json")


@dataclass(frozen=True)
class NativeLibrary:
    """Outcome of loading the compiled library; `reason` is empty when it is loaded."""

    loaded: bool
    reason: str


@functools.cache
def load() -> NativeLibrary:
    """Loads the compiled library into torch's dispatcher; never raises, the references remain."""
    record = build_record()
    if not LIBRARY_PATH.exists():
        cause = record.get("reason") or "this copy of the package was never built"
        return NativeLibrary(loaded=False, reason=f"library not built: {cause}")
    try:
        torch.ops.load_library(str(LIBRARY_PATH))
    except OSError as error:
        built_for = record.get("torch", "an unknown torch")
        return NativeLibrary(
            loaded=False,
            reason=f"built for torch {built_for}, running {torch.__version__}: {error}",
        )
    return NativeLibrary(loaded=True, reason="")


def build_record() -> dict[str, str]:
    """What setup.py noted: `torch` (version built against) and `reason` (why nothing was built)."""
    try:
        record = json.loads(BUILD_RECORD_PATH.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}
