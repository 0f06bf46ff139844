"""What every training of the zoo shares: learning rate, averaged weights, state on disk, log."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Protocol

import torch

from dive_fast.errors import RunError

LOG = "training.jsonl"
STATE = "training.pt"


class Course(Protocol):
    """What of a training's configuration decides its learning rate."""

    steps: int
    learning_rate: float
    warmup_steps: int


def prepare_directory(out: Path) -> None:
    """Makes the directory of a model that is to be trained.

    Raises:
        RunError: it cannot be made, or holds a finished model.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{out} cannot be made a directory: {error.strerror}.") from error
    check_unfinished(out)


def check_unfinished(out: Path) -> None:
    """That a model can be trained there; for those who have to read much before.

    Raises:
        RunError: it holds a finished model.
    """
    # dive_fast.json comes last: a model of ours without it was cut off while it was measured.
    unfinished = (out / LOG).exists() and not (out / "dive_fast.json").exists()
    if (out / "model_index.json").exists() and not unfinished:
        raise RunError(f"{out} holds a model already; choose another --out.")


def learning_rate_at(step: int, config: Course) -> float:
    """Linear warm-up, then a half cosine to zero."""
    warm = min(1.0, (step + 1) / config.warmup_steps)
    return config.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * step / config.steps))


def take_step(
    optimizer: torch.optim.Optimizer, loss: torch.Tensor, step: int, config: Course
) -> None:
    """One step down the gradient of ``loss``, whose norm is cut at 1."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate_at(step, config)
    optimizer.zero_grad()
    loss.backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


def average_into(
    ema: list[torch.Tensor], parameters: list[torch.nn.Parameter], step: int, decay: float
) -> None:
    """Moves the exponential moving average on by one step."""
    # A short memory at first, else the average would hold the random start for long.
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(ema, [p.detach() for p in parameters], 1 - decay)


def copy_into(parameters: list[torch.nn.Parameter], values: list[torch.Tensor]) -> None:
    """Overwrites parameters, for instance by their averages."""
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)


def read_state(out: Path, config: dict) -> dict | None:
    """The state that an unfinished training left in ``out``, or None.

    Raises:
        RunError: the state is of another configuration, or damaged.
    """
    path = out / STATE
    if not path.exists():
        return None
    try:
        state = torch.load(path, weights_only=True)
    except Exception as error:  # zip, pickle and torch each raise their own kinds
        raise RunError(
            f"{path} is damaged and cannot be resumed from; remove it to start anew."
        ) from error
    if state["config"] != config:
        raise RunError(
            f"{out} holds a training run with another configuration or other data; choose another "
            "--out."
        )
    return state


def write_state(out: Path, state: dict) -> None:
    """Writes it so that it is there whole or not at all.

    Raises:
        RunError: it cannot be written.
    """
    path = out / STATE
    partial = path.with_suffix(".partial")
    try:
        torch.save(state, partial)
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # torch tells of a full disk as a RuntimeError
        partial.unlink(missing_ok=True)
        raise RunError(f"{path} cannot be written: is the disk full?") from error


def log_losses(out: Path, step: int, losses: dict[str, float]) -> None:
    """Appends a line to the log."""
    rounded = {name: round(loss, 5) for name, loss in losses.items()}
    with open(out / LOG, "a") as log:
        log.write(json.dumps({"step": step, **rounded}) + "\n")
