"""Heads on the network's features, learned from images: part of ``DiffusionClassifier``.

Layer and timestep are chosen on a validation part, as in linear probes of diffusion models
(Mukhopadhyay et al. 2023, arXiv 2307.08702; Xiang et al. 2023, arXiv 2303.09769).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from dive_fast.core.head import KINDS, MOST_CELLS, Head, in_cells, recall_at
from dive_fast.core.numbers import is_number, whole, whole_seed
from dive_fast.core.probes import ProbeList, check_count
from dive_fast.core.requests import Answer, Features, Search
from dive_fast.core.shortlist import digest
from dive_fast.errors import DiveFastError, shown
from dive_fast.models.layers import find_layer
from dive_fast.predict.arguments import check_head
from dive_fast.predict.calibration import as_labels
from dive_fast.predict.chunks import Chunks
from dive_fast.predict.features import FeatureExtractor
from dive_fast.predict.head_choice import CHOICE_IMAGES, GRIDS, Learner, Trial, split, subset
from dive_fast.strategies import Auto

LAYERS = 6  # blocks that are tried, spread over all
TIMESTEPS = (0.02, 0.05, 0.1, 0.2, 0.4)  # of T; the nearest of the default probe list are tried
RECALL_IMAGES = 200  # held-out images that are answered by ``auto`` for ``Head.recall``
NOISES = 64  # image i meets the noise i mod 64, so that a head suits the noise of any probe list
ROWS_A_FILE, SEARCHES_A_FILE = 60_000, 20  # of losses and of answers: what a kill may lose
MOST_BYTES = 4 << 30  # of the features of all images


@dataclass(frozen=True)
class FittedHead:
    """A head, and how it was chosen.

    Attributes:
        head: trained on all images; its ``recall`` is that of one trained without the held-out.
        trials: every layer, timestep and grid that was tried, under a ridge; of score 0 where there
            was nothing to choose.
        score: of the head of the training part on the held-out images, as in ``Trial``.
        held_out: how many those are.
        penalty: of the training: C of the logistic regression, alpha of the ridge, decay of AdamW.
    """

    head: Head
    trials: tuple[Trial, ...]
    score: float
    held_out: int
    penalty: float


class Probing(FeatureExtractor):
    """The part of ``DiffusionClassifier`` that learns heads on features, and applies them."""

    def fit_head(
        self,
        images: Any = None,
        labels: Any = None,
        *,
        latents: torch.Tensor | None = None,
        head: str = "linear",
        layer: str | int | None = None,
        timestep: int | None = None,
        grid: int | None = None,
        validation: float = 0.2,
        probes: int = 24,
        seed: int = 0,
        cache: str | Path | None = None,
        progress: bool = False,
    ) -> FittedHead:
        """Learns what features say of the classes; docs/probe.md says how and what it costs.

        Args:
            images, latents: as in ``__call__``.
            labels: whole numbers [B], rows of the vocabulary; none for "losses".
            head: "linear", logistic regression of the labels on features; "attention", the same on
                tokens that a learned query pools; "losses", ridge regression of the losses
                of all classes, which needs no labels.
            layer: a name of ``layers``, or an index into them; chosen among ``LAYERS`` if None.
            timestep: chosen among ``TIMESTEPS`` if None.
            grid: activations are averaged over so many times so many cells; chosen among ``GRIDS``
                if None. Of kind "attention" for the choice of the layer alone.
            validation: share of the images that choices are made by.
            probes: of kind "losses", on which every class is measured.
            seed: of the noises, the validation part and the training.
            cache: a folder where features and losses are kept, so that a call that was killed goes
                on. What they are of is in the names, so calls may share one.
            progress: show a bar.

        Raises:
            DiveFastError: bad input, too few images, or images of one class.
            RunError: the folder cannot be written.
        """
        if not isinstance(head, str) or head not in KINDS:
            raise DiveFastError(f"expected a head of {', '.join(KINDS)}, got {shown(head)}.")
        if (labels is None) != (head == "losses"):
            need = "without labels" if head == "losses" else "from labels"
            raise DiveFastError(f"a head of kind {head!r} is learned {need}.")
        if not is_number(validation) or not 0 < validation < 1:
            raise DiveFastError(f"validation must lie between 0 and 1, got {shown(validation)}.")
        probes, seed = check_count(probes), whole_seed(seed)
        layers, timesteps = self.blocks_to_try(layer, timestep)
        grids = GRIDS if grid is None else (whole("grid", grid, 1, MOST_CELLS),)
        grids = grids[-1:] if head == "attention" else grids
        with torch.inference_mode(False):
            x0 = self._latents(images, latents)
            labels = None if labels is None else as_labels(labels, len(x0), len(self.names))
            parts = split(len(x0), labels, validation, seed)
            chunks = self._chunks(cache, seed)
            targets = self._mean_losses(x0, probes, seed, chunks) if labels is None else labels
            learner = Learner(head, targets, len(self.names), seed)
            look = partial(self._features, seed=seed, chunks=chunks)
            trials = self._trials(learner, x0, parts, layers, timesteps, grids, look, progress)
            at = max(trials, key=lambda trial: trial.score)
            features = look(x0, at.layer, at.timestep, None if head == "attention" else at.grid)
            weights, scores = learner.best(features, *parts)
            answers = (
                targets.argmin(dim=1)[parts[1]]
                if labels is None
                else self._answers(x0[parts[1][:RECALL_IMAGES]], seed, chunks)
            )
            recall = recall_at(scores[: len(answers)], answers)
            final = learner.train(features, torch.arange(len(x0)), weights.penalty)
        made = learner.head(final, at, digest(self.model.vocabulary.names), recall)
        score = learner.score(scores, parts[1])
        return FittedHead(made, tuple(trials), score, len(parts[1]), final.penalty)

    def head_scores(
        self,
        head: Head,
        images: Any = None,
        *,
        latents: torch.Tensor | None = None,
        seed: int = 1,
        cache: str | Path | None = None,
    ) -> torch.Tensor:
        """What a head says of images, one evaluation each: float32 [B, C], higher is better.

        Args:
            head: learned for these classes.
            images, latents: as in ``__call__``.
            seed: of the noises; for an honest figure another than the head was fitted with.
            cache: as in ``fit_head``.

        Raises:
            DiveFastError: no head, one for another model, or bad input.
            RunError: the folder cannot be written.
        """
        check_head(head, self.model)
        seed = whole_seed(seed)
        with torch.inference_mode(False):
            x0 = self._latents(images, latents)
            chunks = self._chunks(cache, seed)
            where = head.layer, head.timestep, head.grid
            features = self._features(x0, *where, seed=seed, chunks=chunks)
        return head.scores(features)

    def blocks_to_try(
        self, layer: str | int | None = None, timestep: int | None = None
    ) -> tuple[list[str], list[int]]:
        """The layers and the timesteps among which ``fit_head`` chooses.

        Raises:
            DiveFastError: no such layer, or a timestep out of range.
        """
        n_timesteps = len(self.model.schedule)
        if layer is not None:
            layers = [find_layer(self.model, layer)[0]]
        else:
            names = self.layers
            at = torch.linspace(0, len(names) - 1, min(LAYERS, len(names))).round().long()
            layers = [names[i] for i in at.unique().tolist()]
        if timestep is not None:
            return layers, [whole("timestep", timestep, 0, n_timesteps - 1)]
        # A search then reads the head at the timestep that it was learned for.
        met = self.probe_list(Auto()).timesteps
        nearest = [int(met[(met - u * n_timesteps).abs().argmin()]) for u in TIMESTEPS]
        return layers, sorted(set(nearest))

    def _trials(
        self,
        learner: Learner,
        x0: torch.Tensor,
        parts: tuple[torch.Tensor, torch.Tensor],
        layers: Sequence[str],
        timesteps: Sequence[int],
        grids: Sequence[int],
        look: Callable[..., torch.Tensor],
        progress: bool,
    ) -> list[Trial]:
        """Every layer and timestep under the finest grid, then the best of them under the others.

        Where there is nothing to choose, that one, with a score of 0.
        """
        finest, *others = sorted(grids, reverse=True)
        pairs = [(name, t) for name in layers for t in timesteps]
        if len(pairs) == 1 and not others:
            return [Trial(*pairs[0], finest, 0.0)]
        train, held = subset(*parts, max(CHOICE_IMAGES, 5 * len(self.names)))
        rows = torch.cat([train, held])

        def tried(layer: str, timestep: int, grid: int) -> Trial:
            features = look(x0[rows], layer, timestep, grid)
            return Trial(layer, timestep, grid, learner.tried(features, rows, len(train)))

        trials = [tried(*pair, finest) for pair in tqdm(pairs, unit="trial", disable=not progress)]
        best = max(trials, key=lambda trial: trial.score)
        return trials + [tried(best.layer, best.timestep, grid) for grid in others]

    def _features(
        self,
        x0: torch.Tensor,
        layer: str,
        timestep: int,
        grid: int | None,
        *,
        seed: int,
        chunks: Chunks,
    ) -> torch.Tensor:
        """Activations as ``head.in_cells`` lays them out, float32; image i with its own noise."""
        generator = torch.Generator().manual_seed(seed)
        shape = self.model.latent_shape
        noise = torch.stack([torch.randn(shape, generator=generator) for _ in range(NOISES)])
        probes = ProbeList(torch.full((NOISES,), timestep), noise)
        v0 = self.model.vocabulary.mean()[None]
        at, pool = torch.arange(NOISES)[:, None], "mean" if grid == 1 else None

        def compute(start: int, stop: int) -> torch.Tensor:
            jobs = (
                self._job(i, x0[i], _ask(Features(v0, at[i % NOISES], layer, pool), grid))
                for i in range(start, stop)
            )
            found = {f.key: f.answer.trace["features"] for f in self._run(jobs, probes)}
            features = torch.stack([found[i] for i in range(start, stop)])
            if (size := features[0].nbytes * len(x0)) > MOST_BYTES:
                raise DiveFastError(
                    f"the features of {len(x0)} images would take {size / 2**30:.1f} GiB, more "
                    f"than {MOST_BYTES >> 30} GiB: give fewer images, or choose a head that pools."
                )
            return features

        name = f"{layer}@{timestep}-{'tokens' if grid is None else grid}-{_content(x0)}"
        return chunks.get(name, len(x0), compute)

    def _mean_losses(
        self, x0: torch.Tensor, probes: int, seed: int, chunks: Chunks
    ) -> torch.Tensor:
        """What enumeration measures, its mean over the probes: float32 [B, C]."""
        probe_list = self.probe_list(Auto(), probes, seed)

        def compute(start: int, stop: int) -> torch.Tensor:
            return self.losses(latents=x0[start:stop], probes=probe_list).mean(dim=2)

        chunk = max(1, ROWS_A_FILE // (probes * len(self.names)))
        return chunks.get(f"losses-{probes}-{_content(x0)}", len(x0), compute, chunk)

    def _answers(self, x0: torch.Tensor, seed: int, chunks: Chunks) -> torch.Tensor:
        """The classes that ``auto`` names, int64 [B]."""

        def compute(start: int, stop: int) -> torch.Tensor:
            found = self(latents=x0[start:stop], strategy="auto", seed=seed)
            return torch.tensor([answer.index for answer in found])

        return chunks.get(f"answers-{_content(x0)}", len(x0), compute, SEARCHES_A_FILE).long()

    def _chunks(self, cache: str | Path | None, seed: int) -> Chunks:
        """Where what is computed is kept, under this model and seed."""
        if cache is None:
            return Chunks()
        if not isinstance(cache, str | os.PathLike):
            raise DiveFastError(f"expected cache to be a folder, got {shown(cache)}.")
        how = json.dumps(self.identity(strategy="auto", seed=seed), sort_keys=True)
        return Chunks(Path(cache) / digest([how]))


def _ask(request: Features, grid: int | None) -> Search:
    reply = yield request
    nothing = torch.empty(0)
    # Laid out at once: the activations of many images at all positions may not fit.
    return Answer(0, nothing, nothing, {"features": in_cells(reply[0], grid)[0]})


def _content(x0: torch.Tensor) -> str:
    """Tells one batch of latents from another."""
    values = x0.detach().cpu().float().contiguous()
    found = hashlib.sha256(str(list(values.shape)).encode())
    found.update(values.numpy().tobytes())
    return found.hexdigest()[:16]
