"""Tabulates and draws recorded benchmarks: `python -m bench.plot [RESULT.json] --out FOLDER`."""

from __future__ import annotations

import argparse
import json
from itertools import groupby
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", nargs="*", type=Path, help="default: the latest record")
    parser.add_argument("--out", type=Path, help="folder for one figure per op")
    arguments = parser.parse_args()
    for path in arguments.results or sorted(RESULTS.glob("*.json"))[-1:]:
        record = json.loads(path.read_text(encoding="utf-8"))
        print(table(record))
        if arguments.out is not None:
            draw(record, arguments.out / path.stem)


def grouped(record: dict) -> list[tuple[tuple[str, str], list[dict]]]:
    """The rows by op and size, in the order of the record."""
    return [(key, list(rows)) for key, rows in groupby(record["rows"], _op_and_size)]


def _op_and_size(row: dict) -> tuple[str, str]:
    return row["op"], row["size"]


def table(record: dict) -> str:
    """A Markdown table: milliseconds, spread, speed against plain torch, share of a copy."""
    machine = record["machine"]
    lines = [
        f"{machine.get('gpu', machine['processor'])}, torch {record['torch']}, "
        f"commit {record['commit'][:12]}, load {record['load']:.1f} at the end",
        "",
        "| op | size | threads | row | median ms | iqr ms | against plain | of copy bandwidth |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (op, size), rows in grouped(record):
        plain = next((row["median"] for row in rows if row["backend"] == "plain"), None)
        for row in rows:
            speed = f"{plain / row['median']:.1f}x" if plain else ""
            share = f"{row['share_of_copy']:.0%}" if row["share_of_copy"] else ""
            lines.append(
                f"| {op} | {size} | {row['threads']} | {row['backend']} "
                f"| {1e3 * row['median']:.3f} | {1e3 * row['iqr']:.3f} | {speed} | {share} |"
            )
    return "\n".join(lines)


def draw(record: dict, folder: Path) -> None:
    """One figure per op: a group of bars per size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    for op, groups in groupby(grouped(record), lambda group: group[0][0]):
        groups = list(groups)
        figure, axes = pyplot.subplots(
            1, len(groups), figsize=(3.2 * len(groups), 3.4), layout="constrained", squeeze=False
        )
        for axis, ((_, size), rows) in zip(axes[0], groups, strict=True):
            names = [row["backend"] for row in rows]
            axis.bar(
                names,
                [1e3 * row["median"] for row in rows],
                yerr=[1e3 * row["iqr"] / 2 for row in rows],
            )
            axis.set_title(size, fontsize=9)
            axis.tick_params(axis="x", labelrotation=30, labelsize=7)
            axis.set_ylabel("median ms")
        figure.suptitle(op)
        figure.savefig(folder / f"{op.replace(' ', '_')}.png", dpi=120)
        pyplot.close(figure)


if __name__ == "__main__":
    main()
