"""The checkpoints that a training left in a folder, in the order of its steps."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

from dive_fast.errors import ModelError, RunError, shown

FOLDER = "checkpoints"  # of our own trainers
LORA = "pytorch_lora_weights.safetensors"  # as diffusers' scripts call it
_INDEX = "model_index.json"


class Checkpoint(NamedTuple):
    """A folder of a training.

    Attributes:
        step: after which it was written.
        path: of the model directory, or of the LoRA's weights.
        is_lora: which of the two.
    """

    step: int
    path: Path
    is_lora: bool


def find_checkpoints(directory: str | os.PathLike[str]) -> list[Checkpoint]:
    """Those of a folder, or of its ``checkpoints``, with the lowest step first.

    A checkpoint is a folder whose name ends with the number of steps, such as ``checkpoint-500``:
    a model directory, or one with a LoRA as diffusers' training scripts write it. Our trainers'
    have averaged weights (EMA).

    Raises:
        RunError: there is no such folder.
        ModelError: it holds no checkpoints, one that is no model, or two of the same step.
    """
    given = Path(directory)
    if not given.is_dir():
        raise RunError(f"{given}: expected a folder of checkpoints, got none.")
    folder = given / FOLDER if (given / FOLDER).is_dir() else given
    found: dict[int, Checkpoint] = {}
    for path in sorted(folder.iterdir()):
        number = re.search(r"(?:^|[^0-9.])([0-9]{1,15})$", path.name)
        if number is None or not path.is_dir():
            continue
        checkpoint = _checkpoint(path, int(number.group(1)))
        if (other := found.get(checkpoint.step)) is not None:
            raise ModelError(
                f"{folder}: expected one checkpoint of each step, got {shown(other.path.name)} "
                f"and {shown(path.name)}."
            )
        found[checkpoint.step] = checkpoint
    if not found:
        raise ModelError(
            f"{folder}: expected folders of models with the number of steps at the end of their "
            "names, such as checkpoint-500, got none (of our own trainings: --checkpoints N)."
        )
    return [found[step] for step in sorted(found)]


def _checkpoint(path: Path, step: int) -> Checkpoint:
    if (path / _INDEX).is_file():
        return Checkpoint(step, path, is_lora=False)
    if (path / LORA).is_file():
        return Checkpoint(step, path / LORA, is_lora=True)
    raise ModelError(f"{path}: expected a model directory ({_INDEX}) or a LoRA ({LORA}), got none.")
