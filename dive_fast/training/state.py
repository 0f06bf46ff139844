"""What a step of a training changes, and how it lies on disk.

    theta_k+1 = AdamW(theta_k, g_k, lr_k)        g_k: the loss's gradient, its norm cut at 1
    lr_k      = lr min(1, (k + 1) / warmup) (1 + cos(pi k / steps)) / 2
    ema_k+1   = d_k ema_k + (1 - d_k) theta_k+1   d_k = min(ema_decay, (1 + k) / (10 + k)), d_0 = 0

The average (``diffusers.training_utils.EMAModel``) has a short memory at first, else it would hold
the random start for long.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dive_fast.core.files import replacing
from dive_fast.errors import RunError


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


def learning_rate_at(step: int, course: Course) -> float:
    """Linear warm-up, then a half cosine to zero."""
    warm = min(1.0, (step + 1) / course.warmup_steps)
    return course.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * step / course.steps))


class State:
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
