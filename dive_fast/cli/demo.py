"""``dive-fast demo``: the main job on real images, in a few minutes."""

from __future__ import annotations

import argparse

from dive_fast.cli.options import count


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "demo",
        help="classify real handwritten digits with every strategy",
        description="Classifies the held-out digits by enumeration, by inversion, and by the "
        "published inversion; prints a table and writes summary.json and digits.png.",
    )
    parser.add_argument("--out", default="demo", metavar="DIR", help="the folder (default: demo)")
    parser.add_argument("--limit", type=count, metavar="N", help="a random subset of N digits")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from dive_fast.demo import as_table, run_demo

    summary = run_demo(options.out, limit=options.limit)
    print(f"\n{as_table(summary)}\n\n{options.out}/summary.json, {options.out}/digits.png")
    return 0
