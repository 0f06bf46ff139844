"""Checkpoints that were cut off or changed on their way: told, or read as they were."""

from __future__ import annotations

import io
import random
from pathlib import Path

import pytest
import torch
from command import assert_refused, call

from dive_fast import ModelError
from dive_fast.models.layout_to_image.convert_read import read_checkpoint

WEIGHTS = {"a.weight": torch.arange(6.0).view(2, 3), "b.bias": torch.tensor([1, 2])}


def assert_weights(path: Path) -> None:
    state = read_checkpoint(path)
    assert state.keys() == WEIGHTS.keys()
    for key, weight in WEIGHTS.items():
        assert torch.equal(state[key], weight) and state[key].dtype == weight.dtype


def test_files_that_were_cut_or_changed(tmp_path, capsys) -> None:
    buffer = io.BytesIO()
    torch.save({"state_dict": WEIGHTS}, buffer)
    content, path = buffer.getvalue(), tmp_path / "model.ckpt"
    for n in range(4, len(content), len(content) // 40):
        path.write_bytes(content[:n])
        with pytest.raises(ModelError, match="cannot be read as a checkpoint"):
            read_checkpoint(path)
    said = call(capsys, "convert", path, "--out", tmp_path / "out")
    assert_refused(said, r"model.ckpt cannot be read as a checkpoint: it is truncated")
    generator = random.Random(0)
    for _ in range(200):
        spoilt = bytearray(content)
        spoilt[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        path.write_bytes(spoilt)
        try:  # what is not told from a whole file holds the same weights
            assert_weights(path)
        except ModelError as error:
            assert "\n" not in str(error)  # noqa: PT017
