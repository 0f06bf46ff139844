"""DiT: no part of it is independent of the condition, but one part is computed repeatedly."""

from __future__ import annotations

import inspect
from collections.abc import Hashable
from typing import Any

import torch

from dive_fast.accelerator.base import Accelerated
from dive_fast.accelerator.store import fingerprint
from dive_fast.models.dit import shared_embedder as dit_embedder


class AcceleratedDiT(Accelerated):
    """Evaluates the embedder once per call, where all blocks hold equal copies of it."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._embedders: Hashable = None
        self._equal = False

    def _run(self, call: inspect.BoundArguments) -> Any:
        if self._compile:
            return super()._run(call)
        if reason := self._unusual():
            return self._plain(call, reason)
        twin = dit_embedder.with_shared_embedder(self.network)
        return twin(*call.args, **call.kwargs)

    def _unusual(self) -> str | None:
        """Why a call goes to the network unchanged."""
        if self.network.training:
            return "training mode, in which each block drops labels at random"
        parameters = [p for part in dit_embedder.embedders(self.network) for p in part.parameters()]
        if torch.is_grad_enabled() and any(p.requires_grad for p in parameters):
            return "a gradient of the embedders, which would all go to the first"
        mark = fingerprint(parameters)
        if mark != self._embedders:
            self._embedders = mark
            self._equal = dit_embedder.embedders_are_equal(self.network)
        return None if self._equal else "embedders that are no copies of each other"
