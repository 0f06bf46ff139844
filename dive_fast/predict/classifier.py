"""The classifier that users call."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from dive_fast.core.head import Head
from dive_fast.core.loss_weights import LossWeights
from dive_fast.core.probes import ProbeList
from dive_fast.core.schedule import Schedule
from dive_fast.core.shortlist import digest
from dive_fast.core.timesteps import TimestepWeights
from dive_fast.engine import EngineOptions, Finished
from dive_fast.errors import DiveFastError, ModelError
from dive_fast.models import Source, check_place, load_model, resolve
from dive_fast.models.network import Call, GivenNetwork, Pixels
from dive_fast.models.text.prompts import Classes
from dive_fast.predict.arguments import (
    as_head,
    as_latents,
    as_pairs,
    as_prior,
    as_progress,
)
from dive_fast.predict.classification import (
    Classification,
    log_odds_bound,
    log_posterior,
    lowest_twin,
)
from dive_fast.predict.explaining import Explaining
from dive_fast.predict.fitting import Fitting
from dive_fast.predict.likelihood import Likelihoods
from dive_fast.predict.probing import Probing
from dive_fast.predict.segmenting import Segmenting
from dive_fast.strategies import Strategy, Task, resolve_strategy


class DiffusionClassifier(Explaining, Fitting, Likelihoods, Probing, Segmenting):
    """A frozen conditional diffusion model as classifier.

    Args:
        model, batch_size, options: see ``Predictor``.

    Examples:
        >>> clf = DiffusionClassifier.from_pretrained("digits")
        >>> clf("three.png")[0].label
        'three'
    """

    _weighted: ClassVar[bool] = True

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path | Source,
        *,
        dtype: torch.dtype | str = torch.float32,
        device: torch.device | str | None = None,
        batch_size: int | None = None,
        allow_pickle: bool = False,
        timestep_embedding: str = "auto",
        classes: Classes | None = None,
        templates: Sequence[str] | None = None,
        average: str | None = None,
        variant: str | None = None,
        lora: str | Path | None = None,
        lora_scale: float = 1.0,
        prediction_type: str | None = None,
        **engine: Any,
    ) -> DiffusionClassifier:
        """From a model of the zoo, a diffusers directory, a single file, or a hub id.

        The arguments are those of ``dive_fast.models.load_model``; ``cache``, ``cache_bytes``,
        ``refresh``, ``autocast``, ``compile`` and ``channels_last`` those of ``EngineOptions``.

        Raises:
            ModelError: the source is unknown, broken, or of a family that is not supported.
        """
        options = EngineOptions(**engine)
        check_place(dtype, device)
        source = resolve(
            source, allow_pickle=allow_pickle, variant=variant, prediction_type=prediction_type
        )
        model = load_model(
            source,
            dtype=dtype,
            device=device,
            allow_pickle=allow_pickle,
            variant=variant,
            timestep_embedding=timestep_embedding,
            classes=classes,
            templates=templates,
            average=average,
            lora=lora,
            lora_scale=lora_scale,
        )
        classifier = cls(model, batch_size=batch_size, options=options)
        # What is fitted with a LoRA is not the directory's model.
        classifier.directory = source.own_directory if lora is None else None
        return classifier

    @classmethod
    def from_network(
        cls,
        network: torch.nn.Module,
        *,
        schedule: Schedule,
        embeddings: torch.Tensor | torch.nn.Embedding,
        shape: Sequence[int],
        call: Call | None = None,
        names: Sequence[str] | None = None,
        predicts: str | None = None,
        time: str | None = None,
        pixels: Pixels = "[-1, 1]",
        vae: Any = None,
        name: str = "the given network",
        batch_size: int | None = None,
        **engine: Any,
    ) -> DiffusionClassifier:
        """From a class-conditional network of your own, whatever its code.

        The network is put in eval mode and frozen, and called once to see that its prediction has
        the right shape and a gradient with respect to the condition.

        Args:
            network: where it stays, in its own precision.
            schedule: of its training: ``Schedule.linear()``, ``cosine()``, ``flow()``, ``edm()``.
            embeddings: one row for every class, float [C, D]; or the network's own
                ``torch.nn.Embedding``, which from then on hands on rows that it is given instead of
                labels, so that the network can be called with c in the place of the labels.
            shape: (channels, side, side) of x0.
            call: (network, x_t [M, C, h, w], t [M], c [M, D]) to the prediction [M, C or 2C, h, w],
                differentiable in c; ``network(x_t, t, c)`` if None.
            names: of the classes. One row more than names is the embedding of "no class".
            predicts: "epsilon", "v_prediction", "sample"; of a flow "noise - data" or "data -
                noise"; of EDM "edm" (the raw network, called with c_in x), "v_prediction" (the same
                with the other sign) or "denoised" (D(x; sigma), called with x). What the schedule
                says if None.
            time: what the network is told: "t" (0 ... T - 1), "t / T", "sigma" (of a flow also
                "1 - sigma", "T sigma" and "1000 sigma"), "log sigma / 4", "250 log sigma"; the
                usual one if None.
            pixels: what it was trained on: "[-1, 1]", "[0, 1]", or the channels' (means, stds) of
                pixels in [0, 1].
            vae: diffusers' ``AutoencoderKL``, where x0 are its latents.
            name: for messages.
            batch_size, engine: as in ``from_pretrained``.

        Raises:
            ModelError: the parts do not fit together; it says which.

        Examples:
            >>> clf = DiffusionClassifier.from_network(
            ...     net, schedule=Schedule.linear(), embeddings=net.labels, shape=(1, 28, 28))
        """
        options = EngineOptions(**engine)
        model = GivenNetwork(
            network,
            schedule=schedule,
            embeddings=embeddings,
            shape=shape,
            call=call,
            names=names,
            predicts=predicts,
            time=time,
            pixels=pixels,
            vae=vae,
            name=name,
        )
        return cls(model, batch_size=batch_size, options=options)

    @property
    def names(self) -> tuple[str, ...]:
        """The classes' names."""
        return self.model.vocabulary.names

    def __call__(
        self,
        images: Any = None,
        *,
        latents: torch.Tensor | None = None,
        strategy: str | Strategy | None = None,
        preset: str | None = None,
        probes: int | ProbeList | None = None,
        seed: int = 0,
        timesteps: str | TimestepWeights | None = None,
        weights: str | LossWeights | None = None,
        prior: torch.Tensor | Sequence[float] | None = None,
        head: Head | str | Path | None = None,
        trace: bool = False,
        progress: bool = False,
        **settings: Any,
    ) -> list[Classification]:
        """Classifies one image or many.

        Args:
            images: PIL images, paths, arrays or tensors, one or many; see
                ``dive_fast.data.images.as_images``.
            latents: float [B, C, h, w] already in model space, instead of images.
            strategy: a name ("invert", "enumerate"), or a strategy object.
            preset: "dive-paper" or "diffusion-classifier", the published settings.
            probes: how many, or a list of your own; the strategy's choice if None.
            seed: of the probes' noise and of the strategy's draws.
            timesteps: "learned" takes the probes where the model's fitted timesteps say,
                "uniform" evenly, a ``TimestepWeights`` where it says. None: learned where the
                model has them and the strategy leaves the list to us; presets are uniform.
            weights: "learned" lets losses count as the model's fitted weights say, with their own
                beta, "uniform" all alike, a ``LossWeights`` as it says. None as for timesteps.
            prior: p(y), [C] weights of at least 0, which need not sum to 1; uniform if None.
            head: a learned head whose ranking of the classes ``auto`` starts from, or its file;
                see ``predict.probing``.
            trace: keep on each answer what the strategy saw.
            progress: show a bar.
            settings: of the strategy, by name.

        Returns:
            One ``Classification`` per image, in the order of the images.

        Raises:
            DiveFastError: bad input, an unknown strategy, preset or setting.
        """
        # Strategies need gradients even where the caller has switched them off.
        with torch.inference_mode(False):
            x0 = self._latents(images, latents)
            stream = self.stream(
                latents=enumerate(x0),
                strategy=strategy,
                preset=preset,
                probes=probes,
                seed=seed,
                timesteps=timesteps,
                weights=weights,
                prior=prior,
                head=head,
                trace=trace,
                progress=len(x0) if progress else None,
                **settings,
            )
            answers = dict(stream)
        return [answers[i] for i in range(len(x0))]

    def stream(
        self,
        images: Iterable[tuple[Any, Any]] | None = None,
        *,
        latents: Iterable[tuple[Any, torch.Tensor]] | None = None,
        strategy: str | Strategy | None = None,
        preset: str | None = None,
        probes: int | ProbeList | None = None,
        seed: int = 0,
        timesteps: str | TimestepWeights | None = None,
        weights: str | LossWeights | None = None,
        prior: torch.Tensor | Sequence[float] | None = None,
        head: Head | str | Path | None = None,
        trace: bool = False,
        progress: int | None = None,
        **settings: Any,
    ) -> Iterator[tuple[Any, Classification]]:
        """Classifies images as they come and yields (key, answer) as they are found.

        Args:
            images: pairs of a key and an image as ``__call__`` takes one; read lazily.
            latents: pairs of a key and x0, float [C, h, w], instead; read lazily.
            progress: the number of images if a bar shall be shown.

        The other arguments are those of ``__call__``.
        """
        if (images is None) == (latents is None):
            raise DiveFastError("expected either images or latents.")
        if latents is None:
            latents = ((key, self._encode_one(image)) for key, image in as_pairs("images", images))
        else:
            latents = as_pairs("latents", latents)
        progress = as_progress(progress)
        chosen = resolve_strategy(strategy, preset, settings)
        probe_list = self.probe_list(chosen, probes, seed, timesteps, weights)
        counts = self.learned_weights(chosen, probes, weights)
        beta, shortlist = self._beta(counts), self._shortlist(counts)
        log_prior = as_prior(prior, len(self.model.vocabulary))
        scaled = None if log_prior is None else log_prior / beta
        learned = as_head(head, chosen, self.model)
        task = Task(self.model.vocabulary, probe_list, seed, scaled, shortlist, learned)
        shape = self.model.latent_shape
        jobs = (
            self._job(key, as_latents(x0, shape, batch=False), chosen.search(task))
            for key, x0 in latents
        )
        for finished in self._run(jobs, probe_list, chosen.loss, progress):
            yield finished.key, self._classification(finished, beta, log_prior, trace)

    def identity(
        self,
        *,
        strategy: str | Strategy | None = None,
        preset: str | None = None,
        probes: int | ProbeList | None = None,
        seed: int = 0,
        timesteps: str | TimestepWeights | None = None,
        weights: str | LossWeights | None = None,
        head: Head | str | Path | None = None,
    ) -> dict[str, Any]:
        """What decides the answers, for JSON: model, strategy, probes, seed and what was fitted."""
        chosen = resolve_strategy(strategy, preset, {})
        found = self._identity(chosen, probes, seed, timesteps, weights)
        counts = self.learned_weights(chosen, probes, weights)
        if (shortlist := self._shortlist(counts)) is not None:
            found["shortlist"] = digest(map(str, shortlist.to_dict().items()))
        if (learned := as_head(head, chosen, self.model)) is not None:
            found["head"] = learned.digest()
        return found

    def _encode_one(self, image: Any) -> torch.Tensor:
        """x0 of one image of a stream, [C, h, w]."""
        found = self.encode(image)
        if len(found) != 1:
            raise DiveFastError(f"expected one image for each key, got {len(found)}.")
        return found[0]

    def _latents(self, images: Any, latents: torch.Tensor | None) -> torch.Tensor:
        if (images is None) == (latents is None):
            raise DiveFastError("expected either images or latents.")
        if latents is None:
            return self.encode(images)
        return as_latents(latents, self.model.latent_shape)

    def _classification(
        self, finished: Finished, beta: float, log_prior: torch.Tensor | None, trace: bool
    ) -> Classification:
        answer = finished.answer
        posterior = log_posterior(answer, beta, log_prior)
        if posterior.isnan().any():
            raise ModelError(
                f"expected finite losses from {self.model.name} in {self.model.dtype}, got NaN or "
                f"infinity: its weights, its schedule or this precision cannot be right."
            )
        # With a prior the class of the lowest loss need not be the most probable one.
        index = answer.index if log_prior is None else int(posterior.argmax())
        twin = lowest_twin(answer, index, self.model.vocabulary)
        if log_prior is None or log_prior[twin] == log_prior[index]:
            index = twin
        return Classification(
            label=self.names[index],
            index=index,
            log_posterior=posterior,
            losses=answer.losses,
            n_probes=answer.n_probes,
            eliminated=torch.zeros(len(self.names), dtype=torch.bool)
            if answer.bound is None
            else answer.bound.isfinite(),
            log_odds_bound=log_odds_bound(answer, index, beta, log_prior),
            names=self.names,
            evaluations=finished.evaluations,
            seconds=finished.seconds,
            trace=answer.trace if trace else None,
        )
