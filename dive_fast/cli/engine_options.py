"""Options that say how the engine computes, of every command that runs a network."""

from __future__ import annotations

import argparse

from dive_fast.cli.values import count


def add_engine(parser: argparse.ArgumentParser) -> None:
    """What ``EngineOptions`` and ``choose_threads`` take."""
    group = parser.add_argument_group("engine")
    group.add_argument(
        "--cache",
        default="auto",
        metavar="off|exact|encoder",
        help="activations kept between evaluations: exact: same answers; encoder: approximate "
        "gradients (default: what was measured best for the model)",
    )
    group.add_argument(
        "--cache-bytes",
        type=count,
        default=1 << 30,
        metavar="BYTES",
        help="bound on what is kept (default: 1 GiB)",
    )
    group.add_argument(
        "--refresh",
        type=count,
        default=2,
        metavar="N",
        help="with --cache encoder: computed anew at every N-th gradient (default: 2)",
    )
    group.add_argument(
        "--autocast",
        action="store_const",
        const="bfloat16",
        help="run the network under bfloat16 autocast; the weights keep --dtype",
    )
    group.add_argument(
        "--threads",
        type=count,
        metavar="N",
        help="threads of the CPU (default: what OMP_NUM_THREADS says, else as many as cores are "
        "free, looked at again every 10 seconds)",
    )
    group.add_argument(
        "--compile", action="store_true", help="run the network through torch.compile"
    )
    group.add_argument(
        "--channels-last", action="store_true", help="lay convolutions out in channels-last order"
    )
