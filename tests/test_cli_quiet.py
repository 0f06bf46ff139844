"""What the command line says beside its answers: sentences, and nothing of other libraries."""

from __future__ import annotations

import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from command import call
from diffusers import DiTTransformer2DModel
from PIL import Image

from dive_fast.data import images


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def test_warnings_of_other_libraries_are_sentences(picture: Path, dit_dir, capsys, monkeypatch):
    read = images.Image.open

    def warning(*arguments, **options):
        warnings.warn("Corrupt EXIF data.\n  Expecting to read 4 bytes.", stacklevel=1)
        return read(*arguments, **options)

    monkeypatch.setattr(images.Image, "open", warning)
    arguments = ("--strategy", "enumerate", "--probes", 1)
    said = call(capsys, "classify", picture, "--model", dit_dir, *arguments)
    assert said.code == 0
    assert said.err == "dive-fast: Corrupt EXIF data. Expecting to read 4 bytes.\n"
    # Beside the command line they are Python's, as ever.
    with pytest.warns(UserWarning, match="Corrupt EXIF"):
        images.Image.open(picture)


def test_no_bars_and_remarks_of_other_libraries(picture: Path, dit_dir, tmp_path: Path):
    """In a process of its own: libraries read their settings when they are loaded."""
    shutil.copytree(dit_dir, tmp_path / "sharded")
    transformer = DiTTransformer2DModel.from_pretrained(dit_dir / "transformer")
    (tmp_path / "sharded/transformer/diffusion_pytorch_model.safetensors").unlink()
    transformer.save_pretrained(tmp_path / "sharded/transformer", max_shard_size="9KB")
    command = [sys.executable, "-m", "dive_fast", "classify", picture, "--probes", "1"]
    command += ["--model", tmp_path / "sharded", "--strategy", "enumerate"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    assert len(done.stdout.splitlines()) == 1
