"""``dive-fast compare-runs``: two classifiers' runs on the same images."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

DESCRIPTION = """\
Compares two runs of 'dive-fast evaluate' on the images that both answered: accuracy with the
interval of its difference, how often they agree, McNemar's exact test of which is better,
probabilities, evaluations and seconds. The runs are of classifiers with the same classes.
Intervals are of 95% (docs/runs.md)."""


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "compare-runs",
        help="compare two classifiers' runs on the same images",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("a", metavar="A", help="a run directory")
    parser.add_argument("b", metavar="B", help="another one")
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    parser.add_argument(
        "--csv", metavar="FILE", help="write a table of the images that are answered differently"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from dive_fast.evaluation.comparison import DIFFERENCES, RunPair
    from dive_fast.evaluation.outputs import write_csv

    pair = RunPair(options.a, options.b)
    found = pair.compare()
    if options.csv is not None:
        write_csv(Path(options.csv), DIFFERENCES, pair.differences())
    print(json.dumps(found.to_dict(), allow_nan=False) if options.json else text(found))
    return 0


def text(found) -> str:
    """The comparison, one figure a line."""
    low, high = (f"{x:+.2%}" for x in found.accuracy_interval)
    from_, to = (f"{x:.2%}" for x in found.agreement_interval)
    lines = [
        f"A  {found.a}",
        f"B  {found.b}",
        "",
        _line("", "A", "B", "B - A"),
        _row("accuracy", found.accuracy, "{:.2%}", f"{found.accuracy.difference:+.2%} "
             f"[{low}, {high}]"),
    ]  # fmt: skip
    for title, pair, form in (
        ("p(truth)", found.truth_probability, "{:.4f}"),
        ("-log p(truth), nats", found.nll, "{:.4f}"),
    ):
        error = "" if pair.standard_error is None else f" +- {pair.standard_error:.4f}"
        lines.append(_row(title, pair, form, f"{pair.difference:+.4f}{error}"))
    for title, pair, form in (
        ("evaluations per image", found.evaluations, "{:,.0f}"),
        ("seconds per image", found.seconds, "{:.3f}"),
    ):
        times = "" if pair.ratio is None else f"{pair.ratio:.3g} times A's"
        lines.append(_row(title, pair, form, times))
    lines += [
        "",
        f"images                 {found.n} (A lacks {found.a_lacks} of B's, B {found.b_lacks} of "
        "A's)",
        f"same answer            {found.agreement:.2%} [{from_}, {to}]",
        f"right in one alone     A {found.a_right}, B {found.b_right}",
        f"McNemar, exact         p = {found.mcnemar:.3g}",
    ]
    return "\n".join(lines)


def _row(title: str, pair, form: str, difference: str) -> str:
    return _line(title, form.format(pair.a), form.format(pair.b), difference)


def _line(title: str, a: str, b: str, difference: str) -> str:
    return f"{title:22} {a:>10} {b:>10}   {difference}".rstrip()
