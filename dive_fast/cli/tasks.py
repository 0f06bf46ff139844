"""``dive-fast tasks``: lists the tasks of images and texts, and runs one."""

from __future__ import annotations

import argparse
import json
import logging
import sys

from dive_fast.cli.options import add_log_to, add_scorer_options
from dive_fast.cli.values import count
from dive_fast.errors import DiveFastError

log = logging.getLogger(__name__)

DESCRIPTION = """\
Does a text-to-image model know which text belongs to which image? Without arguments lists the
tasks; with the name of one and --data runs it:

  dive-fast tasks sugarcrepe --data sugar-crepe/data --images val2017 --model MODEL --out RUN
  dive-fast tasks winoground --data winoground --images images.zip --model MODEL --out RUN

A file of your own (JSON or YAML) may stand for the name: docs/tasks.md says what is in it. Folders
and .zip files are read as they are. RUN/results.jsonl gets one line per item, as they come; at the
end RUN/summary.json the text, image and group scores with their Wilson intervals at 95%, of all
items and of each category, and RUN/results.csv a table. Interrupted and run again with the same
options it goes on where it stopped. An item whose image cannot be read is recorded with its error
and the rest go on; the exit code is then 2."""


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "tasks",
        help="list or run tasks of images and texts, such as SugarCrepe and Winoground",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "task", nargs="?", metavar="NAME|FILE", help="a task, or a file that says what it is"
    )
    parser.add_argument(
        "--data", metavar="DIR|ZIP", help="where the files of items are; needed to run a task"
    )
    parser.add_argument(
        "--images", metavar="DIR|ZIP", help="where the images are (default: in --data)"
    )
    parser.add_argument("--out", metavar="RUN", help="the run directory; needed to run a task")
    parser.add_argument(
        "--image-rule",
        default="null",
        choices=["null", "raw"],
        help="what is compared across images: null: the loss less that without a text (default); "
        "raw: the loss alone",
    )
    parser.add_argument(
        "--limit", type=count, metavar="N", help="a random subset of N items, by --seed"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    add_log_to(parser)
    add_scorer_options(parser, searches=True, default="auto, min_agreement=0.99")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from dive_fast.data.tasks import read_task, task_names

    if options.task is None:
        tasks = [read_task(name) for name in task_names()]
        print(json.dumps([t.to_json() for t in tasks]) if options.json else _list(tasks))
        return 0
    spec = read_task(options.task)
    if options.data is None and options.out is None:
        print(json.dumps(spec.to_json()) if options.json else _told(spec))
        return 0
    for name in ("data", "out", "model"):
        if getattr(options, name) is None:
            raise DiveFastError(f"expected --{name} to run the task {spec.name}, got none.")
    try:
        summary = _run(options, spec)
    except KeyboardInterrupt:
        log.warning("interrupted; run again to go on from %s.", options.out)
        return 130
    print(json.dumps(summary.to_dict()) if options.json else text(summary))
    return 2 if summary.failed else 0


def _run(options: argparse.Namespace, spec):
    from dive_fast.cli.loading import chosen_strategy, load_scorer, strategy_settings
    from dive_fast.data.tasks import open_task
    from dive_fast.evaluation.tasks import DEFAULT, evaluate_task
    from dive_fast.strategies.base import with_settings

    if options.strategy is not None or options.preset is not None:
        strategy = chosen_strategy(options)
    elif options.set:
        strategy = with_settings(DEFAULT, strategy_settings(options))
    else:
        strategy = None
    data = open_task(spec, options.data, options.images)
    return evaluate_task(
        load_scorer(options),
        data,
        options.out,
        strategy=strategy,
        probes=options.probes,
        seed=options.seed,
        timesteps=options.timesteps,
        image_rule=options.image_rule,
        limit=options.limit,
        log_to=options.log_to,
        progress=sys.stderr.isatty(),
    )


def _list(tasks) -> str:
    width = max(len(task.name) for task in tasks)
    lines = [f"{task.name:{width}}  {task.about}" for task in tasks]
    return "\n".join([*lines, "", "'dive-fast tasks NAME' says where its files come from."])


def _told(spec) -> str:
    rows = {
        "task": spec.name,
        "about": spec.about,
        "files": ", ".join(file for file, _ in spec.items),
        "images": ", ".join(spec.images),
        "texts": ", ".join(spec.texts),
        "source": spec.source,
        "citation": spec.citation,
        "licence": spec.licence,
    }
    return "\n".join(f"{key:9} {value}" for key, value in rows.items() if value)


def text(summary) -> str:
    """The summary as a table, one category a line."""
    names = list(summary.scores)
    width = max(map(len, [*summary.categories, "category"]))
    head = "".join(f"{name + ' score':>26}" for name in names)
    lines = [f"{'category':{width}}   items{head}"] if names else []
    for category, scores in [*summary.categories.items(), ("all", summary.scores)]:
        if scores:
            n = max(score.n for score in scores.values())
            cells = "".join(f"{_share(scores.get(name)):>26}" for name in names)
            lines.append(f"{category:{width}}  {n:6}{cells}")
    lines.append("")
    if summary.n:
        lines += [
            f"evaluations per item   {summary.evaluations_per_item:,.1f}",
            f"seconds per item       {summary.seconds_per_item:.3f}",
        ]
    if summary.failed:
        lines.append(f"items that failed      {summary.failed}")
    return "\n".join(lines).strip()


def _share(score) -> str:
    return "" if score is None else f"{score.share:.1%} [{score.low:.1%}, {score.high:.1%}]"
