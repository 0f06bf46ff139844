"""What a run was computed with: versions, machine, commit."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import dive_fast
from dive_fast.predict.predictor import Predictor


def machine() -> dict[str, Any]:
    """Versions, machine and commit, for the record; a run may be resumed under others."""
    import diffusers

    return {
        "dive_fast": dive_fast.__version__,
        "commit": _commit(),
        "torch": str(torch.__version__),  # its own class cannot be loaded weights-only
        "diffusers": diffusers.__version__,
        "transformers": _version("transformers"),
        "pillow": _version("pillow"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
    }


def environment(predictor: Predictor) -> dict[str, Any]:
    """``machine()`` and how the classifier, detector or scorer runs on it."""
    return {
        **machine(),
        "model": predictor.model.name,
        "device": str(predictor.model.device),
        "batch_size": predictor.batch_size,
        "engine": dataclasses.asdict(predictor.options),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the checkout that this package runs from, if it is one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
