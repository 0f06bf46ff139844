"""Draws the recorded runs of `bench.strategies` and `bench.scaling`.

    python -m bench.plot_strategies --out docs/images

Accuracy over evaluations for every strategy, one panel a model, and cost over classes and over
images at once. Of every entry the latest record counts. Only reads bench/results/.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
FAMILIES = ("enumerate", "race", "auto", "invert", "dive-paper", "published")
MARKERS = dict(zip(FAMILIES, "osD^vx", strict=True))


def latest(name: str, key: tuple[str, ...]) -> list[dict]:
    """The last row of every combination of ``key``, in the order of first appearance."""
    rows: dict[tuple, dict] = {}
    for line in (RESULTS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        rows[tuple(row.get(k) for k in key)] = row
    return list(rows.values())


def family(entry: str) -> str:
    return next(name for name in FAMILIES if entry.startswith(name))


def standard_error(row: dict) -> float:
    """Of the accuracy on the images that enumeration saw too."""
    p = row["accuracy_there"]
    return math.sqrt(p * (1 - p) / row["agreement_n"])


def draw_accuracy(rows: list[dict], path: Path) -> None:
    from matplotlib import pyplot

    models = list(dict.fromkeys(row["model"] for row in rows))
    figure, panels = pyplot.subplots(
        1, len(models), figsize=(4.4 * len(models), 3.8), layout="constrained", squeeze=False
    )
    for panel, model in zip(panels[0], models, strict=True):
        mine = [row for row in rows if row["model"] == model and row.get("agreement_n")]
        for name in FAMILIES[:-1]:
            group = [row for row in mine if family(row["entry"]) == name]
            group.sort(key=lambda row: row["evaluations_per_image"])
            if group:
                panel.errorbar(
                    [row["evaluations_per_image"] for row in group],
                    [100 * row["accuracy_there"] for row in group],
                    yerr=[100 * standard_error(row) for row in group],
                    marker=MARKERS[name],
                    color=f"C{FAMILIES.index(name)}",
                    markersize=4,
                    capsize=2,
                    linewidth=1,
                    label=name,
                )
        panel.set_xscale("log")
        panel.set_title(f"{model}, {mine[0]['classes']} classes")
        panel.set_xlabel("evaluations per image")
        panel.set_ylabel("accuracy, % (bars: standard error)")
    marks = {}
    for panel in panels[0]:
        marks.update(zip(*reversed(panel.get_legend_handles_labels()), strict=True))
    figure.legend(marks.values(), marks, fontsize=8, loc="outside lower center", ncols=len(marks))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def draw_scaling(rows: list[dict], path: Path) -> None:
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(8.8, 3.8), layout="constrained")
    for panel, over, figure_of in (
        (panels[0], "classes", "evaluations_per_image"),
        (panels[1], "images", "seconds_per_image"),
    ):
        group = [row for row in rows if row["over"] == over]
        for name in dict.fromkeys(row["strategy"] for row in group):
            mine = sorted((r for r in group if r["strategy"] == name), key=lambda r: r[over])
            panel.plot(
                [row[over] for row in mine],
                [row[figure_of] for row in mine],
                marker=MARKERS[name],
                color=f"C{FAMILIES.index(name)}",
                markersize=4,
                label=name,
            )
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.set_xlabel("classes" if over == "classes" else "images at once")
        panel.set_ylabel(figure_of.replace("_", " "))
        panel.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    import matplotlib

    matplotlib.use("Agg")
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    draw_accuracy(latest("strategies", ("model", "entry")), out / "accuracy.png")
    draw_scaling(
        latest("scaling", ("model", "over", "classes", "images", "strategy")), out / "scaling.png"
    )


if __name__ == "__main__":
    main()
