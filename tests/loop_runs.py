"""Trainings of a network of two layers, for tests of the loop."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from dive_fast.training.loop import Finished, train
from dive_fast.training.state import Course

COURSE = Course(steps=9, batch_size=4, learning_rate=0.05, warmup_steps=2, ema_decay=0.7)


class Net(nn.Module):
    """Two layers, a batch norm between them."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layers = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def run(
    out: Path,
    course: Course = COURSE,
    at: Callable[[int], object] = lambda step: None,
    seen: list | None = None,
    **options,
) -> tuple[nn.Module, Finished]:
    """A training; ``at`` is called in the middle of every step, ``seen`` takes its predictions."""
    out.mkdir(exist_ok=True)
    net = Net()

    def loss_of(step: int, generator: torch.Generator) -> Tensor:
        x = torch.randn(course.batch_size, 3, generator=generator)
        with course.autocast(x.device):
            prediction = net(x)
        at(step)
        if seen is not None:
            seen.append((prediction.dtype, [p.detach().clone() for p in net.parameters()]))
        return (prediction.float() - x.sum(dim=1, keepdim=True)).square().mean()

    return net, train(net.train(), loss_of, course, out, progress=False, **options)


def same(one: nn.Module, other: nn.Module) -> bool:
    """In everything but the count of batches, which the average leaves alone."""
    a, b = one.state_dict(), other.state_dict()
    return all(torch.equal(a[name], b[name]) for name in a if "num_batches" not in name)


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "training.jsonl").read_text().splitlines()]


class Crash(Exception):
    """The process ends here, without a word."""


def crash_at(last: int) -> Callable[[int], None]:
    def at(step: int) -> None:
        if step == last:
            raise Crash

    return at
