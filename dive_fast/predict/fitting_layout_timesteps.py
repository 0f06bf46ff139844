"""Where a detector's probes tell layouts apart: part of ``LayoutDetector``.

Of annotated images the annotated layout y and rivals y' with one thing wrong (``core.rivals``) are
measured in all bins of timesteps. A window of bins is worth

    d' = mean(D) / standard deviation of D over images and rivals,
    D  = mean over the window's probes of log l(y') - log l(y)

Of few images the best window is the luckiest of many, so probes are taken in the widest one whose
d' is within a standard error (of a jackknife over images) of the best. They count as the inverse of
the mean loss of their bin, so that each says as much as another. How many there are is not for
such rivals to say: they are coarse, and a search has to place sides by differences that are much
smaller.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dive_fast.core.numbers import whole_seed
from dive_fast.core.probes import ProbeList
from dive_fast.core.requests import Answer, Losses, Search
from dive_fast.core.rivals import rival_layouts
from dive_fast.core.timesteps import BINS, TimestepWeights
from dive_fast.data.coco import CocoDataset, expect_fitting_images
from dive_fast.data.coco.readable import readable
from dive_fast.data.images import squashed_tensor
from dive_fast.errors import DataError, DiveFastError, shown
from dive_fast.predict.layout_choice import LayoutChoice
from dive_fast.priors.tokens import fitting_layouts

PROBES_PER_BIN = 2
RIVALS = 4  # of each image
TINY = 1e-12  # a loss at least, so that it has a logarithm
NARROWEST = 2  # bins of a window


@dataclass(frozen=True)
class TimestepFit:
    """What a fit of a detector's timesteps found.

    Attributes:
        timesteps: as they are now on the model.
        apart: d' of the window, and of all bins.
        images: that were measured.
    """

    timesteps: TimestepWeights
    apart: tuple[float, float]
    images: int

    def __str__(self) -> str:
        chosen = [b for b, q in enumerate(self.timesteps.density) if q > 0]
        n = self.timesteps.n_timesteps
        low, high = chosen[0] * n // BINS, (chosen[-1] + 1) * n // BINS
        return (
            f"timesteps {low} to {high} tell layouts apart best: d' {self.apart[0]:.2f}, of all "
            f"timesteps {self.apart[1]:.2f}, on {self.images} images"
        )


class LayoutTimestepFitting(LayoutChoice):
    """The part of ``LayoutDetector`` that places its probes."""

    def fit_timesteps(
        self, data: CocoDataset, *, seed: int = 0, progress: bool = False
    ) -> TimestepFit:
        """Fits where probes are taken and what each counts.

        An image costs 5 x 40 evaluations. They are set on the model; ``save_fitted`` keeps them.

        Args:
            data: annotated images; those without an object that the model can write are left out.

        Raises:
            DataError: nothing is annotated, no class is known, or no image can be read.
            DiveFastError: no timestep tells annotated layouts from others.
        """
        if not isinstance(data, CocoDataset):
            raise DiveFastError(f"expected a CocoDataset to fit timesteps to, got {shown(data)}.")
        data.expect_objects("to fit timesteps to")
        expect_fitting_images(data)
        seed, n = whole_seed(seed), len(self.model.schedule)
        even = TimestepWeights(n, (1.0,) * BINS, (1.0,) * BINS)
        every = even.probes(PROBES_PER_BIN * BINS, tuple(self.model.latent_shape), seed)
        losses, same = self._rival_losses(data, every, seed, progress)
        bins = (every.timesteps * BINS // n).clamp(max=BINS - 1)
        low, high, apart = _window(losses, same, bins)
        if not apart[0] > 0:
            raise DiveFastError(
                "no timestep tells annotated layouts from others: train longer before fitting."
            )
        means = [float(losses[:, 0, bins == b].mean()) for b in range(BINS)]
        density = tuple(float(low <= b < high) for b in range(BINS))
        chosen = TimestepWeights(n, density, tuple(1 / mean for mean in means))
        self.model.timesteps = chosen
        return TimestepFit(chosen, apart, len(losses))

    def _rival_losses(
        self, data: CocoDataset, probes: ProbeList, seed: int, progress: bool
    ) -> tuple[Tensor, Tensor]:
        """Losses of annotated layouts and rivals, [N, 1 + R, K]; which are the annotated, [N, R].

        The losses are without the probes' weights.
        """
        form, table = self.model.layout_format, self.model.vocabulary.table
        fitting = fitting_layouts(data, form)
        rng = np.random.default_rng(seed)
        rivals, same = rival_layouts(fitting.tokens, form, RIVALS, rng)
        layouts = torch.cat([fitting.tokens[:, None], rivals], dim=1)
        rows = {data.images[i].id: row for row, i in enumerate(fitting.images.tolist())}
        channels, side, _ = self.model.image_shape
        unweighted = dataclasses.replace(probes, weights=None)
        every = torch.arange(len(probes))

        def jobs() -> Iterator[Any]:
            for key, picture in readable(image for image in data.images if image.id in rows):
                pixels = squashed_tensor(picture, side, channels)
                conditions = table[layouts[rows[key]]].flatten(1)
                search = _measured(conditions, every)
                yield self._job(key, self.encode_pixels(pixels[None])[0], search)

        found: dict[Any, Tensor] = {}
        for done in self._run(jobs(), unweighted, progress=len(rows) if progress else None):
            found[done.key] = done.answer.trace["losses"].double()
        if not found:
            raise DataError(f"{data.source}: expected an image that can be read, got none.")
        losses = torch.stack(list(found.values())).clamp_min(TINY)
        return losses, same[[rows[key] for key in found]]


def _measured(conditions: Tensor, probe_ids: Tensor) -> Search:
    losses = yield Losses(conditions, probe_ids)
    nothing = torch.empty(0)
    return Answer(0, nothing, nothing, {"losses": losses})


def _window(losses: Tensor, same: Tensor, bins: Tensor) -> tuple[int, int, tuple[float, float]]:
    """The window of bins [low, high), its d' and that of all bins."""
    ratios = losses.log()
    ratios = ratios[:, 1:] - ratios[:, :1]  # [N, R, K]
    of_bins = torch.stack([ratios[..., bins == b].sum(dim=2) for b in range(BINS)])
    counts = torch.tensor([int((bins == b).sum()) for b in range(BINS)])
    means = {
        (low, high): of_bins[low:high].sum(dim=0) / counts[low:high].sum()
        for low in range(BINS)
        for high in range(low + NARROWEST, BINS + 1)
    }
    worth = {window: _apart(mean[~same]) for window, mean in means.items()}
    best = max(worth, key=worth.__getitem__)
    least = worth[best] - _standard_error(means[best], same)
    low, high = max(
        (window for window in worth if worth[window] >= least),
        key=lambda window: (window[1] - window[0], worth[window]),
    )
    return low, high, (worth[low, high], worth[0, BINS])


def _apart(ratios: Tensor) -> float:
    """d' of the mean ratios of pairs, [P]."""
    spread = float(ratios.std()) if len(ratios) > 1 else 0.0
    return float(ratios.mean()) / spread if spread > 0 else 0.0


def _standard_error(mean: Tensor, same: Tensor) -> float:
    """Of d', by leaving out each image in turn; none of one image.

    Args:
        mean: of a window, [N, R].
        same: bool [N, R], pairs that do not count.
    """
    n = len(mean)
    if n == 1:
        return 0.0
    rows = torch.arange(n)
    without = [_apart(mean[rows != i][~same[rows != i]]) for i in range(n)]
    return math.sqrt((n - 1) * float(torch.tensor(without).double().var(correction=0)))
