"""The training loop: from a loss to averaged weights, with all on disk that resuming needs.

    theta_k+1 = AdamW(theta_k, g_k, lr_k)        g_k: the loss's gradient, its norm cut at 1
    lr_k      = lr min(1, (k + 1) / warmup) (1 + cos(pi k / steps)) / 2
    ema_k+1   = d_k ema_k + (1 - d_k) theta_k+1   d_k = min(ema_decay, (1 + k) / (10 + k)), d_0 = 0

The average (``diffusers.training_utils.EMAModel``) has a short memory at first, else it would hold
the random start for long.
"""

from __future__ import annotations

import contextlib
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dive_fast.core.files import leftovers, replacing
from dive_fast.errors import RunError
from dive_fast.logs import Logger, LogTo, logging_to
from dive_fast.models.files.sidecar import FILE

LOG = "training.jsonl"
STATE = "training.pt"
LOG_EVERY, STATE_EVERY = 250, 250


@dataclass(frozen=True, kw_only=True)
class Course:
    """How long and how fast a model learns. A trainer's configuration adds what it is made of.

    Attributes:
        ema_decay: of the moving average of the weights, at most.
        seed: of all that is drawn.
        bf16: the network computes in bfloat16; its weights stay float32.
    """

    steps: int
    batch_size: int = 64
    learning_rate: float = 1e-3
    warmup_steps: int = 300
    weight_decay: float = 0.01
    ema_decay: float = 0.999
    seed: int = 0
    bf16: bool = False

    def autocast(self, device: torch.device) -> torch.autocast:
        """For the network's forward, and for nothing else: data and losses stay float32."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self.bf16)


class Keep(NamedTuple):
    """Checkpoints that a training leaves behind.

    Attributes:
        steps: after which.
        write: is told the number of steps; the model has its averaged weights and is in eval mode
            then.
    """

    steps: Collection[int]
    write: Callable[[int], None]


class Finished(NamedTuple):
    """What is known at the end: the held-out losses, and the time of all sittings together."""

    held_out: dict[str, float]
    seconds: float
    cpu_seconds: float


def train(
    model: nn.Module,
    loss_of: Callable[[int, torch.Generator], Tensor],
    course: Course,
    out: Path,
    *,
    identity: Mapping[str, Any] | None = None,
    held_out: Callable[[], dict[str, float]] = dict,
    keep: Keep | None = None,
    log_to: LogTo | None = None,
    log_every: int = LOG_EVERY,
    state_every: int = STATE_EVERY,
    progress: bool = True,
) -> Finished:
    """Trains in place; at the end the model holds its averaged weights and is in eval mode.

    Every ``log_every`` steps and at the end a line with the loss of the training, a running mean,
    and the held-out losses is appended to ``out/training.jsonl``. Every ``state_every`` steps, at
    the end and after Ctrl-C the whole state goes to ``out/training.pt``; a run that was cut off and
    is started again with the same course and identity goes on from there, to the same weights.

    Args:
        model: in the mode that it is to be trained in, on the device that it is trained on. A run
            may go on with another device; it is no part of the course.
        loss_of: from the number of a step, from 0, to its loss, a scalar. It draws from the
            generator that it is given, or from one that the number seeds, and from no other.
        out: an existing directory.
        identity: what else tells this training from others, in plain values.
        held_out: measures the model, which is in eval mode and has its averaged weights then; no
            gradients are kept. By default nothing is measured.
        keep: checkpoints, if any. They are no part of the course: a run may go on with others.
        log_to: where these losses and the learning rate go as well, see ``logs.check_log_to``.
        progress: shows a bar with the losses and the time that is left.

    Raises:
        RunError: ``out`` holds the state of a run with another course or identity, or a damaged
            one, or cannot be written; or the logger cannot be opened.
        DiveFastError: ``log_to`` is no logger, or needs a package that is not installed.
    """
    state = _State(model, course, {**asdict(course), **(identity or {})})
    state.read(out / STATE)
    for killed in leftovers(out / STATE):
        killed.unlink(missing_ok=True)
    (out / LOG).touch()
    measured: dict[str, float] = {}
    bar = tqdm(
        range(state.step, course.steps),
        initial=state.step,
        total=course.steps,
        disable=not progress,
        desc="train",
        unit="step",
    )
    with logging_to(log_to, out, state.identity, state.step) as logger:
        with bar, _late_interrupt() as interrupted:
            for step in bar:
                state.advance(loss_of(step, state.generator), course)
                done, stop = state.step, interrupted()
                if keep is not None and done in keep.steps:
                    with state.averages():  # before the state: a kill in between writes it again
                        keep.write(done)
                if stop or done % state_every == 0 or done == course.steps:
                    state.write(out / STATE)
                if stop:
                    raise KeyboardInterrupt
                if done % log_every == 0 and done < course.steps:
                    measured = state.measure(held_out)
                    _log(out, logger, state, course, measured)
                losses = {"loss": state.loss, **measured}
                shown = {name: f"{loss:.4f}" for name, loss in losses.items()}
                bar.set_postfix(shown, refresh=False)
        state.ema.copy_to(state.averaged)
        model.eval()
        measured = state.measure(held_out)
        _log(out, logger, state, course, measured)
        finished = Finished(measured, *state.spent())
        logger.finish({"loss": state.loss, **measured, "seconds": finished.seconds})
    return finished


class _State:
    """All that a step changes."""

    def __init__(self, model: nn.Module, course: Course, identity: dict[str, Any]) -> None:
        from diffusers.training_utils import EMAModel

        self.model, self.identity = model, identity
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, weight_decay=course.weight_decay)
        # Buffers are averaged as well (a batch norm's statistics belong to its weights): EMAModel
        # averages what asks for a gradient and copies the rest. These share the model's memory.
        self.averaged = [
            tensor.detach().requires_grad_()
            for tensor in (*model.parameters(), *model.buffers())
            if tensor.is_floating_point()
        ]
        self.ema = EMAModel(self.averaged, decay=course.ema_decay, foreach=True)
        self.generator = torch.Generator().manual_seed(course.seed)
        self.step, self.loss = 0, math.nan
        self._began = (time.perf_counter(), time.process_time())

    def advance(self, loss: Tensor, course: Course) -> None:
        """One step down the gradient of ``loss``."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate_at(self.step, course)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.ema.step(self.averaged)
        new = loss.item()
        self.loss = new if self.step == 0 else 0.99 * self.loss + 0.01 * new
        self.step += 1

    def measure(self, held_out: Callable[[], dict[str, float]]) -> dict[str, float]:
        """What ``held_out`` says of the averaged weights."""
        with self.averages():
            return held_out()

    @contextlib.contextmanager
    def averages(self) -> Iterator[None]:
        """Inside, the model has its averaged weights, is in eval mode and keeps no gradients."""
        was_training = self.model.training
        self.ema.store(self.averaged)
        self.ema.copy_to(self.averaged)
        try:
            self.model.eval()
            with torch.no_grad():
                yield
        finally:
            self.ema.restore(self.averaged)
            self.model.train(was_training)

    def spent(self) -> tuple[float, float]:
        """Seconds and CPU seconds since the first step, without the time between sittings."""
        wall, cpu = self._began
        return time.perf_counter() - wall, time.process_time() - cpu

    def read(self, path: Path) -> None:
        """Goes back to a state that was written, if there is one.

        Raises:
            RunError: it is another training's, or damaged.
        """
        if not path.exists():
            return
        try:
            saved = torch.load(path, weights_only=True, map_location=self.parameters[0].device)
            other = saved["config"] != self.identity
            if not other:
                self._restore(saved)
        except Exception as error:  # zip, pickle and torch each raise their own kinds
            raise RunError(
                f"{path} is damaged and cannot be resumed from; remove it to start anew."
            ) from error
        if other:
            raise RunError(
                f"{path.parent} holds a training run with another configuration or other data; "
                "choose another --out."
            )

    def _restore(self, saved: dict[str, Any]) -> None:
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.ema.load_state_dict(saved["ema"])
        self.generator.set_state(saved["generator"].cpu())
        self.step, self.loss = saved["step"], saved["loss"]
        wall, cpu = self._began
        self._began = (wall - saved["seconds"], cpu - saved["cpu_seconds"])

    def write(self, path: Path) -> None:
        """Writes it so that it is there whole or not at all.

        Raises:
            RunError: it cannot be written.
        """
        seconds, cpu_seconds = self.spent()
        content = {
            "config": self.identity,
            "step": self.step,
            "loss": self.loss,
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.state_dict(),
            "generator": self.generator.get_state(),
        }
        write_tensors(path, content)


def write_tensors(path: Path, content: dict[str, Any]) -> None:
    """``torch.save``, whole or not at all.

    Raises:
        RunError: it cannot be written.
    """
    try:
        with replacing(path) as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as error:  # torch tells of a full disk as a RuntimeError
        raise RunError(f"{path} cannot be written: is the disk full?") from error


@contextlib.contextmanager
def _late_interrupt() -> Iterator[Callable[[], bool]]:
    """Ctrl-C waits for the end of the step, where the state is whole; a second one does not wait.

    Yields whether there was one. Where Ctrl-C already means something else, or in a thread that it
    never reaches, nothing is changed.
    """
    asked = threading.Event()

    def note(*_: object) -> None:
        asked.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if ours:
        signal.signal(signal.SIGINT, note)
    try:
        yield asked.is_set
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def doubling_steps(count: int, steps: int) -> tuple[int, ...]:
    """``count`` numbers of steps, each about twice the one before and the last all; less if equal.

    step_k = round(steps / 2^(count - 1 - k))
    """
    found = (round(steps / 2 ** (count - 1 - k)) for k in range(count))
    return tuple(sorted({step for step in found if step > 0}))


def checkpoint_folder(out: Path, step: int) -> Path:
    """Where a checkpoint of a training into ``out`` lies: ``evaluation.checkpoints`` finds it."""
    return out / "checkpoints" / f"checkpoint-{step}"


def prepare_directory(out: Path) -> None:
    """Makes the directory of a model that is to be trained.

    Raises:
        RunError: it cannot be made, or holds a finished model.
    """
    make_directory(out)
    check_unfinished(out)


def make_directory(out: Path) -> None:
    """Makes a directory, if it is not there.

    Raises:
        RunError: it cannot be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{out} cannot be made a directory: {error.strerror}.") from error


def check_unfinished(out: Path) -> None:
    """That a model can be trained there; for those who have to read much before.

    Raises:
        RunError: it holds a finished model.
    """
    # dive_fast.json comes last: a model of ours without it was cut off while it was measured.
    unfinished = (out / LOG).exists() and not (out / FILE).exists()
    if (out / "model_index.json").exists() and not unfinished:
        raise RunError(f"{out} holds a model already; choose another --out.")


def learning_rate_at(step: int, course: Course) -> float:
    """Linear warm-up, then a half cosine to zero."""
    warm = min(1.0, (step + 1) / course.warmup_steps)
    return course.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * step / course.steps))


def _log(
    out: Path, logger: Logger, state: _State, course: Course, measured: dict[str, float]
) -> None:
    """The losses after a step, and the learning rate of it."""
    losses = {"loss": state.loss, **measured}
    log_losses(out, state.step, losses)
    rate = learning_rate_at(state.step - 1, course)
    logger.log(state.step, {**losses, "learning_rate": rate})


def log_losses(out: Path, step: int, losses: dict[str, float]) -> None:
    """Appends a line to the log."""
    rounded = {name: round(loss, 5) for name, loss in losses.items()}
    with open(out / LOG, "a") as log:
        log.write(json.dumps({"step": step, **rounded}) + "\n")
