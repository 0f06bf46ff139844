"""TensorBoard, Weights & Biases and Trackio; each is imported when it is opened."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from dive_fast.core.files import replacing
from dive_fast.logs.protocol import Logger

PROJECT = "dive_fast"
# Seconds until what was logged is in the file: one looks while it runs.
FLUSH_SECONDS = 10
SUMMARY = "summary/"
# Of a run in the services that know runs by their name: resumed, it goes on there as well.
RUN_ID = ".log_id"


@dataclass(frozen=True)
class Sitting:
    """One process's part of a run, as a service wants to know it.

    Attributes:
        out: the run's directory, which exists.
        config: plain values for JSON.
        step: where it goes on; 0 at the start.
        target: what the user named behind the colon: a directory, or a project.
    """

    out: Path
    config: Mapping[str, Any]
    step: int
    target: str | None

    @property
    def name(self) -> str:
        """What people call the run: its directory."""
        return self.out.resolve().name

    def run_id(self) -> str:
        """The same in all sittings of the run and in no other run; the first one makes it."""
        path = self.out / RUN_ID
        with contextlib.suppress(FileNotFoundError, UnicodeDecodeError):
            if (stored := path.read_text(encoding="ascii").strip()).isalnum():
                return stored
        made = secrets.token_hex(4)
        with replacing(path) as file:
            file.write(f"{made}\n".encode())
        return made


class TensorBoard:
    """Event files in ``OUT/tensorboard``, or in the directory that was named."""

    target: ClassVar[str] = "DIR"

    def __init__(self, sitting: Sitting) -> None:
        from torch.utils.tensorboard import SummaryWriter

        directory = sitting.target or sitting.out / "tensorboard"
        # What a sitting that was killed had logged beyond its last record is taken back.
        purge = sitting.step + 1 if sitting.step else None
        self._writer = SummaryWriter(directory, purge_step=purge, flush_secs=FLUSH_SECONDS)
        self._step = sitting.step
        config = json.dumps(sitting.config, indent=2)
        self._writer.add_text("config", f"```json\n{config}\n```", sitting.step)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)
        self._step = step

    def finish(self, summary: Mapping[str, float] | None) -> None:
        for name, value in (summary or {}).items():
            self._writer.add_scalar(f"{SUMMARY}{name}", value, self._step)
        self._writer.close()


class WandB:
    """A run of Weights & Biases; its environment variables (``WANDB_MODE``, ...) hold."""

    target: ClassVar[str] = "PROJECT"

    def __init__(self, sitting: Sitting) -> None:
        import wandb

        offline = os.environ.get("WANDB_MODE") == "offline"
        self._run = wandb.init(
            project=sitting.target or os.environ.get("WANDB_PROJECT") or PROJECT,
            name=os.environ.get("WANDB_NAME") or sitting.name,
            id=sitting.run_id(),
            # Nothing is known of a run's past without its server.
            resume=None if offline else "allow",
            dir=os.environ.get("WANDB_DIR") or sitting.out,
            config=dict(sitting.config),
            # A run that the caller has open stays so, and our terminal is not a figure.
            reinit="create_new",
            settings=wandb.Settings(console="off"),
        )

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log(dict(figures), step=step)

    def finish(self, summary: Mapping[str, float] | None) -> None:
        if summary is None:
            self._run.finish(exit_code=1)
            return
        self._run.summary.update(dict(summary))
        self._run.finish()


class Trackio:
    """A run of Trackio, on this machine if its environment variables name no server or Space.

    Trackio has one run open at a time: a caller's own is finished.
    """

    target: ClassVar[str] = "PROJECT"

    def __init__(self, sitting: Sitting) -> None:
        import trackio

        self._trackio = trackio
        self._step = sitting.step
        # A run goes by its name there, and "auto" is the name of many a directory.
        name = f"{sitting.name}-{sitting.run_id()}"
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for answers
            self._run = trackio.init(
                sitting.target or PROJECT, name=name, config=dict(sitting.config), resume="allow"
            )

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log(dict(figures), step=step)
        self._step = step

    def finish(self, summary: Mapping[str, float] | None) -> None:
        with contextlib.redirect_stdout(sys.stderr):
            if summary:
                named = {f"{SUMMARY}{name}": value for name, value in summary.items()}
                self._run.log(named, step=self._step)
            # Not run.finish(): Trackio would finish what it holds for open again, at exit.
            self._trackio.finish()


LOGGERS: dict[str, Callable[[Sitting], Logger]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "trackio": Trackio,
}
