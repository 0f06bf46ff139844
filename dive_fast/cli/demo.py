"""``dive-fast demo``: the main job on real images, in about a minute."""

from __future__ import annotations

import argparse

from dive_fast.cli.values import count


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "demo",
        help="classify real handwritten digits with every strategy, and find them in scenes",
        description="Classifies the held-out digits, and some of them by enumeration, by "
        "inversion, and by the published inversion, too; prints a table and writes summary.json "
        "and digits.png, a first time within seconds. Then finds the digits of two scenes, and "
        "writes scenes.json and scenes.png.",
    )
    parser.add_argument("--out", default="demo", metavar="DIR", help="the folder (default: demo)")
    parser.add_argument("--limit", type=count, metavar="N", help="N digits, and N scenes at most")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from dive_fast.cli.demo_digits import as_table, run_demo
    from dive_fast.cli.demo_scenes import SCENES, as_line, run_detection_demo

    summary = run_demo(options.out, limit=options.limit)
    print(f"\n{as_table(summary)}\n\n{options.out}/summary.json, {options.out}/digits.png\n")
    found = run_detection_demo(options.out, limit=min(SCENES, options.limit or SCENES))
    print(f"\n{as_line(found)}\n\n{options.out}/scenes.json, {options.out}/scenes.png")
    return 0
