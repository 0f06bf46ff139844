"""``dive-fast classify``: which class explains each image best."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dive_fast.cli.options import (
    add_model_options,
    add_strategy_options,
    chosen_strategy,
    count,
    load_classifier,
)


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "classify",
        help="classify images",
        description="Prints one line per image: path, label and probability.",
    )
    parser.add_argument(
        "images", nargs="+", metavar="IMAGE", help="picture files, folders of them, or globs"
    )
    add_model_options(parser)
    add_strategy_options(parser)
    parser.add_argument(
        "--top", type=count, default=1, metavar="K", help="show the best K classes (default: 1)"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON list instead")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    # A misspelt name should not wait for a large model to load.
    strategy = chosen_strategy(options)
    errors: dict[int, str] = {}
    paths = list(_expand(options.images, errors))
    report = _Report(paths, errors, options)
    if len(errors) < len(paths):
        classifier = load_classifier(options)
        stream = classifier.stream(
            latents=_latents(classifier, paths, errors),
            strategy=strategy,
            probes=options.probes,
            seed=options.seed,
            timesteps=options.timesteps,
            progress=len(paths) if sys.stderr.isatty() else None,
        )
        for i, answer in stream:
            report.add(i, answer)
    return report.finish()


def _expand(arguments: list[str], errors: dict[int, str]) -> Iterator[Path]:
    """The files of all arguments; one that gives none keeps its place, with an error."""
    from dive_fast.data.paths import expand_inputs
    from dive_fast.errors import ImageError

    position = 0
    for argument in arguments:
        try:
            found = expand_inputs([argument])
        except ImageError as error:
            errors[position] = str(error)
            found = [Path(argument)]
        yield from found
        position += len(found)


def _latents(classifier, paths: list[Path], errors: dict[int, str]) -> Iterator[tuple[int, Any]]:
    from dive_fast.errors import ImageError

    for i, path in enumerate(paths):
        if i in errors:
            continue
        try:
            x0 = classifier.encode(path)[0]
        except ImageError as error:
            errors[i] = str(error)
            continue
        yield i, x0


class _Report:
    """Prints in the order of the images, each as early as that order allows.

    Args:
        paths: the images.
        errors: by position, of those that cannot be read; grows while others are classified.
    """

    def __init__(
        self, paths: list[Path], errors: dict[int, str], options: argparse.Namespace
    ) -> None:
        self.paths, self.errors, self.options = paths, errors, options
        self.answers: dict[int, Any] = {}
        self.records: list[dict[str, Any]] = []

    def add(self, i: int, answer: Any) -> None:
        self.answers[i] = answer
        self._print_known()

    def finish(self) -> int:
        """The exit code: 2 if an image could not be read."""
        self._print_known()
        if self.options.json:
            print(json.dumps(self.records, indent=2, allow_nan=False))
        return 2 if self.errors else 0

    def _print_known(self) -> None:
        while (i := len(self.records)) < len(self.paths):
            if i in self.errors:
                self.records.append({"image": str(self.paths[i]), "error": self.errors[i]})
                # Above the progress bar, if there is one.
                tqdm.write(f"dive-fast: {self.errors[i]}", file=sys.stderr)
            elif i in self.answers:
                self._print_answer(self.paths[i], self.answers.pop(i))
            else:
                return

    def _print_answer(self, path: Path, answer: Any) -> None:
        top = answer.top(self.options.top)
        self.records.append({"image": str(path), **answer.to_dict(), "top": top})
        if not self.options.json:
            best = ", ".join(f"{entry['label']} {entry['score']:.4f}" for entry in top)
            tqdm.write(f"{path}: {best}", file=sys.stdout)
