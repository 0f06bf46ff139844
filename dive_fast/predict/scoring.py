"""Images and texts compared by a text-to-image model: the scorer that users call."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dive_fast.core.loss_weights import LossWeights
from dive_fast.core.probes import ProbeList
from dive_fast.core.requests import Answer, Losses, Search
from dive_fast.core.timesteps import TimestepWeights
from dive_fast.data.images import as_image, single_images
from dive_fast.engine import EngineOptions, EngineRecord, Finished, Job
from dive_fast.errors import DiveFastError, ImageError, ModelError, shown
from dive_fast.models import Source, check_place, load_model, resolve
from dive_fast.models.protocol import Model, optional
from dive_fast.models.text.prompted import PromptedModel
from dive_fast.predict.choosing import Choosing
from dive_fast.predict.items import as_texts, texts_at_once
from dive_fast.predict.predictor import Bar
from dive_fast.predict.scores import PairScores, Retrieval, Scores, standard_error
from dive_fast.strategies import resolve_strategy

BASELINES = ("unconditional", "mean")


class ImageTextScorer(Choosing):
    """A frozen text-to-image model that says how well texts explain images.

    Texts are prompts as they stand: no template is put around them, and the model's own classes
    are neither used nor changed. What was fitted to the model counts as far as it does not belong
    to its classes: beta and the timesteps; weights if asked for; not a shortlist or a head.

    Args:
        model, batch_size, options: see ``Predictor``.

    Raises:
        ModelError: the model's conditions are no prompts.

    Examples:
        >>> scorer = ImageTextScorer.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5")
        >>> scorer.score("photo.png", ["a dog chases a cat", "a cat chases a dog"]).losses
    """

    def __init__(
        self, model: Model, *, batch_size: int | None = None, options: EngineOptions | None = None
    ) -> None:
        super().__init__(model, batch_size=batch_size, options=options)
        prompted = isinstance(model, PromptedModel)
        if not prompted or optional(model, "layout_format") is not None:
            raise _no_text_model(model.name)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path | Source,
        *,
        dtype: torch.dtype | str = torch.float32,
        device: torch.device | str | None = None,
        batch_size: int | None = None,
        allow_pickle: bool = False,
        variant: str | None = None,
        lora: str | Path | None = None,
        lora_scale: float = 1.0,
        prediction_type: str | None = None,
        **engine: Any,
    ) -> ImageTextScorer:
        """From a diffusers directory, a single file, or a hub id of a text-to-image model.

        The arguments are those of ``DiffusionClassifier.from_pretrained``, without classes.

        Raises:
            ModelError: the source is unknown, broken, or no text-to-image model.
        """
        options = EngineOptions(**engine)
        check_place(dtype, device)
        source = resolve(
            source, allow_pickle=allow_pickle, variant=variant, prediction_type=prediction_type
        )
        if not source.family.text or source.finds_objects:
            raise _no_text_model(str(source))
        model = load_model(
            source,
            dtype=dtype,
            device=device,
            allow_pickle=allow_pickle,
            # A text-to-image model has to be asked about something.
            classes={"no text": ""},
            variant=variant,
            lora=lora,
            lora_scale=lora_scale,
        )
        scorer = cls(model, batch_size=batch_size, options=options)
        # What is fitted with a LoRA is not the directory's model.
        scorer.directory = source.own_directory if lora is None else None
        return scorer

    def score(
        self,
        images: Any,
        texts: Sequence[str],
        *,
        pixel_weights: Any = None,
        probes: int | ProbeList | None = None,
        seed: int = 0,
        timesteps: str | TimestepWeights | None = None,
        weights: str | LossWeights | None = None,
        unconditional: bool = False,
        progress: bool = False,
    ) -> Scores:
        """How well each text explains each image. Costs B x T x probes evaluations.

        Args:
            images: B of them, one or many, as ``DiffusionClassifier`` takes them.
            texts: T texts. Of such as are the same each has its own column.
            pixel_weights: what each pixel counts in the loss: float [h, w] of the picture's own
                size, at least 0, or a picture of grey levels; one for all images, or a list with
                one for each, where None counts all alike. They go through the picture's crop and
                are averaged over the area of each place of x0.
            probes: how many (100 if None), or a list of your own.
            seed: of the probes' noise.
            timesteps: as in ``DiffusionClassifier``.
            weights: "learned" lets losses count as the model's fitted weights say, a
                ``LossWeights`` as it says; all alike if None, as they were learned on classes.
            unconditional: measure the loss under no condition, too: one text more.
            progress: show a bar.

        Raises:
            DiveFastError: bad input.
            ImageError: an image or its weights cannot be used.
        """
        texts = as_texts(texts)
        every = torch.arange(len(texts))
        with torch.inference_mode(False):
            probe_list, beta = self._probes_of_scores(probes, seed, timesteps, weights)
            pictures = self._pictures(images, pixel_weights)
            asked = [every] * len(pictures)
            found = self._draws(pictures, texts, asked, probe_list, unconditional, progress)
        draws = torch.stack(found.draws)
        losses = draws.double().mean(dim=2)
        return Scores(
            losses=losses.float(),
            standard_errors=standard_error(draws),
            log_posterior=(-beta * losses).log_softmax(dim=1).float(),
            texts=texts,
            beta=beta,
            unconditional=found.unconditional,
            n_probes=len(probe_list),
            evaluations=found.evaluations,
            seconds=found.seconds,
            draws=draws,
        )

    def score_pairs(
        self,
        images: Any,
        texts: Sequence[str],
        *,
        pixel_weights: Any = None,
        probes: int | ProbeList | None = None,
        seed: int = 0,
        timesteps: str | TimestepWeights | None = None,
        weights: str | LossWeights | None = None,
        unconditional: bool = False,
        progress: bool = False,
    ) -> PairScores:
        """How well each text explains the image at its place. Costs B x probes evaluations.

        The arguments are those of ``score``, with as many texts as images; texts may repeat.

        Raises:
            DiveFastError: bad input, or another number of texts than of images.
        """
        texts = as_texts(texts)
        number = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        with torch.inference_mode(False):
            probe_list, beta = self._probes_of_scores(probes, seed, timesteps, weights)
            pictures = self._pictures(images, pixel_weights)
            if len(pictures) != len(texts):
                raise DiveFastError(
                    f"expected a text for each of {len(pictures)} images, got {len(texts)}."
                )
            asked = [torch.tensor([number[text]]) for text in texts]
            found = self._draws(pictures, [*number], asked, probe_list, unconditional, progress)
        draws = torch.cat(found.draws)
        return PairScores(
            losses=draws.double().mean(dim=1).float(),
            standard_errors=standard_error(draws),
            texts=texts,
            beta=beta,
            unconditional=found.unconditional,
            n_probes=len(probe_list),
            evaluations=found.evaluations,
            seconds=found.seconds,
            draws=draws,
        )

    def retrieve(
        self,
        images: Any,
        texts: Sequence[str],
        *,
        baseline: str = "unconditional",
        **asked: Any,
    ) -> Retrieval:
        """The best text of each image, and the best image of each text.

        The losses of different images cannot be compared: some images are harder whatever the text
        says. So images are ranked by what a text adds to a baseline of each image's own.

        Args:
            images, texts: as in ``score``, which takes the other arguments as well.
            baseline: "unconditional", the loss under no condition, which costs one text more; or
                "mean", over the texts, which depends on what they are.

        Raises:
            DiveFastError: bad input.
        """
        if not isinstance(baseline, str) or baseline not in BASELINES:
            raise DiveFastError(
                f"expected a baseline of {', '.join(BASELINES)}, got {shown(baseline)}."
            )
        scores = self.score(images, texts, unconditional=baseline == "unconditional", **asked)
        if baseline == "unconditional":
            return Retrieval(scores, scores.lift(), baseline)
        losses = scores.losses.double()
        above = losses.mean(dim=1, keepdim=True) - losses
        return Retrieval(scores, (scores.beta * above).float(), baseline)

    def _probes_of_scores(
        self,
        probes: Any,
        seed: int,
        timesteps: str | TimestepWeights | None,
        weights: str | LossWeights | None,
    ) -> tuple[ProbeList, float]:
        """What every text is measured on, and the inverse temperature of such losses."""
        every = resolve_strategy("enumerate", None, {})
        beta = self._beta(self.learned_weights(every, probes, weights))
        return self.probe_list(every, probes, seed, timesteps, weights), beta

    def _pictures(
        self, images: Any, pixel_weights: Any
    ) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        """x0 of each image, and what its places count; one whole image at a time is held."""
        singles = single_images(images, self.model.image_shape[0])
        weights = _one_each(pixel_weights, len(singles))
        found = []
        for number, (image, given) in enumerate(zip(singles, weights, strict=True)):
            try:
                found.append(self._prepared(as_image(image), given))
            except ImageError as error:
                if len(singles) == 1:
                    raise
                raise ImageError(f"image {number}: {error}") from error
        return found

    def _draws(
        self,
        pictures: Sequence[tuple[torch.Tensor, torch.Tensor | None]],
        texts: Sequence[str],
        asked: Sequence[torch.Tensor],
        probes: ProbeList,
        unconditional: bool,
        progress: bool,
    ) -> _Measured:
        """The losses of the texts that are asked of each picture, by the probes' units.

        Args:
            texts: distinct or not; as many at a time as there is room for are encoded.
            asked: for each picture int64, increasing, rows of ``texts``.
        """
        found = _Measured(len(pictures))
        at_once = texts_at_once(self.model.text.dim)
        starts = range(0, len(texts), at_once)
        parts = [[rows[(s <= rows) & (rows < s + at_once)] - s for rows in asked] for s in starts]
        total = sum(len(rows) > 0 for part in parts for rows in part)
        seen, record = set(), EngineRecord()
        with Bar(total if progress else None) as (bar, on_batch):
            for start, part in zip(starts, parts, strict=True):
                vocabulary = self.model.vocabulary_of(texts[start : start + at_once])
                jobs = []
                for i, (rows, (x0, weights)) in enumerate(zip(part, pictures, strict=True)):
                    if len(rows):
                        null = vocabulary.unconditional if unconditional and i not in seen else None
                        seen.add(i)
                        jobs.append(Job(i, x0, _measure(rows, null, probes), None, weights))
                for done in self._run_part(jobs, probes, "l2", on_batch, vocabulary, record):
                    found.add(done)
                    bar.update()
        return found


class _Measured:
    """What was measured of each picture.

    Attributes:
        draws: of each picture, float32 [n, U] of the texts that were asked of it, in their order.
        unconditional: float32 [B], or None.
        evaluations, seconds: of all.
    """

    def __init__(self, n: int) -> None:
        self._parts: list[list[torch.Tensor]] = [[] for _ in range(n)]
        self._null = torch.full((n,), torch.nan)
        self.evaluations, self.seconds = 0, 0.0

    def add(self, done: Finished) -> None:
        found = done.answer.trace
        self._parts[done.key].append(found["draws"])
        if "null" in found:
            self._null[done.key] = found["null"].double().mean().float()
        self.evaluations += done.evaluations
        self.seconds += done.seconds

    @property
    def draws(self) -> list[torch.Tensor]:
        return [torch.cat(parts) for parts in self._parts]

    @property
    def unconditional(self) -> torch.Tensor | None:
        return None if self._null.isnan().all() else self._null


def _measure(rows: torch.Tensor, null: torch.Tensor | None, probes: ProbeList) -> Search:
    """The losses of texts and, where it is asked for, of no condition, by the probes' units."""
    every, found = torch.arange(len(probes)), {}
    losses = yield Losses(rows, every)
    found["draws"] = _by_unit(losses, probes.unit)
    if null is not None:
        found["null"] = yield Losses(null[None], every)
    nothing = torch.empty(0)
    return Answer(0, nothing, nothing, found)


def _by_unit(losses: torch.Tensor, unit: int) -> torch.Tensor:
    """[n, K] as the means of units [n, K / unit]; single probes where the last unit is no whole."""
    unit = unit if losses.shape[1] % unit == 0 else 1
    return losses.unflatten(1, (-1, unit)).mean(dim=2)


def _one_each(pixel_weights: Any, n: int) -> list[Any]:
    """The weights of each image: a list holds one for each, what else is given is for all.

    Raises:
        DiveFastError: a list of another length.
    """
    if not isinstance(pixel_weights, list | tuple):
        return [pixel_weights] * n
    if len(pixel_weights) != n:
        raise DiveFastError(
            f"expected pixel weights for each of {n} images, got {len(pixel_weights)}."
        )
    return list(pixel_weights)


def _no_text_model(name: str) -> ModelError:
    return ModelError(
        f"expected a text-to-image model, whose conditions are prompts, got {name}, which has "
        "classes or layouts of its own."
    )
