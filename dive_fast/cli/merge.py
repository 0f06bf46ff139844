"""``dive-fast merge``: one run of the runs of shards."""

from __future__ import annotations

import argparse
import json

DESCRIPTION = """\
Makes one run of the runs that 'evaluate --shard I/N' wrote, on whatever machines, if they belong
together: the same model, data, strategy and probes, every shard there and finished, no image
missing or doubled. Other versions are warned of.

RUN is the run of a shard, or a folder that holds such; of one folder the merged run lies in it
unless --out says otherwise. 'dive-fast evaluate' with the options of the shards but --shard goes
on with the merged run, which has nothing left to do."""


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "merge",
        help="make one run of the runs of shards",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="runs of shards, or their folder")
    parser.add_argument("--out", metavar="RUN", help="the directory of the merged run")
    parser.add_argument("--json", action="store_true", help="print the summary as a JSON object")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from dive_fast.cli.evaluate import classifier_text
    from dive_fast.evaluation.merging import merge
    from dive_fast.evaluation.outputs import write_outputs
    from dive_fast.evaluation.runfiles import is_detection_run

    target = merge(options.runs, options.out)
    if is_detection_run(target):
        print(f"merged into {target}: 'dive-fast evaluate' with the same options scores it.")
        return 0
    summary = write_outputs(target)
    if options.json:
        print(json.dumps(summary.to_dict(), allow_nan=False))
    else:
        print(f"merged into {target}")
        print(classifier_text(summary))
    return 2 if summary.failed else 0
