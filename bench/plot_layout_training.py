"""Draws how a layout-to-image model learned: the log that `dive-fast train-layout` leaves.

python -m bench.plot_layout_training --model MODEL --out docs/images/blood_cells_training.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def read_log(model: Path) -> list[dict]:
    """The lines that have held-out losses."""
    lines = (model / "training.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if "layout" in row]


def draw(rows: list[dict], path: Path) -> None:
    from matplotlib import pyplot

    figure, (losses, told) = pyplot.subplots(1, 2, figsize=(8.0, 3.0), layout="constrained")
    steps = [row["step"] for row in rows]
    for name, label in (("empty", "without objects"), ("layout", "with the annotated layout")):
        losses.plot(steps, [row[name] for row in rows], label=label)
    losses.set(xlabel="step", ylabel="loss of held-out pictures", ylim=(0, None))
    losses.legend(frameon=False)
    told.plot(steps, [100 * row["told_apart"] for row in rows], color="C2")
    told.axhline(50, color="0.7", linewidth=0.8)
    told.set(xlabel="step", ylabel="layouts told apart by one probe, %", ylim=(40, 100))
    for panel in (losses, told):
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, type=Path, help="a directory of train-layout")
    parser.add_argument("--out", required=True, type=Path)
    options = parser.parse_args()
    draw(read_log(options.model), options.out)


if __name__ == "__main__":
    main()
