"""Appends the figures of finished `dive-fast evaluate` runs to bench/results.

    dive-fast evaluate --data digits --strategy invert --probes 100 --out runs/invert
    python -m bench.collect runs/invert

One line per run: configuration, environment (versions, machine, commit) and summary.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from dive_fast.evaluation import read_records, summarise

RESULTS = Path(__file__).parent / "results" / "evaluations.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directories")
    options = parser.parse_args()
    RESULTS.parent.mkdir(exist_ok=True)
    with open(RESULTS, "a", encoding="utf-8") as file:
        for run in map(Path, options.runs):
            line = json.loads((run / "run.json").read_text(encoding="utf-8"))
            line["summary"] = summarise(list(read_records(run).values())).to_dict()
            file.write(json.dumps(line) + "\n")
            print(run, line["summary"])


if __name__ == "__main__":
    main()
