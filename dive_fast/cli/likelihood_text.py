"""What ``dive-fast likelihood`` prints: a table of images, or the means of labelled ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any


def table_text(records: Sequence[Mapping[str, Any]], unit: str) -> str:
    """One line for every image and condition."""
    rows = []
    for record in records:
        for at, told in enumerate(record["conditions"]):
            name = "no class" if told["class"] is None else told["class"]
            score = (
                _measured(told["score"], told["score_standard_error"]) if "score" in told else ""
            )
            value = _measured(told["value"], told["standard_error"])
            rows.append(("" if at else record["id"], name, value, score))
    head = ("image", "condition", unit, "above no class" if unit == "nats" else "saved by it")
    if not any(row[3] for row in rows):
        head, rows = head[:3], [row[:3] for row in rows]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    left = "{:{}}  {:{}}"
    lines = []
    for row in (head, *rows):
        line = left.format(row[0], widths[0], row[1], widths[1])
        lines.append(
            line + "".join(f"  {t:>{w}}" for t, w in zip(row[2:], widths[2:], strict=True))
        )
    return "\n".join(lines)


def summary_of(records: Sequence[Mapping[str, Any]], failed: int, unit: str) -> dict[str, Any]:
    """The means over labelled images, for JSON; None where nothing supports them.

    Each mean has two standard errors: of the images, from their spread, and of the probes. All
    images share the probes, so of the latter only a bound is known without the draws: the mean of
    the images' own.
    """
    label = [record["conditions"][0] for record in records]
    plain = [c for record in records for c in record["conditions"][1:]]
    scored = [told for told in label if "score" in told]
    return {
        "unit": unit,
        "n": len(records),
        "failed": failed,
        "label": _mean(label, "value", "standard_error"),
        "no_class": _mean(plain, "value", "standard_error"),
        "score": _mean(scored, "score", "score_standard_error"),
        "score_above_0": sum(told["score"] > 0 for told in scored) / len(scored)
        if scored
        else None,
        "evaluations_per_image": (
            sum(record["evaluations"] for record in records) / len(records) if records else None
        ),
    }


def summary_text(summary: Mapping[str, Any]) -> str:
    """The same, one figure a line."""
    if not summary["n"]:
        return f"no image could be read ({summary['failed']} failed)"
    unit = summary["unit"]
    saved = "log p(x | label) - log p(x), nats" if unit == "nats" else "bits/dim saved by the label"
    lines = [f"{'':33}  {'mean':>10}  {'+- (probes)':>11}  {'+- (images)':>11}"]
    for name, key in ((f"under the label, {unit}", "label"), (f"no class, {unit}", "no_class"),
                      (saved, "score")):  # fmt: skip
        if (of := summary[key]) is not None:
            errors = (of["standard_error_probes"], of["standard_error_images"])
            cells = "  ".join(f"{'-' if e is None else f'{e:.4g}':>11}" for e in errors)
            lines.append(f"{name:33}  {of['mean']:>10.5g}  {cells}")
    if summary["score_above_0"] is not None:
        lines.append(f"{'images that the label explains':33}  {summary['score_above_0']:>10.2%}")
    lines.append(f"{'images':33}  {summary['n']:>10}")
    lines.append(f"{'evaluations per image':33}  {summary['evaluations_per_image']:>10,.0f}")
    if summary["failed"]:
        lines.append(f"{'images that failed':33}  {summary['failed']:>10}")
    return "\n".join(lines)


def _mean(told: Sequence[Mapping[str, Any]], name: str, error: str) -> dict[str, Any] | None:
    if not told:
        return None
    n, values = len(told), [one[name] for one in told]
    mean = math.fsum(values) / n
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1) if n > 1 else None
    return {
        "mean": mean,
        "standard_error_images": None if variance is None else math.sqrt(variance / n),
        "standard_error_probes": math.fsum(one[error] for one in told) / n,
    }


def _measured(value: float, error: float) -> str:
    """Both to the error's second digit, at most four places."""
    places = 2 if error <= 0 else min(4, max(0, 1 - math.floor(math.log10(error))))
    return f"{value:,.{places}f} +- {error:,.{places}f}"
