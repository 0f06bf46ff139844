"""What is sent to every worker: what it does with an item, and how its model is made."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dive_fast.errors import DiveFastError, ModelError
from dive_fast.evaluation.encoding import Encode
from dive_fast.evaluation.on_ray.options import RayOptions
from dive_fast.evaluation.run import Source


@dataclass(frozen=True)
class Work:
    """One run's work; sent once, so the functions are such as can be pickled.

    Attributes:
        items: the examples or annotated images, which a position names.
        ids: of their records.
        source: of the predictor and an item, what is to be read.
        stream: of the predictor and (id, image) pairs, (id, answer) pairs; as ``run_over`` has it.
        identity: of the predictor, what decides its answers, for JSON: the workers' must be the
            driver's. None where there is nothing to compare.
        encode: of the predictor, what makes of images what its stream takes; None: they are it.
    """

    items: Sequence[Any]
    ids: Sequence[str]
    source: Callable[[Any, Any], Source]
    stream: Callable[[Any, Iterable[tuple[str, Any]]], Iterable[tuple[str, Any]]]
    identity: Callable[[Any], Mapping[str, Any]] | None = None
    encode: Callable[[Any], Encode] | None = None


@dataclass(frozen=True)
class Shipped:
    """A predictor on its way to the workers.

    Attributes:
        content: what ``torch.save`` wrote.
        device: "cuda" or "cpu", where it shall compute.
    """

    content: bytes
    device: str

    @classmethod
    def of(cls, predictor: Any, device: str) -> Shipped:
        """Takes also what was defined in a script or a notebook, by value.

        Raises:
            DiveFastError: it holds something that cannot be sent.
        """
        import ray.cloudpickle as cloudpickle

        buffer = io.BytesIO()
        try:
            torch.save(predictor, buffer, pickle_module=cloudpickle)
        except Exception as error:  # whatever the objects of the user's model raise
            raise cannot_send("the model", error) from error
        return cls(buffer.getvalue(), device)

    def __call__(self) -> Any:
        """The predictor on the worker.

        Raises:
            ModelError: it cannot be moved to the worker's device.
        """
        # To the CPU first: the driver's GPU may have a number that no GPU has here.
        stored = io.BytesIO(self.content)
        predictor = torch.load(
            stored, map_location=lambda storage, place: storage, weights_only=False
        )
        model = predictor.model
        if torch.device(model.device).type != "cpu" or self.device != "cpu":
            if not hasattr(model, "to"):
                raise ModelError(
                    f"{model.name} cannot be moved to {self.device}: give RayOptions(load=...), "
                    "which makes it there."
                )
            model.to(torch.device(self.device), model.dtype)
        return predictor


def loading(predictor: Any, options: RayOptions) -> Callable[[], Any]:
    """How the workers come to their model: as the options say, or by what is sent.

    Raises:
        DiveFastError: it holds something that cannot be sent.
    """
    if options.load is not None:
        return options.load
    return Shipped.of(predictor, "cuda" if options.gpus_per_worker else "cpu")


def cannot_send(what: str, error: Exception) -> DiveFastError:
    """The sentence of what cannot be pickled."""
    reason = str(error).strip().splitlines()
    return DiveFastError(
        f"{what} cannot be sent to the workers ({reason[0] if reason else type(error).__name__})."
    )
