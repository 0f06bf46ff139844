"""How a run is spread over the workers of a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dive_fast.core.numbers import is_number, whole
from dive_fast.errors import DiveFastError, shown

# Images handed out at a time: bench.ray_workers, where one at a time took 7% longer.
PIECE = 8


@dataclass(frozen=True)
class RayOptions:
    """Where the workers run, how many there are, and what each of them gets.

    Attributes:
        address: "auto" or "HOST:PORT" of a cluster that this machine is part of. None: the cluster
            that this process is connected to, or the one that ``RAY_ADDRESS`` names; else one is
            started on this machine and ends with the run.
        workers: how many, one model each; as many as there is room for if None.
        gpus_per_worker: 0.5 puts two workers on each GPU; with 0 they compute on the CPU.
        cpus_per_worker: cores, and threads of torch, of each worker.
        piece: images that a worker gets at a time at most; towards the end they get fewer.
        load: makes the classifier or detector on a worker, so that it is read there and not sent;
            called without arguments, such as
            ``partial(DiffusionClassifier.from_pretrained, "DIR", dtype="bfloat16")``. If None the
            given one is sent, and moved to the worker's GPU if it has one.

    Raises:
        DiveFastError: a value is none of its kind.
    """

    address: str | None = None
    workers: int | None = None
    gpus_per_worker: float = 0
    cpus_per_worker: int = 1
    piece: int = PIECE
    load: Callable[[], Any] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.address, str | None) or self.address == "":
            raise DiveFastError(f"expected a Ray address or None, got {shown(self.address)}.")
        if self.workers is not None:
            object.__setattr__(self, "workers", whole("workers", self.workers, 1))
        for name in ("cpus_per_worker", "piece"):
            object.__setattr__(self, name, whole(name, getattr(self, name), 1))
        gpus = self.gpus_per_worker
        # Ray shares a GPU among workers, but gives a worker no part of a second one.
        if not is_number(gpus, 0) or (gpus > 1 and gpus != int(gpus)):
            raise DiveFastError(
                f"gpus_per_worker must be a number from 0 to 1, or a whole one, got {shown(gpus)}."
            )
        if self.load is not None and not callable(self.load):
            raise DiveFastError(f"load must be callable without arguments, got {shown(self.load)}.")

    def to_dict(self) -> dict[str, Any]:
        """For JSON: what each worker has."""
        return {
            "workers": self.workers,
            "gpus_per_worker": self.gpus_per_worker,
            "cpus_per_worker": self.cpus_per_worker,
            "piece": self.piece,
        }


def spread(environment: Mapping[str, Any], options: RayOptions) -> dict[str, Any]:
    """A run's environment, of which the driver knows what each worker has.

    Raises:
        DiveFastError: these are no ``RayOptions``.
    """
    if not isinstance(options, RayOptions):
        raise DiveFastError(f"ray must be RayOptions or None, got {shown(options)}.")
    # The driver's own device and batches compute nothing.
    own = {k: v for k, v in environment.items() if k not in ("device", "batch_size", "threads")}
    device = "cuda" if options.gpus_per_worker else "cpu"
    return {**own, "device": device, "threads": options.cpus_per_worker, "ray": options.to_dict()}
