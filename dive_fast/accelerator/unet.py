"""UNets: the prefix of an (x_t, t) and the projections of a condition are reused by content."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from dive_fast.accelerator.base import Accelerated
from dive_fast.accelerator.store import Rows, fingerprint
from dive_fast.errors import ModelError
from dive_fast.models.unet import stages

# Conditions hold at most this share of the bytes, states of (x_t, t) the rest.
CONDITIONS_SHARE = 1 / 4


class AcceleratedUNet(Accelerated):
    """Reuses prefixes and projections; see ``accelerate``."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._weights: Hashable = None
        self._prefix = self._compiled(stages.prefix)
        self._encoder = self._compiled(stages.encoder)
        self._decoder = self._compiled(stages.decoder)
        self._cache_bytes = self._prefixes.limit
        # SDXL's prefix is one convolution: cheaper computed than kept.
        self._has_prefix = not stages.condition_enters_time(self.network)
        if self._has_prefix:
            self._projections.resize(int(self._cache_bytes * CONDITIONS_SHARE))
        try:
            stages.check_supported(self.network)
        except ModelError as error:
            warnings.warn(f"Nothing will be reused: {error}", stacklevel=4)

    def _run(self, call: inspect.BoundArguments) -> Any:
        arguments = dict(call.arguments)
        if reason := self._unusual(**arguments):
            return self._plain(call, reason)
        sample, condition = arguments["sample"], arguments["encoder_hidden_states"]
        self._rows += len(sample)
        self._forget_if_weights_changed()
        kv = self._keys_and_values(condition, arguments.get("added_cond_kwargs"))
        state = self._prefix_states(sample, arguments["timestep"])
        prediction = self._decoder(self.network, self._encoder(self.network, state, kv), kv)
        if not arguments.get("return_dict", True):
            return (prediction,)
        return stages.UNet2DConditionOutput(sample=prediction)

    def _unusual(
        self,
        sample: Tensor,
        timestep: Any,
        encoder_hidden_states: Any,
        added_cond_kwargs: Any = None,
        return_dict: bool = True,
        **others: Any,
    ) -> str | None:
        """Why a call goes to the network unchanged."""
        unet, condition = self.network, encoder_hidden_states
        if given := [name for name, value in others.items() if value is not None]:
            return f"the argument {given[0]}"
        if type(sample) is not Tensor or type(condition) is not Tensor or sample.is_meta:
            return "arguments that are no plain tensors"
        if sample.ndim != 4 or condition.ndim != 3 or not 0 < len(sample) == len(condition):
            return "numbers of rows or dimensions that differ from [M, C, h, w] and [M, L, D]"
        if sample.device != condition.device:
            return "arguments on several devices"
        if isinstance(timestep, Tensor):
            if timestep.ndim > 1 or (timestep.ndim and len(timestep) not in (1, len(sample))):
                return "a timestep that is neither one number nor one for each row"
            if timestep.ndim and timestep.device != sample.device:
                return "arguments on several devices"
        elif not isinstance(timestep, int | float):
            return "a timestep that is no number"
        if stages.condition_enters_time(unet) and not _is_added(added_cond_kwargs, len(sample)):
            return "added_cond_kwargs without text_embeds and time_ids for each row"
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return "tracing"
        if unet.training and unet.config.dropout > 0:
            return "dropout"
        if torch.is_grad_enabled():
            if sample.requires_grad:
                return "a gradient of the sample"
            if any(p.requires_grad for p in unet.parameters()):
                return "a gradient of the weights, freeze them with requires_grad_(False)"
            if unet.is_gradient_checkpointing:
                return "gradient checkpointing"
        try:
            stages.check_supported(unet)
        except ModelError as error:
            return str(error)
        return None

    def _forget_if_weights_changed(self) -> None:
        weights = fingerprint(stages.reused_parameters(self.network))
        if weights != self._weights:
            self.clear()
            self._weights = weights

    def _keys_and_values(self, condition: Tensor, added: Any) -> stages.State:
        unet = self.network
        if torch.is_grad_enabled() and condition.requires_grad:
            # Each row has a gradient of its own, so equal rows are not the same row.
            kv = stages.project(unet, condition)
        else:

            def compute(rows: Tensor | None) -> stages.State:
                return stages.project(unet, condition if rows is None else condition[rows])

            kv = self._projections.states(Rows(_context(condition), condition), compute)
        if stages.condition_enters_time(unet):
            return (*kv, stages.added_embedding(unet, added, condition))
        return kv

    def _prefix_states(self, sample: Tensor, timestep: Tensor | float) -> stages.State:
        t = torch.as_tensor(timestep, device=sample.device).expand(len(sample))
        if not self._has_prefix:
            return self._prefix(self.network, sample, t)

        def compute(rows: Tensor | None) -> stages.State:
            if rows is None:
                return self._prefix(self.network, sample, t)
            return self._prefix(self.network, sample[rows], t[rows])

        self._prefixes.resize(self._cache_bytes - self._projections.nbytes)
        with torch.no_grad():
            # Only the value of t matters: the network turns it into float32 first.
            return self._prefixes.states(Rows(_context(sample), sample, t.float()), compute)


def _context(x: Tensor) -> Hashable:
    """What besides its bytes decides what a row gives."""
    kind = x.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return x.device, autocast


def _is_added(added: Any, rows: int) -> bool:
    if not isinstance(added, dict):
        return False
    parts = [added.get(name) for name in ("text_embeds", "time_ids")]
    return all(isinstance(part, Tensor) and len(part) == rows for part in parts)
