"""``dive-fast detect``: which objects explain each image best, and where they are."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from functools import partial
from pathlib import Path
from typing import Any

from dive_fast.cli.loading import chosen_layout_strategy, load_detector
from dive_fast.cli.options import add_detector_options, add_images

log = logging.getLogger(__name__)

DESCRIPTION = """\
Finds the objects of images: the layout that best explains each under a layout-to-image model.

DIR/run.json holds the configuration, DIR/results.jsonl one line per image, appended as they come
(docs/records.md), DIR/drawn/ the images with their boxes. Interrupted and run again with the same
options it goes on where it stopped. An image that cannot be read is recorded with its error, is
read again next time, and the rest go on; the exit code is then 2."""


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "detect",
        help="find objects in images",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_images(parser)
    parser.add_argument("--out", required=True, metavar="DIR", help="where the results go")
    add_detector_options(parser)
    parser.add_argument("--json", action="store_true", help="print a JSON list instead of lines")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from dive_fast.data.images import read_image, to_mode
    from dive_fast.data.paths import expand_inputs
    from dive_fast.evaluation import RunDirectory
    from dive_fast.evaluation.machine import environment
    from dive_fast.evaluation.records import Form
    from dive_fast.evaluation.run import Source, run_over

    # A misspelt name should not wait for a large model to load.
    strategy = chosen_layout_strategy(options)
    errors = dict(expand_inputs(options.images))
    detector = load_detector(options)
    chosen = {"strategy": strategy, "probes": options.probes, "seed": options.seed}

    def image(path: str) -> Any:
        if (error := errors[path]) is not None:
            raise error
        return to_mode(read_image(path), 3)

    with RunDirectory.open(
        options.out,
        detector.identity(**chosen),
        environment(detector),
        Form("detection", detector.names),
    ) as results:
        run_over(
            [Source(path, partial(image, path), name=path) for path in errors],
            partial(detector.stream, **chosen),
            results,
            progress=sys.stderr.isatty(),
            record=partial(_record, results.path / "drawn"),
        )
        records = [results.done()[path] for path in errors]
    if options.json:
        print(json.dumps(records, indent=2, allow_nan=False))
    good = [record for record in records if "error" not in record]
    empty = sum(not record["labels"] for record in good)
    if empty > len(good) / 2:
        log.warning(
            "nothing was found in %d of %d images: dive-fast diagnose says, on annotated ones, "
            "whether more training, more pixels or another search would help.", empty, len(good),
        )  # fmt: skip
    for record in good if not options.json else ():
        print(f"{record['id']}: {_line(record)}")
    return 0 if len(good) == len(records) else 2


def _record(folder: Path, path: str, found: Any, image: Any) -> dict[str, Any]:
    """What was found, and the name of the image with its boxes, which is still free."""
    folder.mkdir(exist_ok=True)
    stem, number = Path(path).stem, 1
    target = folder / f"{stem}.png"
    while target.exists():
        number += 1
        target = folder / f"{stem}-{number}.png"
    found.draw(image).save(target)
    return {**found.to_dict(), "drawn": f"{folder.name}/{target.name}"}


def _line(record: dict[str, Any]) -> str:
    fields = (record["labels"], record["confidences"], record["boxes"])
    objects = [
        f"{label} {score:.2f} ({', '.join(f'{side:.0f}' for side in box)})"
        for label, score, box in zip(*fields, strict=True)
    ]
    if objects:
        return "; ".join(objects)
    reason = record.get("reason")
    return "nothing found" if reason is None else f"nothing found: {reason}"
