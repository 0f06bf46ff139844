"""The drawings of a report, by matplotlib; what they show is given as arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dive_fast.report.svg import INK, MUTED, SURFACE, colour, drawn

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<")
_SIZE = (4.8, 3.3)  # inches


@dataclass(frozen=True, eq=False)
class Curve:
    """Points of one run.

    Attributes:
        series: the run's number, which chooses colour and marker.
        x, y: floats [n].
        error: floats [n], standard errors of y.
        counts: integers [n], how many images stand behind each point.
    """

    series: int
    x: np.ndarray
    y: np.ndarray
    error: np.ndarray | None = None
    counts: np.ndarray | None = None


def runs_over_evaluations(name: str, curves: Sequence[Curve]) -> str:
    """A point per run: evaluations an image, on a logarithmic axis, and accuracy."""

    def draw(figure) -> None:
        axes = figure.add_subplot()
        _points(axes, curves, line=False)
        _evaluations_axis(axes, curves)
        _share_axis(axes.yaxis, "accuracy")

    return drawn(name, draw, _SIZE)


def accuracy_by_evaluations(name: str, curves: Sequence[Curve]) -> str:
    """Within runs: accuracy of the images that took so many evaluations."""

    def draw(figure) -> None:
        axes = figure.add_subplot()
        _points(axes, curves, line=True)
        _evaluations_axis(axes, curves)
        _share_axis(axes.yaxis, "accuracy of these images")
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, -0.05), min(high, 1.05))

    return drawn(name, draw, _SIZE)


def reliability(name: str, curves: Sequence[Curve]) -> str:
    """Accuracy over confidence, above how many images there are in each bin."""

    def draw(figure) -> None:
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        above.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        _points(above, curves, line=True)
        above.set_xlim(-0.02, 1.02)
        above.set_ylim(-0.04, 1.04)
        _share_axis(above.yaxis, "accuracy")
        _counts(below, curves)
        _share_axis(below.xaxis, "p(y | x0) of the answer")

    return drawn(name, draw, (_SIZE[0], 4.2))


def coverage(name: str, curves: Sequence[Curve]) -> str:
    """Accuracy of the images that are answered when the least certain are left out."""

    def draw(figure) -> None:
        axes = figure.add_subplot()
        for curve in curves:
            axes.plot(curve.x, curve.y, color=colour(curve.series), linewidth=1.8)
            few = np.linspace(0, len(curve.x) - 1, min(len(curve.x), 6)).round().astype(int)
            _markers(axes, curve, few)
        axes.set_xlim(-0.02, 1.02)
        _share_axis(axes.xaxis, "share of the images that are answered")
        _share_axis(axes.yaxis, "accuracy of these")

    return drawn(name, draw, (_SIZE[0], 4.2))


def _points(axes, curves: Sequence[Curve], line: bool) -> None:
    for curve in curves:
        own = colour(curve.series)
        if line:
            axes.plot(curve.x, curve.y, color=own, linewidth=1.6)
        if curve.error is not None:
            bars = {"ecolor": own, "elinewidth": 1.2, "capsize": 2.5, "fmt": "none"}
            axes.errorbar(curve.x, curve.y, curve.error, **bars)
        _markers(axes, curve, np.arange(len(curve.x)))


def _markers(axes, curve: Curve, at: np.ndarray) -> None:
    axes.plot(
        curve.x[at],
        curve.y[at],
        linestyle="none",
        marker=MARKERS[curve.series % len(MARKERS)],
        markersize=6,
        markerfacecolor=colour(curve.series),
        markeredgecolor=SURFACE,
        markeredgewidth=0.8,
        clip_on=False,
    )


def _counts(axes, curves: Sequence[Curve]) -> None:
    """Bars side by side within each bin."""
    most = max((int(c.counts.max()) for c in curves if len(c.x)), default=0)
    gaps = [np.diff(c.x).min() for c in curves if len(c.x) > 1]
    width = 0.8 * min([*gaps, 1 / 15]) / len(curves)
    for i, curve in enumerate(curves):
        offset = (i - (len(curves) - 1) / 2) * width
        axes.bar(curve.x + offset, curve.counts, width, color=colour(curve.series))
    axes.set_ylabel("images")
    axes.set_ylim(0, max(most, 1) * 1.08)
    axes.yaxis.set_major_locator(_whole_ticks(2))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")


def _evaluations_axis(axes, curves: Sequence[Curve]) -> None:
    """Logarithmic where the numbers are far apart, with ticks that are read at once."""
    x = np.concatenate([c.x for c in curves]) if curves else np.array([1.0])
    low, high = max(float(x.min()), 0.5), max(float(x.max()), 0.5)
    axes.set_xlabel("evaluations per image")
    if high < 2 * low:
        room = max((high - low) * 0.15, 0.05 * high)
        axes.set_xlim(low - room, high + room)
        axes.xaxis.set_major_locator(_whole_ticks(5))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.4g}")
        return
    axes.set_xscale("log")
    axes.set_xlim(low / 1.25, high * 1.25)
    steps = (1, 2, 5) if high < 2000 * low else (1,)
    ticks = [s * 10.0**e for e in range(-1, 12) for s in steps]
    axes.set_xticks([t for t in ticks if low / 1.25 <= t <= high * 1.25])
    axes.set_xticks([], minor=True)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")


def _share_axis(axis, label: str) -> None:
    axis.set_label_text(label)
    axis.set_major_formatter(lambda value, _: f"{100 * value:.10g}%")
    axis.label.set_color(INK)


def _whole_ticks(n: int):
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(n, integer=True)
