"""A Ray cluster: reached or started, seen to have room, and quiet."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import socket
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch

from dive_fast.errors import DiveFastError, shown
from dive_fast.evaluation.on_ray.options import RayOptions

log = logging.getLogger(__name__)

PATIENCE = 5.0  # seconds for an answer from an address
# HTTP/2, RFC 9113: what a client begins with, and the type of the frame that a server answers with.
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
_SETTINGS = 4


@contextlib.contextmanager
def connected(options: RayOptions, todo: int) -> Iterator[tuple[ModuleType, int]]:
    """Ray, and how many workers there shall be; what was started here ends with the block.

    Args:
        todo: images; more workers than these are not started.

    Raises:
        DiveFastError: Ray is not installed, no cluster answers, or it has no room.
    """
    ray, address = _ray(), _address(options)
    if ray.is_initialized():
        if options.address is not None:
            raise DiveFastError(
                "this process is connected to a Ray cluster already: leave the address out."
            )
        yield ray, _workers(options, todo, *_room(ray, options))
        return
    if address is None:
        workers = _start(ray, options, todo)
    else:
        _connect(ray, options)
        workers = None
    try:
        yield ray, workers or _workers(options, todo, *_room(ray, options))
    finally:
        ray.shutdown()


def _ray() -> ModuleType:
    if "ray" not in sys.modules:  # Ray reads these once; whoever has it loaded has decided
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Of every worker that dies Ray prints a paragraph on stdout; we tell it in a sentence.
        os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "A worker died or was killed")
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise DiveFastError("Ray is not installed: pip install 'dive_fast[ray]'.") from error


# -- a cluster of our own --------------------------------------------------------------------------


def _start(ray: ModuleType, options: RayOptions, todo: int) -> int:
    """Starts a cluster on this machine, as large as it need be; returns the number of workers."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpus = torch.cuda.device_count()
    fit = _fit({"CPU": cores or 1, "GPU": gpus}, options)
    if options.gpus_per_worker and (options.workers or 1) > _fit({"GPU": gpus}, options, False):
        _refuse(options, f"this machine has {gpus} GPUs")
    workers = min(options.workers or max(1, fit), todo)
    needed = workers * options.cpus_per_worker
    if needed > (cores or 1):
        log.warning(
            "%d workers of %d CPUs share the %d cores of this machine.",
            workers, options.cpus_per_worker, cores or 1,
        )  # fmt: skip
    try:
        ray.init(
            address="local",
            num_cpus=needed,
            num_gpus=gpus,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise DiveFastError(f"Ray cannot be started here ({_first_line(error)}).") from error
    return workers


# -- a cluster that is there -----------------------------------------------------------------------


def expect_cluster(options: RayOptions) -> None:
    """That the cluster that the options name answers, if they name one.

    Raises:
        DiveFastError: it does not, or Ray is not installed.
    """
    _ray()
    address = _address(options)
    if address is None:
        return
    if "://" in address:
        raise DiveFastError(
            f"expected 'auto' or HOST:PORT of a cluster that this machine is part of, got "
            f"{shown(address)}: from outside, 'ray job submit' brings the command there."
        )
    try:
        _expect_answer(_resolved(address))
    except (OSError, ValueError) as error:
        raise _no_cluster(address, error) from error


def _connect(ray: ModuleType, options: RayOptions) -> None:
    expect_cluster(options)
    address = _address(options)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError, SystemExit) as error:  # it exits after two minutes
        raise _no_cluster(address, error) from error


def _address(options: RayOptions) -> str | None:
    """None where a cluster shall be started."""
    address = options.address or os.environ.get("RAY_ADDRESS")
    return None if address in ("", "local") else address


def _no_cluster(address: str | None, error: BaseException) -> DiveFastError:
    return DiveFastError(
        f"no Ray cluster at {shown(address)} ({_first_line(error)}); 'ray start --head' starts one."
    )


def _resolved(address: str) -> str:
    """HOST:PORT of "auto", which may be that of a cluster that is gone."""
    if address != "auto":
        return address
    from ray._private.services import canonicalize_bootstrap_address

    try:
        return canonicalize_bootstrap_address(address)
    except ConnectionError as error:
        raise ConnectionError("none runs on this machine") from error


def _expect_answer(address: str) -> None:
    """That somebody at HOST:PORT speaks gRPC: Ray itself would wait two minutes, and then exit.

    Raises:
        OSError, ValueError: nobody does, or it is no such address.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError("expected HOST:PORT")
    with socket.create_connection((host.strip("[]"), int(port)), PATIENCE) as peer:
        if os.environ.get("RAY_USE_TLS") == "1":
            return
        peer.settimeout(PATIENCE)
        peer.sendall(_PREFACE)
        head = peer.recv(9)
    if len(head) < 4 or head[3] != _SETTINGS:
        raise OSError("what listens there is not Ray")


def _room(ray: ModuleType, options: RayOptions) -> tuple[int, str]:
    """How many workers the cluster has room for when it is idle, and what it has."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    fit = sum(_fit(node, options) for node in nodes)
    cpus, gpus = (sum(node.get(kind, 0) for node in nodes) for kind in ("CPU", "GPU"))
    return fit, f"the cluster has {cpus:g} CPUs and {gpus:g} GPUs on {len(nodes)} nodes"


def _workers(options: RayOptions, todo: int, fit: int, there: str) -> int:
    if (options.workers or 1) > fit:
        _refuse(options, there)
    return min(options.workers or fit, todo)


def _fit(resources: dict[str, Any], options: RayOptions, cpus: bool = True) -> int:
    """How many workers one node has room for."""
    limits = [resources.get("CPU", 0) // options.cpus_per_worker] if cpus else []
    if share := options.gpus_per_worker:
        gpus = int(resources.get("GPU", 0))
        limits.append(gpus * int(1 / share + 1e-9) if share < 1 else gpus // share)
    return int(min(limits))


def _refuse(options: RayOptions, there: str) -> None:
    raise DiveFastError(
        f"expected room for {options.workers or 1} workers of {options.cpus_per_worker} CPUs and "
        f"{options.gpus_per_worker:g} GPUs each, but {there}."
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    if isinstance(error, OSError) and error.strerror:
        lines = [error.strerror]
    return lines[0].rstrip(".") if lines else type(error).__name__


# -- what it says ----------------------------------------------------------------------------------


def reason_of(error: Exception) -> str:
    """Why a worker died, in a few words of the page that Ray writes on it."""
    text = " ".join(str(error).split())
    if "running low on memory" in text or type(error).__name__ == "OutOfMemoryError":
        return "its node ran low on memory"
    if "node" in text and ("node died" in text or "dead node" in text or "node was" in text):
        return "its node was lost"
    if "creation task" in text:
        return str(error).strip().splitlines()[-1][:200]
    return "its process ended"
