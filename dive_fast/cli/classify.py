"""``dive-fast classify``: which class explains each image best."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from dive_fast.cli.loading import chosen_strategy, load_classifier
from dive_fast.cli.options import add_classifier_options, add_images, add_readers
from dive_fast.cli.values import count

log = logging.getLogger(__name__)


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "classify",
        help="classify images",
        description="Prints one line per image: path, label and probability.",
    )
    add_images(parser)
    add_classifier_options(parser)
    add_readers(parser)
    parser.add_argument(
        "--top", type=count, default=1, metavar="K", help="show the best K classes (default: 1)"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON list instead")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from dive_fast.data.paths import expand_inputs
    from dive_fast.data.reading import Pixels, images_ahead, read_found
    from dive_fast.evaluation.encoding import images_at_once
    from dive_fast.evaluation.run import Source, run_over

    # A misspelt name should not wait for a large model to load.
    strategy = chosen_strategy(options)
    found = expand_inputs(options.images)
    printed = _Printed([path for path, _ in found], as_json=options.json)
    errors = dict(found)
    if all(errors.values()):  # no model is needed to say so
        classifier, stream = None, iter
    else:
        classifier = load_classifier(options)

        def stream(latents: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
            return classifier.stream(
                latents=latents,
                strategy=strategy,
                probes=options.probes,
                seed=options.seed,
                timesteps=options.timesteps,
                weights=options.weights,
                progress=len(errors) if sys.stderr.isatty() else None,
            )

    channels, size, _ = (3, 1, 1) if classifier is None else classifier.model.image_shape
    run_over(
        [
            Source(path, Pixels(partial(read_found, path, errors[path]), size, channels))
            for path in errors
        ],
        stream,
        printed,
        record=lambda path, answer, x0: answer.to_dict(options.top),
        readers=options.readers,
        ahead=images_ahead(channels * size * size),
        encode=None if classifier is None else classifier.encode_pixels,
        at_once=1 if classifier is None else images_at_once(classifier.model.device),
    )
    if options.json:
        print(json.dumps(printed.records, indent=2, allow_nan=False))
    return 2 if printed.failed else 0


class _Printed:
    """Prints records in the order of the images, each as early as that order allows.

    Args:
        paths: the images, some perhaps several times.
        as_json: print errors only; the rest is for whoever looks at ``records``.
    """

    def __init__(self, paths: Sequence[str], as_json: bool) -> None:
        self.paths, self.as_json = paths, as_json
        self.known: dict[str, Mapping[str, Any]] = {}
        self.records: list[Mapping[str, Any]] = []
        self.failed = False

    def finished(self, path: str) -> bool:
        return path in self.known

    def append(self, record: Mapping[str, Any]) -> None:
        self.known[record["id"]] = record
        while len(self.records) < len(self.paths):
            next_one = self.known.get(self.paths[len(self.records)])
            if next_one is None:
                return
            self.records.append(next_one)
            self._print(next_one)

    def _print(self, record: Mapping[str, Any]) -> None:
        from tqdm import tqdm

        from dive_fast.evaluation.run import sentence

        if "error" in record:
            self.failed = True
            log.warning(sentence(record["id"], record["error"]))
        elif not self.as_json:
            best = ", ".join(f"{entry['label']} {entry['score']:.4f}" for entry in record["top"])
            # Above the progress bar, if there is one.
            tqdm.write(f"{record['id']}: {best}", file=sys.stdout)
