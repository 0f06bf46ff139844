"""Hard negatives of coloured shapes, in SugarCrepe's form: what each strategy costs.

    python -m bench.text_model --out DIR
    python -m bench.tasks --model DIR --runs runs/tasks

The items are drawn by ``bench.shapes``, which the model learned from by other draws; every category
of SugarCrepe is there in turn. The final items are those of seed 1; settings were chosen on items
of another seed. Appends to bench/results/tasks.jsonl, one row a strategy.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from PIL import Image

from bench.records import RESULTS, append_line
from bench.shapes import NEGATIVES, make_items
from dive_fast.data.tasks import TaskData, TaskSpec, open_task
from dive_fast.evaluation import TaskSummary, evaluate_task, read_records
from dive_fast.evaluation.machine import environment
from dive_fast.evaluation.tasks import DEFAULT
from dive_fast.predict.scoring import ImageTextScorer
from dive_fast.strategies import Auto, Enumerate, Race, Strategy

BATCH = 64  # rows per forward: a quarter faster for this small network on one core than 256
STRATEGIES: dict[str, Strategy] = {
    "enumerate": Enumerate(),
    "tasks' default": DEFAULT,
    "auto": Auto(),
    "race": Race(),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="the directory that bench.text_model wrote")
    parser.add_argument("--runs", required=True, type=Path, help="where runs and pictures go")
    parser.add_argument("--items", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1, help="of the items")
    parser.add_argument("--only", nargs="+", choices=STRATEGIES, default=list(STRATEGIES))
    options = parser.parse_args()
    scorer = ImageTextScorer.from_pretrained(options.model, batch_size=BATCH)
    data = write_task(options.runs / "data", options.items, options.seed)
    names = list(dict.fromkeys(["enumerate", *options.only]))
    for name in names:
        out = options.runs / name.replace("' ", "-")
        found = evaluate_task(scorer, data, out, strategy=STRATEGIES[name])
        row = {"items": options.items, "seed": options.seed, "strategy": name}
        row |= figures(found) | agreement(out, options.runs / "enumerate")
        print(json.dumps(row, indent=1), flush=True)
        # The name alone: where a model lies says nothing to others.
        machine = environment(scorer) | {"model": Path(options.model).name}
        append_line(RESULTS / "tasks.jsonl", row, machine)


def write_task(folder: Path, n: int, seed: int) -> TaskData:
    """Pictures and one file of items for each category, as SugarCrepe's are laid out."""
    rows: dict[str, dict[str, Any]] = {name: {} for name in NEGATIVES}
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for number, item in enumerate(make_items(n, seed)):
        name = f"{number:06}.png"
        Image.fromarray(item.picture).save(folder / "images" / name)
        of = rows[item.category]
        of[str(len(of))] = {
            "filename": name,
            "caption": item.caption,
            "negative_caption": item.negative,
        }
    for category, of in rows.items():
        (folder / f"{category}.json").write_text(json.dumps(of))
    content = {
        "name": "shapes",
        "items": {category: f"{category}.json" for category, of in rows.items() if of},
        "images": "filename",
        "texts": ["caption", "negative_caption"],
    }
    return open_task(TaskSpec.from_dict(content, "shapes"), folder)


def figures(summary: TaskSummary) -> dict[str, Any]:
    score = summary.scores["text"]
    return {
        "text_score": score.share,
        "interval": [score.low, score.high],
        "categories": {name: of["text"].share for name, of in summary.categories.items()},
        "failed": summary.failed,
        "evaluations_per_item": summary.evaluations_per_item,
        "seconds_per_item": summary.seconds_per_item,
    }


def agreement(run: Path, reference: Path) -> dict[str, Any]:
    """On how many items it answers as enumeration does, and for how much less."""
    found, expected = read_records(run), read_records(reference)
    same = sum(found[key]["right"] == record["right"] for key, record in expected.items())
    cost = [sum(record["evaluations"] for record in of.values()) for of in (expected, found)]
    return {"same_answers": same / len(expected), "times_fewer": cost[0] / cost[1]}


if __name__ == "__main__":
    main()
