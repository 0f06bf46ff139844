"""Each item's own candidates: the part of ``ImageTextScorer`` that chooses."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from PIL import Image

from dive_fast.core.loss_weights import LossWeights
from dive_fast.core.probes import ProbeList
from dive_fast.core.timesteps import TimestepWeights
from dive_fast.core.vocabulary import Vocabulary
from dive_fast.data.images import as_image, image_to_tensor
from dive_fast.data.pixel_weights import as_pixel_weights, on_grid
from dive_fast.engine import EngineRecord, Finished, Job
from dive_fast.errors import DiveFastError, ModelError, shown
from dive_fast.models.text.prompted import PromptedModel
from dive_fast.predict.arguments import as_progress
from dive_fast.predict.classification import log_posterior
from dive_fast.predict.items import Item, as_items, in_chunks
from dive_fast.predict.predictor import Bar, Predictor
from dive_fast.predict.scores import Choice, margin
from dive_fast.strategies import Strategy, Task, resolve_strategy


class Choosing(Predictor):
    """A model of prompts that chooses among each item's own; see ``ImageTextScorer``."""

    model: PromptedModel

    def choose(
        self,
        items: Iterable[Sequence[Any]],
        *,
        strategy: str | Strategy = "race",
        probes: int | ProbeList | None = None,
        seed: int = 0,
        timesteps: str | TimestepWeights | None = None,
        weights: str | LossWeights | None = None,
        keep_going: bool = False,
        progress: int | None = None,
        **settings: Any,
    ) -> Iterator[tuple[Any, Choice]]:
        """Chooses among each item's own candidates, and yields (key, choice) as they are found.

        Any strategy runs, over the item's candidates alone. Items are read a chunk at a time, and
        each distinct text of a chunk is encoded once.

        Args:
            items: (key, image, texts) or (key, image, texts, pixel_weights) each; read lazily.
                Texts are two or more that differ to the model; pixel weights as in ``score``.
            strategy, probes, seed, timesteps, settings: as in ``DiffusionClassifier``.
            weights: as in ``score``.
            keep_going: an item that cannot be used comes as its error, (key, DiveFastError), and
                the rest go on; otherwise it ends the stream.
            progress: the number of items if a bar shall be shown.

        Raises:
            DiveFastError: bad input, or two candidates that are the same to the text encoder.
            ImageError: an image or its weights cannot be used.
        """
        progress = as_progress(progress)
        chosen = resolve_strategy(strategy, None, settings)
        probe_list = self.probe_list(chosen, probes, seed, timesteps, weights)
        beta = self._beta(self.learned_weights(chosen, probes, weights))
        record = EngineRecord()
        with Bar(progress) as (bar, on_batch):
            for chunk in in_chunks(as_items(items), self.model.text.dim):
                failed: deque[tuple[Any, DiveFastError]] = deque()
                union = {text: None for item in chunk for text in item.candidates}
                vocabulary = self.model.vocabulary_of([*union]) if union else None
                row = {text: i for i, text in enumerate(union)}
                jobs = self._item_jobs(
                    chunk, vocabulary, row, chosen, probe_list, seed,
                    failed if keep_going else None,
                )  # fmt: skip
                run = self._run_part(jobs, probe_list, chosen.loss, on_batch, vocabulary, record)
                for finished in run:
                    while failed:
                        bar.update()
                        yield failed.popleft()
                    bar.update()
                    item = chunk[finished.key]
                    yield item.key, self._choice(item, finished, beta)
                for entry in failed:
                    bar.update()
                    yield entry

    def identity(
        self,
        *,
        strategy: str | Strategy = "race",
        probes: int | ProbeList | None = None,
        seed: int = 0,
        timesteps: str | TimestepWeights | None = None,
        weights: str | LossWeights | None = None,
        **settings: Any,
    ) -> dict[str, Any]:
        """What decides the answers of ``choose`` beside the items, for JSON."""
        chosen = resolve_strategy(strategy, None, settings)
        found = self._identity(chosen, probes, seed, timesteps, weights)
        # Of the model's own classes, which are not asked about.
        own = self.model.classes.to_dict()
        return {**found, "model": {k: v for k, v in found["model"].items() if k not in own}}

    def _item_jobs(
        self,
        chunk: Sequence[Item],
        vocabulary: Vocabulary | None,
        row: dict[str, int],
        strategy: Strategy,
        probes: ProbeList,
        seed: int,
        failed: deque[tuple[Any, DiveFastError]] | None,
    ) -> Iterator[Job]:
        """The jobs of a chunk, each known by its place; what cannot be one goes to ``failed``."""
        for number, item in enumerate(chunk):
            try:
                if item.error is not None:
                    raise item.error
                rows = torch.tensor([row[text] for text in item.candidates])
                own = self._own_vocabulary(item, vocabulary, rows)
                x0, weights = self._prepared(as_image(item.image), item.pixel_weights)
                search = strategy.search(Task(own, probes, seed))
                yield Job(number, x0, search, rows, weights)
            except DiveFastError as error:
                told = type(error)(f"item {shown(item.key)}: {error}")
                if failed is None or isinstance(error, ModelError):
                    raise told from error
                failed.append((item.key, told))

    def _own_vocabulary(self, item: Item, vocabulary: Vocabulary, rows: torch.Tensor) -> Vocabulary:
        """The item's candidates alone.

        Raises:
            DiveFastError: two of them are the same to the text encoder.
        """
        first, n = int(rows[0]), len(rows)
        # A view where the rows follow one another, as of candidates that no earlier item has.
        consecutive = bool((rows == torch.arange(first, first + n)).all())
        table = vocabulary.table
        table = table[first : first + n] if consecutive else table[rows]
        if (twins := self.model.text.twins(item.candidates, table)) is not None:
            one, other = (item.candidates[i] for i in twins)
            raise DiveFastError(
                f"expected candidates that the text encoder tells apart, got {one!r} and "
                f"{other!r}, which are the same to it."
            )
        return Vocabulary(table, item.candidates, vocabulary.unconditional, shape=vocabulary.shape)

    def _choice(self, item: Item, finished: Finished, beta: float) -> Choice:
        answer = finished.answer
        posterior = log_posterior(answer, beta)
        if posterior.isnan().any():
            raise ModelError(
                f"expected finite losses from {self.model.name} in {self.model.dtype}, got NaN or "
                f"infinity: its weights, its schedule or this precision cannot be right."
            )
        return Choice(
            index=answer.index,
            text=item.candidates[answer.index],
            texts=item.candidates,
            losses=answer.losses,
            n_probes=answer.n_probes,
            log_posterior=posterior,
            margin=margin(posterior, answer.index),
            evaluations=finished.evaluations,
            seconds=finished.seconds,
        )

    def _prepared(
        self, picture: Image.Image, pixel_weights: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x0 [C, h, w] of an upright picture, and what its places count [h, w].

        Raises:
            ImageError: the picture or the weights cannot be used.
        """
        channels, size, _ = self.model.image_shape
        weights = None
        if pixel_weights is not None:
            given = as_pixel_weights(pixel_weights, picture.size)
            weights = on_grid(given, size, self.model.latent_shape[1:])
        pixels = image_to_tensor(picture, size, channels)
        # Cloned: a tensor made in inference mode cannot take part in a backward.
        return self.encode_pixels(pixels[None])[0].detach().float().clone(), weights
