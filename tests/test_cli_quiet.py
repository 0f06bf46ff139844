"""What the command line says beside its answers: sentences, and nothing of other libraries."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from command import call
from PIL import Image

from dive_fast.data import images


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def test_warnings_of_other_libraries_are_sentences(picture: Path, dit_dir, capsys, monkeypatch):
    read = images.Image.open

    def warning(*arguments):
        warnings.warn("Corrupt EXIF data.\n  Expecting to read 4 bytes.", stacklevel=1)
        return read(*arguments)

    monkeypatch.setattr(images.Image, "open", warning)
    arguments = ("--strategy", "enumerate", "--probes", 1)
    said = call(capsys, "classify", picture, "--model", dit_dir, *arguments)
    assert said.code == 0
    assert said.err == "dive-fast: Corrupt EXIF data. Expecting to read 4 bytes.\n"
    # Beside the command line they are Python's, as ever.
    with pytest.warns(UserWarning, match="Corrupt EXIF"):
        images.Image.open(picture)


def test_no_bars_and_remarks_of_other_libraries(picture: Path, sd: Path):
    """In a process of its own: libraries read their settings when they are loaded."""
    command = [sys.executable, "-m", "dive_fast", "classify", picture, "--model", sd]
    command += ["--classes", "cat,dog", "--strategy", "enumerate", "--probes", "1"]
    names = ("HF_HUB_DISABLE_PROGRESS_BARS", "TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY")
    environment = {k: v for k, v in os.environ.items() if k not in (*names, "HF_HUB_VERBOSITY")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and done.stderr == ""
    assert len(done.stdout.splitlines()) == 1
