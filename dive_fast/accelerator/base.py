"""What every accelerated network has: call signature, options, statistics."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dive_fast.accelerator.store import ContentStore


@dataclass(frozen=True)
class Statistics:
    """What an accelerated network did so far.

    Attributes:
        calls: of the network.
        plain_calls: those that went to the network unchanged.
        plain_reason: of the last of them; None if there was none.
        rows: evaluated by the other calls.
        prefix_hits: prefixes found from earlier calls.
        prefix_shared: rows that shared the prefix of another row of their batch.
        prefix_misses: prefixes computed.
        condition_hits: keys and values found from earlier calls.
        condition_shared: rows that shared those of another row of their batch.
        condition_misses: keys and values computed.
        nbytes: held now.
    """

    calls: int
    plain_calls: int
    plain_reason: str | None
    rows: int
    prefix_hits: int
    prefix_shared: int
    prefix_misses: int
    condition_hits: int
    condition_shared: int
    condition_misses: int
    nbytes: int


class Accelerated(nn.Module):
    """What ``accelerate`` returns; on its own, precision, memory format and compilation."""

    def __init__(
        self,
        network: nn.Module,
        cache_bytes: int,
        dtype: torch.dtype | None,
        channels_last: bool,
        compile: bool,
    ) -> None:
        super().__init__()
        self.training = network.training
        self.network = network
        self._autocast_dtype = dtype
        self._channels_last = channels_last
        self._signature = inspect.signature(network.forward)
        self._compile = compile
        self._calls = self._plain_calls = self._rows = 0
        self._plain_reason: str | None = None
        self._projections = ContentStore(cache_bytes)
        self._prefixes = ContentStore(cache_bytes)
        if channels_last:
            # ModelMixin.to() warns about modules to keep in float32 even where there are none.
            nn.Module.to(network, memory_format=torch.channels_last)
        # The method, as a module would be registered a second time.
        self._call = self._compiled(network).__call__

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("network"), name)

    def statistics(self) -> Statistics:
        prefixes, projections = self._prefixes, self._projections
        return Statistics(
            calls=self._calls,
            plain_calls=self._plain_calls,
            plain_reason=self._plain_reason,
            rows=self._rows,
            prefix_hits=prefixes.hits,
            prefix_shared=prefixes.shared,
            prefix_misses=prefixes.misses,
            condition_hits=projections.hits,
            condition_shared=projections.shared,
            condition_misses=projections.misses,
            nbytes=prefixes.nbytes + projections.nbytes,
        )

    def clear(self) -> None:
        """Forgets everything kept; needed only after a few weights were written via ``.data``."""
        self._prefixes.clear()
        self._projections.clear()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The network's own; see its documentation."""
        self._calls += 1
        try:
            call = self._signature.bind(*args, **kwargs)
        except TypeError:
            return self.network(*args, **kwargs)  # raises in its own words
        name, sample = next(iter(call.arguments.items()), (None, None))
        if not isinstance(sample, Tensor):
            return self._plain(call, "a first argument that is no tensor")
        if self._channels_last and sample.ndim == 4:
            sample = sample.contiguous(memory_format=torch.channels_last)
            call.arguments[name] = sample
        if self._autocast_dtype is None:
            return self._run(call)
        with torch.autocast(sample.device.type, dtype=self._autocast_dtype):
            output = self._run(call)
        return _cast(output, sample.dtype)

    def _compiled(self, function: Callable) -> Callable:
        return torch.compile(function) if self._compile else function

    def _run(self, call: inspect.BoundArguments) -> Any:
        return self._call(*call.args, **call.kwargs)

    def _plain(self, call: inspect.BoundArguments, reason: str) -> Any:
        self._plain_calls += 1
        self._plain_reason = reason
        return self.network(*call.args, **call.kwargs)


def _cast(output: Any, dtype: torch.dtype) -> Any:
    """A network's output, tensor, tuple or dataclass, with its floating-point tensors cast."""
    if isinstance(output, Tensor):
        return output.to(dtype) if output.is_floating_point() else output
    if isinstance(output, tuple):
        return tuple(_cast(x, dtype) for x in output)
    if isinstance(output, dict):  # diffusers' outputs
        return type(output)(**{name: _cast(x, dtype) for name, x in output.items()})
    return output
