"""What a class-conditional model learns, step by step, and how it is doing.

    e(y) = || target - network(x_t, t, y) ||^2 / dim
    loss = e(y) + lambda CE

target is eps (ddpm), eps - x0 (flow) or x0; CE, of ``classes_rivals``, is optional.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn

from dive_fast.core.convention import Convention
from dive_fast.models.autoencoder import Autoencoder
from dive_fast.training.classes_config import SCHEDULERS, ClassTrainingConfig
from dive_fast.training.classes_rivals import Contrast, lowest_cross_entropy, with_rivals
from dive_fast.training.classes_samples import draw_samples

# x0 float32 [B, C, h, w] of the pictures at rows int64 [B].
Draw = Callable[[Tensor, torch.Generator], Tensor]

# The course is judged by so many held-out pictures, rivals of their classes, and probes.
JUDGED, JUDGED_RIVALS, JUDGED_PROBES = 64, 9, 4
CROSS_ENTROPY = "cross_entropy"


class HeldOut(NamedTuple):
    """Pictures that are never trained on.

    Attributes:
        x0: float32 [N, C, h, w].
        labels: int64 [N].
        judging: the rows of those that may decide which step's weights are kept, int64 [M].
    """

    x0: Tensor
    labels: Tensor
    judging: Tensor


class Learner:
    """A network, what it learns, and how it is doing.

    Args:
        draw: x0 of training pictures by their rows.
        labels: of the training pictures.
    """

    def __init__(
        self,
        transformer: DiTTransformer2DModel,
        draw: Draw,
        labels: Tensor,
        held_out: HeldOut,
        names: tuple[str, ...],
        vae: Autoencoder | None,
        config: ClassTrainingConfig,
    ) -> None:
        self.transformer, self.draw, self.labels = transformer, draw, labels
        self.held_out = held_out
        self.names, self.vae, self.config = names, vae, config
        scheduler = SCHEDULERS[config.objective]()
        stated: dict[str, Any] = {"_class_name": type(scheduler).__name__, **scheduler.config}
        self.convention = Convention.from_config(stated)
        self.contrast = Contrast() if config.contrast else None
        self.device = transformer.device
        # All that is trained; eval mode switches off diffusers' own label dropout.
        self.trained = nn.ModuleList(filter(None, [transformer, self.contrast])).eval()
        self.trained.to(self.device)
        self.done = 0

    def loss_of(self, step: int, generator: torch.Generator) -> Tensor:
        """The loss of one batch: of all its pictures with rivals, or some without their class."""
        config = self.config
        rows = torch.randint(len(self.labels), (config.batch_size,), generator=generator)
        x0, y = self.draw(rows, generator), self.labels[rows]
        none = torch.rand(len(y), generator=generator) < config.label_dropout
        t = spread_timesteps(len(y), len(self.convention.schedule), generator)
        eps = torch.randn(x0.shape, generator=generator)
        self.done = step + 1
        own = torch.where(none, config.num_classes, y)
        if self.contrast is None:
            return self.errors(x0, own, t, eps).mean()
        asked = with_rivals(y, config.num_classes, config.rivals, generator)
        asked[:, 0] = own
        each = [part.repeat_interleave(asked.shape[1], dim=0) for part in (x0, t, eps)]
        errors = self.errors(each[0], asked.flatten(), *each[1:]).view(asked.shape)
        # Pictures shown without their class have nothing to tell apart.
        named = errors[~none.to(self.device)]
        return errors[:, 0].mean() + config.contrast * self.contrast(named)

    def errors(self, x0: Tensor, y: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """e(y) = || target - prediction ||^2 / dim, float32 [B] on the network's device."""
        schedule = self.convention.schedule
        a, s = schedule.a[t][:, None, None, None], schedule.s[t][:, None, None, None]
        target = {"flow": eps - x0, "sample": x0}.get(schedule.target, eps)
        given = (a * x0 + s * eps, self.convention.told(t), y)
        with self.config.autocast(self.device):
            found = self.transformer(*(each.to(self.device) for each in given)).sample
        return (found.float() - target.to(self.device)).square().mean(dim=(1, 2, 3))

    def measured(self, out: Path) -> dict[str, float]:
        """Of held-out pictures the loss with their class and with none; sometimes draws samples.

        With rivals ``CROSS_ENTROPY`` as well, see ``_cross_entropy``.
        """
        if self.done % self.config.samples_every == 0 or self.done == self.config.steps:
            draw_samples(self.transformer, self.convention, self.names, self.vae, out, self.done)
        x0, labels, _ = self.held_out
        generator = torch.Generator().manual_seed(self.config.seed)
        t = spread_timesteps(len(x0), len(self.convention.schedule), generator)
        eps = torch.randn(x0.shape, generator=generator)
        none = torch.full_like(labels, self.config.num_classes)
        asked = {"held_out": labels, "none": none}
        found = {name: self._each(x0, y, t, eps).mean().item() for name, y in asked.items()}
        if self.contrast is not None:
            found[CROSS_ENTROPY] = self._cross_entropy(generator)
        return found

    def _cross_entropy(self, generator: torch.Generator) -> float:
        """How well pictures are told from rivals by a few probes each, in nats.

        e(y) is the mean over the probes, whose timesteps and noises all classes share.
        """
        rows = self.held_out.judging[:JUDGED]
        x0, y = self.held_out.x0[rows], self.held_out.labels[rows]
        asked = with_rivals(y, self.config.num_classes, JUDGED_RIVALS, generator)
        n, k = asked.shape
        t = spread_timesteps(n * JUDGED_PROBES, len(self.convention.schedule), generator)
        eps = torch.randn(n * JUDGED_PROBES, *x0.shape[1:], generator=generator)
        by_probe = [
            self._each(x0.repeat_interleave(k, dim=0), asked.flatten(), *both).view(n, k)
            for both in zip(
                *(each.view(JUDGED_PROBES, n, *each.shape[1:]) for each in (t, eps)), strict=True
            )
        ]
        return lowest_cross_entropy(torch.stack(by_probe).mean(dim=0))

    def _each(self, x0: Tensor, y: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """``errors`` of any number of pictures, float32 [B] on the CPU.

        Args:
            t, eps: of as many, or of every so many pictures in a row the same.
        """
        k = len(x0) // len(t)
        t, eps = t.repeat_interleave(k, dim=0), eps.repeat_interleave(k, dim=0)
        split = (each.split(self.config.batch_size) for each in (x0, y, t, eps))
        return torch.cat([self.errors(*part).cpu() for part in zip(*split, strict=True)])


def spread_timesteps(n: int, n_timesteps: int, generator: torch.Generator) -> Tensor:
    """int64 [n], each uniform over the schedule, all of them evenly spread, in a random order."""
    u = (torch.randperm(n, generator=generator) + torch.rand(1, generator=generator)) / n
    return (u * n_timesteps).long().clamp(max=n_timesteps - 1)
