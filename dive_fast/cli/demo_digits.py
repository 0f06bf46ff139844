"""The demonstration: real handwritten digits, four strategies, one table and one image."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dive_fast.data import digits, open_dataset, select
from dive_fast.errors import DiveFastError
from dive_fast.evaluation import evaluate, read_records, summarise
from dive_fast.evaluation.machine import environment
from dive_fast.predict.classifier import DiffusionClassifier

PROBES = 100
# The default strategy takes some 90 evaluations an image and is run on all of them. The others are
# there to compare: enumeration takes 1,000 and the published inversion 6,000.
COMPARED = 50
PAPER_IMAGES = 5
FIGURE_ROWS = 8


@dataclass(frozen=True)
class Row:
    """One line of the table: how to run it, and on how many images (all if None)."""

    title: str
    folder: str
    strategy: str
    preset: str | None = None
    limit: int | None = None


# In the order in which they run: what is quick and ours comes first, and is drawn at once.
ROWS = (
    Row("auto", "auto", "auto"),
    Row("enumerate", "enumerate", "enumerate", limit=COMPARED),
    Row("invert", "invert", "invert", limit=COMPARED),
    Row("invert, dive-paper", "dive-paper", "invert", "dive-paper", PAPER_IMAGES),
)


def run_demo(out: str | Path, *, limit: int | None = None, progress: bool = True) -> dict[str, Any]:
    """Classifies the held-out digits, and some of them with every strategy, and writes ``out``.

    Writes ``digits.png`` as soon as the first strategy is done and again at the end,
    ``summary.json`` and one run directory per strategy; run again, it goes on where it stopped.

    Args:
        out: the folder.
        limit: a random subset of the digits, all if None.
        progress: show bars, and say what is there.

    Returns:
        The content of ``summary.json``.
    """
    out = Path(out)
    classifier = DiffusionClassifier.from_pretrained("digits")
    data = select(open_dataset("digits", classifier.names), limit, seed=0)
    records: dict[str, dict[str, dict]] = {}
    for row in ROWS:
        part = select(data, row.limit, seed=0)
        if progress:
            print(f"{row.title}: {len(part.examples)} digits", flush=True)
        folder = out / row.folder
        evaluate(
            classifier,
            part,
            folder,
            strategy=row.strategy,
            preset=row.preset,
            probes=PROBES,
            progress=progress,
        )
        records[row.folder] = read_records(folder)
        if row is ROWS[0]:
            draw(out / "digits.png", records)
            if progress:
                print(f"{out}/digits.png is there, for now of {row.title} alone", flush=True)
    summary = {
        "model": "digits",
        "probes": PROBES,
        "strategies": {row.title: _figures(records, row) for row in ROWS},
        "environment": environment(classifier),
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    draw(out / "digits.png", records)
    return summary


def as_table(summary: Mapping[str, Any]) -> str:
    """The summary for a terminal."""
    head = ("strategy", "images", "accuracy", "agreement", "evaluations", "seconds")
    lines = [head]
    for title, f in summary["strategies"].items():
        lines.append(
            (
                title,
                str(f["n"]),
                f"{f['accuracy']:.1%} +- {f['standard_error']:.1%}",
                f"{f['agreement_with_enumeration']:.1%}",
                f"{f['evaluations_per_image']:,.0f}",
                f"{f['seconds_per_image']:.3f}",
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    text = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    note = "(agreement: with enumerate, on what both saw; evaluations and seconds: per image)"
    return "\n".join([*text, note])


def draw(path: Path, records: Mapping[str, Mapping[str, dict]]) -> None:
    """Digits, the losses of the classes that were measured, and every strategy's answer.

    The losses are those of enumeration; without its records those of the first strategy.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise DiveFastError(
            "the image needs matplotlib, which is not installed: pip install 'dive_fast[demo]'."
        ) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    images = digits.load_digits("test").images
    shown = records.get("enumerate") or records[ROWS[0].folder]
    chosen = _worth_seeing(shown)
    figure, axes = pyplot.subplots(
        len(chosen), 2, figsize=(8, 1.35 * len(chosen)), width_ratios=(1, 4), squeeze=False
    )
    for (left, right), example in zip(axes, chosen, strict=True):
        losses = np.array(shown[example]["losses"], dtype=float)  # NaN: not measured
        truth = shown[example]["truth"]
        answers = {
            row.title: records[row.folder][example]["index"]
            for row in ROWS
            if example in records.get(row.folder, ())
        }
        left.imshow(images[int(example)], cmap="gray")
        left.set_ylabel(f"{truth}", rotation=0, labelpad=12, va="center", fontsize=13)
        left.set_xticks([])
        left.set_yticks([])
        # Points, not bars: what matters are differences, far from zero.
        lowest = np.nanargmin(losses)
        colours = ["#3b7dd8" if c == lowest else "#8a94a3" for c in range(len(losses))]
        right.vlines(range(len(losses)), losses[lowest], losses, color="#dde1e6")
        right.scatter(range(len(losses)), losses, color=colours, zorder=3)
        right.margins(y=0.2)
        right.set_xticks(range(len(losses)))
        right.tick_params(labelsize=7)
        said = ",  ".join(f"{title}: {answer}" for title, answer in answers.items())
        wrong = any(answer != truth for answer in answers.values())
        right.set_title(said, fontsize=8, loc="left", color="#b3261e" if wrong else "black")
        for side in ("top", "right"):
            right.spines[side].set_visible(False)
    figure.suptitle(
        "Truth, digit, noise-prediction loss of each measured class (the lowest in blue), answers",
        fontsize=9,
    )
    figure.tight_layout(rect=(0, 0, 1, 0.995))
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _figures(records: Mapping[str, Mapping[str, dict]], row: Row) -> dict[str, Any]:
    mine, reference = records[row.folder], records["enumerate"]
    agree = [mine[key]["index"] == reference[key]["index"] for key in mine if key in reference]
    summary = summarise(list(mine.values())).to_dict()
    return {**summary, "agreement_with_enumeration": sum(agree) / len(agree)}


def _worth_seeing(records: Mapping[str, dict]) -> Sequence[str]:
    """Half the closest calls, half as they come."""
    close = sorted(records, key=lambda key: records[key]["probability"])[: FIGURE_ROWS // 2]
    return close + [key for key in records if key not in close][: FIGURE_ROWS - len(close)]
