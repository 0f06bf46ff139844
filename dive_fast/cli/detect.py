"""``dive-fast detect``: which objects explain each image best, and where they are."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dive_fast.cli.options import (
    add_detector_options,
    add_layout_strategy_options,
    chosen_layout_strategy,
    load_detector,
)
from dive_fast.cli.prior_options import tell_of_proportion

DESCRIPTION = """\
Finds the objects of images: the layout that best explains each under a layout-to-image model.

DIR/run.json holds the configuration, DIR/results.jsonl one line per image, appended as they come,
DIR/drawn/ the pictures with their boxes. Interrupted and run again with the same options it goes on
where it stopped. An image that cannot be read is recorded with its error, is read again next time,
and the rest go on; the exit code is then 2."""


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "detect",
        help="find objects in images",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "images", nargs="+", metavar="IMAGE", help="picture files, folders of them, or globs"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="where the results go")
    add_detector_options(parser)
    add_layout_strategy_options(parser)
    parser.add_argument("--json", action="store_true", help="print a JSON list instead of lines")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from dive_fast.data.paths import expand_inputs
    from dive_fast.errors import ImageError
    from dive_fast.evaluation.rundir import RunDirectory

    # A misspelt name should not wait for a large model to load.
    strategy = chosen_layout_strategy(options)
    errors: dict[str, str] = {}
    paths: list[str] = []
    for argument in options.images:
        try:
            paths += map(str, expand_inputs([argument]))
        except ImageError as error:
            errors[argument] = str(error)
            paths.append(argument)
    paths = list(dict.fromkeys(paths))
    detector = load_detector(options)
    tell_of_proportion(detector)
    chosen = {"strategy": strategy, "probes": options.probes, "seed": options.seed}
    with RunDirectory.open(options.out, detector.identity(**chosen)) as results:
        todo = [path for path in paths if not results.finished(path)]
        pictures = _Pictures(todo, errors, results)
        with tqdm(total=len(todo), unit="image", disable=not sys.stderr.isatty()) as bar:
            for path, found in detector.stream(pictures, **chosen):
                drawn = _draw(found, pictures.pop(path), results.path / "drawn", path)
                cost = {"evaluations": found.evaluations, "seconds": found.seconds}
                results.append({"id": path, **found.to_dict(), **cost, "drawn": drawn})
                bar.update()
        records = [results.done()[path] for path in paths]
    return _report(records, options.json)


class _Pictures:
    """Reads the pictures as they are asked for, and keeps them until they are drawn on.

    What cannot be read is recorded with its error.
    """

    def __init__(self, paths: list[str], errors: dict[str, str], results: Any) -> None:
        self.paths, self.errors, self.results = paths, errors, results
        self.kept: dict[str, Any] = {}

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        from dive_fast.data.images import read_image, to_mode
        from dive_fast.errors import ImageError

        for path in self.paths:
            error = self.errors.get(path)
            if error is None:
                try:
                    self.kept[path] = to_mode(read_image(path), 3)
                except ImageError as problem:
                    error = str(problem)
            if error is not None:
                self.results.append({"id": path, "error": error})
                continue
            yield path, self.kept[path]

    def pop(self, path: str) -> Any:
        return self.kept.pop(path)


def _draw(found: Any, picture: Any, folder: Path, path: str) -> str:
    """Writes the picture with its boxes under a name that is still free; returns the name."""
    folder.mkdir(exist_ok=True)
    stem, number = Path(path).stem, 1
    target = folder / f"{stem}.png"
    while target.exists():
        number += 1
        target = folder / f"{stem}-{number}.png"
    found.draw(picture).save(target)
    return f"{folder.name}/{target.name}"


def _report(records: list[dict[str, Any]], as_json: bool) -> int:
    """Prints all images in their order; the exit code is 2 if one could not be read."""
    if as_json:
        print(json.dumps(records, indent=2, allow_nan=False))
    for record in records:
        if "error" in record:
            print(f"dive-fast: {record['error']}", file=sys.stderr)
        elif not as_json:
            print(f"{record['id']}: {_line(record)}")
    return 2 if any("error" in record for record in records) else 0


def _line(record: dict[str, Any]) -> str:
    fields = (record["labels"], record["confidences"], record["boxes"])
    objects = [
        f"{label} {score:.2f} ({', '.join(f'{side:.0f}' for side in box)})"
        for label, score, box in zip(*fields, strict=True)
    ]
    return "; ".join(objects) if objects else "nothing found"
