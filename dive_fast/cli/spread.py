"""The options of a run that is spread over a Ray cluster."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from dive_fast.cli.values import count, weight

HERE = "here"  # --ray without an address


def add_ray(parser: argparse.ArgumentParser) -> None:
    """What ``ray_options`` reads."""
    group = parser.add_argument_group("workers (docs/ray.md; needs the extra ray)")
    group.add_argument(
        "--ray",
        nargs="?",
        const=HERE,
        metavar="ADDRESS",
        help="spread the images over the workers of a Ray cluster: auto, HOST:PORT, or without an "
        "address the one that RAY_ADDRESS names, else one that is started for this run",
    )
    group.add_argument(
        "--workers",
        type=count,
        metavar="N",
        help="one model each (default: as many as there is room for)",
    )
    group.add_argument(
        "--gpus-per-worker",
        type=weight,
        metavar="X",
        help="0.5 puts two workers on each GPU (default: 0, they compute on the CPU)",
    )
    group.add_argument(
        "--cpus-per-worker", type=count, metavar="N", help="cores of each worker (default: 1)"
    )


def ray_options(
    options: argparse.Namespace,
    load: Callable[[argparse.Namespace, Sequence[str] | None], Any],
    classes: Sequence[str] | None,
):
    """``RayOptions`` of ``--ray`` and its kin, or None; each worker loads the model by itself.

    The driver's own model, which is only compared with theirs, then stays on the CPU.

    Args:
        load: makes the model of the options and the classes.
        classes: its second argument.

    Raises:
        DiveFastError: an option of the workers without ``--ray``, or a value that they refuse.
    """
    from dive_fast.errors import DiveFastError

    given = {
        name: getattr(options, name)
        for name in ("workers", "gpus_per_worker", "cpus_per_worker")
        if getattr(options, name) is not None
    }
    if options.ray is None:
        if given:
            raise DiveFastError(f"--{next(iter(given)).replace('_', '-')} needs --ray.")
        return None
    from dive_fast.evaluation.on_ray import RayOptions
    from dive_fast.evaluation.on_ray.cluster import expect_cluster

    # What a worker unpickles must not name this command's functions, only what they were given.
    workers = copy.copy(options)
    del workers.run
    if workers.device is None and not given.get("gpus_per_worker"):
        workers.device = "cpu"
    options.device = "cpu"
    address = None if options.ray == HERE else options.ray
    found = RayOptions(address=address, load=partial(load, workers, classes), **given)
    expect_cluster(found)  # before the model is loaded, which may take minutes
    return found
