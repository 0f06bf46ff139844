"""What checkpoints come to, drawn over the steps of their training."""

from __future__ import annotations

from pathlib import Path

from dive_fast.core.files import replacing
from dive_fast.evaluation.generators import GeneratorComparison, GeneratorFigures

TITLES = {
    "accuracy": "accuracy",
    "rank": "mean rank of the right class",
    "margin": "margin, nats",
    "log_likelihood": "log p(x0 | right class), nats",
}
_SETTINGS = {
    "svg.fonttype": "none",
    "svg.hashsalt": "steps",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.linewidth": 0.4,
    "font.size": 9,
}


def draw_steps(found: GeneratorComparison, path: Path) -> None:
    """A panel for each figure, over the steps, with intervals; SVG or PNG by the path's ending.

    What has no step is a level line.

    Raises:
        OSError: it cannot be written.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    rows = sorted((r for r in found.rows if r.step is not None), key=lambda r: r.step)
    names = [name for name in TITLES if all(name in row.figures for row in rows)]
    with rc_context(_SETTINGS):
        figure = Figure((2.6 * len(names), 2.5), layout="constrained")
        for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
            _panel(axes, name, rows)
            for i, row in enumerate(r for r in found.rows if r.step is None):
                if name in row.figures:
                    level = row.figures[name].value
                    axes.axhline(level, color=f"C{i + 1}", linewidth=1, label=row.name)
                    axes.legend(fontsize=7)
        kind = path.suffix.removeprefix(".")
        metadata = {"Date": None} if kind == "svg" else {}
        with replacing(path) as file:
            figure.savefig(file, format=kind, dpi=150, metadata=metadata)


def _panel(axes, name: str, rows: list[GeneratorFigures]) -> None:
    steps, estimates = [row.step for row in rows], [row.figures[name] for row in rows]
    low, high = ([getattr(e, end) for e in estimates] for end in ("low", "high"))
    axes.plot(steps, [e.value for e in estimates], marker="o", markersize=3, linewidth=1.2)
    if None not in (*low, *high):
        axes.fill_between(steps, low, high, alpha=0.25, linewidth=0)
    if min(steps) > 0 and max(steps) > 10 * min(steps):
        axes.set_xscale("log")
    if name == "accuracy":
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_title(TITLES[name], fontsize=9)
    axes.set_xlabel("steps of the training")
