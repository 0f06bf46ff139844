"""``dive-fast choose``: which of its own candidates explains each image best."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path

from dive_fast.cli.loading import chosen_strategy, load_scorer
from dive_fast.cli.options import add_scorer_options

log = logging.getLogger(__name__)

MOST_SHOWN = 20  # answers on the screen

DESCRIPTION = """\
Chooses one of each image's own candidate texts by a text-to-image model. ITEMS has one JSON object
a line:

  {"id": "17", "image": "photos/17.jpg", "candidates": ["a dog chases a cat", "a cat chases a dog"]}

and, if wanted, "mask": a picture of grey levels of the image's own size, of what its pixels count.
Relative paths begin where ITEMS lies. Candidates are prompts as they stand.

RUN/run.json holds the configuration, RUN/results.jsonl one line per item, appended as they come
(docs/scores.md). Interrupted and run again with the same options it goes on where it stopped. An
item that cannot be used is recorded with its error and the rest go on; the exit code is then 2."""


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "choose",
        help="choose among each image's own candidate texts",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("items", metavar="ITEMS", help="the file of items (.jsonl)")
    parser.add_argument("--out", required=True, metavar="RUN", help="the run directory")
    parser.add_argument("--json", action="store_true", help="print the summary as a JSON object")
    add_scorer_options(parser, searches=True)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from dive_fast.data.item_lines import read_item_lines
    from dive_fast.evaluation.choices import choose_over

    if options.strategy is None and options.preset is None:
        options.strategy = "race"
    strategy = chosen_strategy(options)
    read_item_lines(options.items)  # a mistake in it should not wait for a large model to load
    scorer = load_scorer(options)
    try:
        summary = choose_over(
            scorer,
            options.items,
            options.out,
            strategy=strategy,
            probes=options.probes,
            seed=options.seed,
            timesteps=options.timesteps,
            weights=options.weights,
            progress=sys.stderr.isatty(),
        )
    except KeyboardInterrupt:
        log.warning("interrupted; run again to go on from %s.", options.out)
        return 130
    if options.json:
        print(json.dumps(summary.to_dict(), allow_nan=False))
    else:
        print("\n".join([*_answers(Path(options.out)), _text(summary)]))
    return 2 if summary.failed else 0


def _answers(out: Path) -> list[str]:
    """The first answers of a run, one a line, and where the others are."""
    found: dict[str, str] = {}
    for line in (out / "results.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if "error" not in record:
            margin = record["margin"]
            told = "the only one measured" if margin is None else f"margin {margin:.2f}"
            found[record["id"]] = f"{record['id']}: {record['text']} ({told})"
    lines = list(found.values())
    if len(lines) > MOST_SHOWN:
        lines = [*lines[:MOST_SHOWN], f"{len(lines) - MOST_SHOWN} more in {out / 'results.jsonl'}"]
    return [*lines, ""] if lines else []


def _text(summary) -> str:
    """The summary, one figure a line."""
    if summary.n == 0:
        return f"no item could be used ({summary.failed} failed)"
    lines = [
        f"items                  {summary.n}",
        f"candidates per item    {summary.candidates_per_item:.1f}",
        f"evaluations per item   {summary.evaluations_per_item:,.0f}",
        f"seconds per item       {summary.seconds_per_item:.3f}",
    ]
    if summary.failed:
        lines.append(f"items that failed      {summary.failed}")
    return "\n".join(lines)
