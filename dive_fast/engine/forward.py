"""Losses and gradients of a batch of rows: through the whole network, or through its parts.

With parts, what rows have in common is computed once: the prefix per (image, probe), the projection
per class. Both are kept for later batches. At level "encoder" the encoder's output is kept too and
reused for gradients while the condition moves.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch

from dive_fast.core.requests import ErrorMaps, Features, Gradients, Losses
from dive_fast.core.vocabulary import Vocabulary
from dive_fast.engine.cache import ActivationCache, Key, merge, take
from dive_fast.engine.classes import ClassTable
from dive_fast.engine.features import activations, pooled
from dive_fast.engine.model_checks import FirstBatch, check_finite, gradient, told
from dive_fast.engine.objective import DeviceProbes, Objective
from dive_fast.engine.options import EngineOptions
from dive_fast.engine.packing import Batch, Group
from dive_fast.engine.running import Result
from dive_fast.errors import DiveFastError
from dive_fast.models.failing import naming
from dive_fast.models.protocol import Model, StagedModel, State, optional


class Forward:
    """Runs the network on batches.

    Args:
        model: the frozen network.
        objective: what is measured.
        probes: where the network is.
        options: of the engine.
        vocabulary: whose rows the requests name; the model's if None.

    Attributes:
        cache: what is kept, or None at level "off".
        table: the conditions that requests name by their class.
    """

    def __init__(
        self,
        model: Model,
        objective: Objective,
        probes: DeviceProbes,
        options: EngineOptions,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        self.model, self.objective, self.probes, self.options = model, objective, probes, options
        self.level = cache_level(model, options)
        self.cache = None if self.level == "off" else ActivationCache(options.cache_bytes)
        named = model.vocabulary if vocabulary is None else vocabulary
        self.table = ClassTable(named, model.device)
        # How often an image's (probe, position) was used since its encoder ran.
        self._uses: dict[int, dict[tuple[int, int], int]] = {}
        if options.channels_last:
            model.network.to(memory_format=torch.channels_last)
        parts = ("predict",) if self.cache is None else ("prefix", "project", "encoder", "decoder")
        self._first = FirstBatch(model)
        self._run = {part: self._looked_at(part) for part in parts}

    def run(self, group: Group, batch: Batch) -> Result:
        """What the requests of one group, packed into a batch, have asked for."""
        kinds = {
            Losses: self.losses,
            Gradients: self.gradients,
            ErrorMaps: self.error_maps,
            Features: self.features,
        }
        kind, *settings = group
        return kinds[kind](batch, *settings)

    def losses(self, batch: Batch) -> Result:
        """The losses, exact at every cache level."""
        with torch.no_grad():
            losses = self._compare(batch, self._predicted(batch), self.objective.compare)
        return Result(check_finite(self.model, "losses", losses.cpu()))

    def error_maps(self, batch: Batch) -> Result:
        """Losses, and the weighted sum of every condition's error maps."""
        with torch.no_grad():
            maps = self._compare(batch, self._predicted(batch), self.objective.error_map)
        maps = check_finite(self.model, "losses", maps.cpu())
        sums = maps.new_zeros(len(batch.classes), *maps.shape[1:])
        sums.index_add_(0, batch.condition_index, maps * batch.weight[:, None, None])
        return Result(maps.mean(dim=(1, 2)), sums)

    def features(self, batch: Batch, layer: str | int, pool: str | None) -> Result:
        """What a block gives for every row, pooled; by the whole network at every cache level.

        A row's condition enters every block, so that the cache has nothing for it.
        """
        x_t, t = self._noised(batch.x0, batch.image_index, batch.probe_index)
        with torch.no_grad():
            condition = self._conditions(batch)[batch.condition_index.to(x_t.device)]
            # Compiled code does not call hooks.
            network = self._prepared(self.model.predict, compiles=False)
            found = pooled(activations(self.model, network, layer, x_t, t, condition), pool)
        return Result(check_finite(self.model, "activations", found.cpu()))

    def gradients(self, batch: Batch) -> Result:
        """Losses, and dL/dv of every condition; at level "encoder", which rows are exact."""
        exact = None
        with torch.enable_grad():
            conditions = self._conditions(batch).detach().requires_grad_()
            if self.cache is None:
                prediction = self._whole(batch, conditions)
            else:
                projected = take(self._run["project"](conditions), batch.condition_index)
                if self.level == "encoder":
                    encoded, exact = self._encoded(batch, projected)
                else:
                    encoded = self._run["encoder"](self._prefix(batch, slice(None)), projected)
                prediction = self._run["decoder"](encoded, projected)
            losses = self._compare(batch, prediction, self.objective.compare)
            # Every condition owns its rows, so one backward serves all images.
            weighted = losses * batch.weight.to(losses.device)
            gradients = gradient(self.model, weighted, conditions)
        losses = check_finite(self.model, "losses", losses.detach().cpu())
        return Result(losses, check_finite(self.model, "gradients", gradients.cpu()), exact)

    def forget(self, image: int) -> None:
        """Drops what was kept for a finished image."""
        self._uses.pop(image, None)
        if self.cache is not None:
            self.cache.drop(image)

    def release(self) -> str | None:
        """Gives memory back and does without it from now on; says without what, if anything."""
        if self.cache is not None and self.cache.close():
            return "the cache"
        return "the table of classes on the device" if self.table.release() else None

    def _predicted(self, batch: Batch) -> torch.Tensor:
        """The prediction of every row, exact, without gradient."""
        if self.cache is None:
            return self._whole(batch, self._conditions(batch))
        projected = self._projected(batch)
        encoded = self._run["encoder"](self._prefix(batch, slice(None)), projected)
        return self._run["decoder"](encoded, projected)

    def _conditions(self, batch: Batch) -> torch.Tensor:
        """The batch's conditions where the network is, float32 [N, D]."""
        if batch.relaxed is None:
            return self.table.take(batch.classes)
        relaxed, known = batch.relaxed.to(self.model.device), batch.classes >= 0
        if not known.any():
            return relaxed
        order = (~known).argsort(stable=True).argsort()
        return merge((self.table.take(batch.classes[known]),), (relaxed,), order)[0]

    def _whole(self, batch: Batch, conditions: torch.Tensor) -> torch.Tensor:
        """The prediction of every row by the whole network."""
        x_t, t = self._noised(batch.x0, batch.image_index, batch.probe_index)
        return self._run["predict"](x_t, t, conditions[batch.condition_index.to(x_t.device)])

    def _prefix(self, batch: Batch, rows: torch.Tensor | slice) -> State:
        """The prefix of ``rows`` of the batch, computed once per (image, probe)."""
        images, probes = batch.image_index[rows], batch.probe_index[rows]
        pairs, inverse = _numbered(zip(images.tolist(), probes.tolist(), strict=True))
        keys = [Key("prefix", batch.image_numbers[image], probe) for image, probe in pairs]
        pair_images, pair_probes = torch.tensor(pairs).unbind(1)

        def compute(missing: torch.Tensor) -> State:
            return self._run["prefix"](
                *self._noised(batch.x0, pair_images[missing], pair_probes[missing])
            )

        with torch.no_grad():
            state = self.cache.get(keys, compute)
        return state if len(pairs) == len(inverse) else take(state, inverse)

    def _projected(self, batch: Batch) -> State:
        """The projection of every row, without gradient: once per class, whichever image asks."""
        known, states = batch.classes >= 0, []
        classes, inverse = _numbered(batch.classes[known].tolist())
        if classes:
            index = torch.tensor(classes)

            def compute(missing: torch.Tensor) -> State:
                return self._run["project"](self.table.take(index[missing]))

            keys = [Key("projected", condition=c) for c in classes]
            states.append(self.cache.get(keys, compute))
        if batch.relaxed is not None:
            # What is no class is projected for this batch alone.
            states.append(self._run["project"](batch.relaxed.to(self.model.device)))
        place = torch.empty_like(batch.classes)
        place[known] = inverse
        place[~known] = len(classes) + torch.arange(int((~known).sum()))
        rows = place[batch.condition_index]
        return take(states[0], rows) if len(states) == 1 else merge(*states, rows)

    def _encoded(self, batch: Batch, projected: State) -> tuple[State, torch.Tensor]:
        """The encoder's output of every row, and which rows it was computed for, bool [M].

        The others take what the last refresh of their (image, probe) left: it was computed for an
        earlier condition, and no gradient goes through it.
        """
        fresh, keys = [], []
        position = batch.position[batch.condition_index]
        rows = (batch.image_index, batch.probe_index, position)
        for image, probe, position in zip(*(index.tolist() for index in rows), strict=True):
            number = batch.image_numbers[image]
            keys.append(Key("encoded", number, probe, position))
            uses = self._uses.setdefault(number, {})
            used = uses.get((probe, position), 0)
            fresh.append(keys[-1] not in self.cache or used >= self.options.refresh)
            uses[probe, position] = 1 if fresh[-1] else used + 1
        is_fresh = torch.tensor(fresh)
        fresh_rows, stale_rows = is_fresh.nonzero()[:, 0], (~is_fresh).nonzero()[:, 0]
        self.cache.hits += len(stale_rows)
        self.cache.misses += len(fresh_rows)
        stale_keys = [keys[row] for row in stale_rows.tolist()]
        if not len(fresh_rows):
            return self.cache.read(stale_keys), is_fresh
        stale = self.cache.read(stale_keys) if stale_keys else None
        prefix = self._prefix(batch, fresh_rows)
        encoded = computed = self._run["encoder"](prefix, take(projected, fresh_rows))
        if stale is not None:
            order = torch.cat([fresh_rows, stale_rows]).argsort()
            encoded = merge(computed, stale, order)
        self.cache.write([keys[row] for row in fresh_rows.tolist()], computed)
        return encoded, is_fresh

    def _noised(
        self, x0: torch.Tensor, image_index: torch.Tensor, probe_index: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x_t and t of (image, probe) pairs."""
        image_index, probe_index = image_index.to(x0.device), probe_index.to(x0.device)
        x_t = self.objective.noised(x0, image_index, self.probes, probe_index)
        if self.options.channels_last:
            x_t = x_t.contiguous(memory_format=torch.channels_last)
        return x_t, self.probes.timesteps[probe_index]

    def _compare(
        self, batch: Batch, prediction: torch.Tensor, compare: Callable[..., torch.Tensor]
    ) -> torch.Tensor:
        """The loss, or the error map, of every row."""
        device = prediction.device
        index = (batch.image_index.to(device), self.probes, batch.probe_index.to(device))
        return compare(self.model, prediction, batch.x0, *index, batch.pixel_weights)

    def _looked_at(self, part: str) -> Callable[..., Any]:
        """A part of the network, with its errors told and its first result looked at."""
        function = self._prepared(getattr(self.model, part))
        look = self._first.prediction if part in ("predict", "decoder") else self._first.state

        def run(first: torch.Tensor | State, *rest: Any) -> Any:
            rows = len(first) if isinstance(first, torch.Tensor) else len(first[0])
            return look(part, rows, told(self.model, part, function, first, *rest))

        return run

    def _prepared(self, function: Callable[..., Any], compiles: bool = True) -> Callable[..., Any]:
        """A part of the network under this engine's precision and compilation."""
        if self.options.compile and compiles:
            function = _compiled(function)
        # A model of the user's own raises what it raises.
        if hasattr(optional(self.model, "network"), "config"):
            function = _named(function, self.model.name)
        if self.options.autocast is None:
            return function
        dtype, kind = getattr(torch, self.options.autocast), self.model.device.type

        def run(*arguments: Any) -> Any:
            with torch.autocast(kind, dtype=dtype):
                return function(*arguments)

        return run


def _numbered(values: Iterable[Hashable]) -> tuple[list, torch.Tensor]:
    """The distinct values as they first occur, and each value's place among them, int64."""
    place: dict[Hashable, int] = {}
    index = [place.setdefault(value, len(place)) for value in values]
    return list(place), torch.tensor(index, dtype=torch.int64)


def check_options(model: Model, options: EngineOptions) -> None:
    """Raises DiveFastError for an option that this model does not offer."""
    cache_level(model, options)
    if options.channels_last and optional(model, "network") is None:
        raise DiveFastError(
            f"expected a model with an attribute 'network' for channels_last, got {model.name}."
        )


def cache_level(model: Model, options: EngineOptions) -> str:
    """The level that ``options`` mean for this model: "off", "exact" or "encoder".

    Raises:
        DiveFastError: a level that needs parts was asked of a model that has none.
    """
    staged = isinstance(model, StagedModel)
    if options.cache == "auto":
        return optional(model, "default_cache") if staged else "off"
    if options.cache != "off" and not staged:
        raise DiveFastError(
            f"expected cache 'off' for {model.name}, which does not come in parts, "
            f"got {options.cache!r}."
        )
    # At every gradient anew: nothing would ever be reused.
    return "exact" if options.cache == "encoder" and options.refresh == 1 else options.cache


def _named(function: Callable[..., Any], model: str) -> Callable[..., Any]:
    """A part whose errors name the model."""

    def run(*arguments: Any) -> Any:
        with naming(model):
            return function(*arguments)

    return run


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compile`` of a part; what its compiler cannot do is told in one sentence."""
    compiled = torch.compile(function)

    def run(*arguments: Any) -> Any:
        try:
            return compiled(*arguments)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = str(error).strip().splitlines()[0]
            raise DiveFastError(f"torch.compile failed; go on without compile: {reason}") from error

    return run
