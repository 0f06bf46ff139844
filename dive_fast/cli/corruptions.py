"""``dive-fast evaluate --corruption``: the option, and the table that is printed."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # torch is not loaded for the help
    from dive_fast.evaluation.corruptions import CorruptionTable, Figure

LIST = "list"


def add_corruption(group: argparse._ArgumentGroup) -> None:
    """What ``chosen_corruptions`` reads."""
    group.add_argument(
        "--corruption",
        action=_Corruption,
        metavar="NAME[:SEVERITY]",
        help="also the accuracy on corrupted images, each kind and severity in a folder of RUN, "
        "and a table of all: gaussian_noise:3, fog:1-5, a group (noise, blur, weather, digital, "
        "extra) or all; without a severity 1 to 5; may be given several times; list prints the "
        "names (docs/corruptions.md; needs the extra corruptions)",
    )


class _Corruption(argparse.Action):
    """Collects the texts; of "list" it prints the names and ends the command, as --version does."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        if values == LIST:
            from dive_fast.data.corruptions import GROUPS

            width = max(map(len, GROUPS))
            print("\n".join(f"{group:{width}}  {', '.join(n)}" for group, n in GROUPS.items()))
            print(f"{'all':{width}}  all of these but those of extra; each in severities 1 to 5")
            parser.exit(0)
        setattr(namespace, self.dest, [*(getattr(namespace, self.dest) or []), values])


def chosen_corruptions(options: argparse.Namespace) -> list[Any] | None:
    """The corruptions of ``--corruption``; None without it.

    Raises:
        DiveFastError: there is no such corruption, or their package is not installed.
    """
    if options.corruption is None:
        return None
    from dive_fast.data.corruptions import expect_corruptions, read_corruptions

    chosen = read_corruptions(options.corruption, options.seed)
    expect_corruptions()
    return chosen


def table_text(table: CorruptionTable) -> str:
    """One line for each run, one for each corruption of several severities, and the means."""
    names = [f"{r.corruption}" if r.severity is None else f"{r.corruption} {r.severity}"
             for r in table.rows]  # fmt: skip
    several = [name for name in table.errors if sum(r.corruption == name for r in table.rows) > 1]
    means = ["mean corruption error", "  above the clean error"]
    width = max(map(len, [*names, *(f"{n}, mean" for n in several), *means]))
    lines = [f"{'':{width}}  {'error':>17}  {'above clean':>17}  evaluations  images"]
    for name, row in zip(names, table.rows, strict=True):
        wrong = None if row.accuracy.value is None else 1 - row.accuracy.value
        above = "" if row.severity is None else _share(*_parts(row.relative))
        lines.append(
            f"{name:{width}}  {_share(wrong, row.accuracy.standard_error):>17}  {above:>17}  "
            f"{'-' if row.evaluations is None else f'{row.evaluations:,.0f}':>11}  {row.n:6}"
        )
    lines.append("")
    for name in several:
        figures = (table.errors[name], table.relative[name])
        lines.append(_means(f"{name}, mean", width, figures))
    lines.append(_means(means[0], width, [table.mean_error]))
    lines.append(_means(means[1], width, [table.mean_relative]))
    if table.failed:
        lines.append(f"images that failed, in all runs: {table.failed}")
    return "\n".join(lines)


def _means(name: str, width: int, figures: Sequence[Figure]) -> str:
    return f"{name:{width}}" + "".join(f"  {_share(*_parts(one)):>17}" for one in figures)


def _parts(figure: Figure) -> tuple[float | None, float | None]:
    return figure.value, figure.standard_error


def _share(value: float | None, error: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2%}" + ("" if error is None else f" +- {error:.2%}")
