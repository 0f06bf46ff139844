"""``dive-fast likelihood``: how likely images are under the model, and under classes."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

from dive_fast.cli.likelihood_text import summary_of, summary_text, table_text
from dive_fast.cli.loading import load_classifier
from dive_fast.cli.options import DATA, OTHER_DATA, add_model_options, add_readers
from dive_fast.cli.values import count, row_or_name, seed
from dive_fast.errors import DiveFastError

if TYPE_CHECKING:  # torch is not loaded for the help
    from dive_fast.evaluation.run import Source
    from dive_fast.predict.classifier import DiffusionClassifier
    from dive_fast.predict.likelihood import Likelihood

log = logging.getLogger(__name__)

ALL, NONE = "all", "none"
DESCRIPTION = """\
The variational bound on log p(x | c) of images, with its standard error (docs/likelihood.md): of
the images that are named a table, or of labelled ones what their label saves against no class.

With --out, RUN/run.json holds the configuration and RUN/results.jsonl one line per image, appended
as they come; interrupted and run again with the same options it goes on where it stopped. An image
that cannot be read is told, and the rest go on; the exit code is then 2."""


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "likelihood",
        help="bound the likelihood of images",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "images", nargs="*", metavar="IMAGE", help="image files, folders of them, or globs"
    )
    parser.add_argument(
        "--class",
        dest="conditions",
        action="append",
        metavar=f"NAME|ROW|{ALL}|{NONE}",
        help="a condition: a class by its name, or its row, all classes, or none, the model's own "
        "condition 'no class'; may be given several times (default: none)",
    )
    parser.add_argument(
        "--data",
        metavar=DATA,
        help="labelled images in the place of IMAGE: digits (the held-out ones), a folder with one "
        f"sub-folder per class, an .npz, {OTHER_DATA}; each under its label and under no class",
    )
    parser.add_argument(
        "--limit", type=count, metavar="N", help="with --data: a random subset of N images"
    )
    parser.add_argument(
        "--unit",
        default="nats",
        choices=["nats", "bits/dim"],
        help="nats: log p of x0, more is likelier (default); bits/dim: of 8-bit pixels, less is",
    )
    parser.add_argument(
        "--probes",
        type=count,
        default=200,
        metavar="K",
        help="evaluations for each image and condition, divisible by 4 (default: 200)",
    )
    parser.add_argument("--seed", type=seed, default=0, help="of the probes (default: 0)")
    parser.add_argument("--out", metavar="RUN", help="the run directory")
    parser.add_argument("--json", action="store_true", help="print JSON instead")
    add_readers(parser)
    add_model_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    _check(options)
    with_labels = options.data is not None
    measured = _labelled if with_labels else _named
    records: Mapping[str, Mapping[str, Any]]
    try:
        ids, records = measured(options)
    except KeyboardInterrupt:
        if options.out is not None:
            log.warning("interrupted; run again to go on from %s.", options.out)
        return 130
    there = [records[key] for key in ids if key in records]
    good = [record for record in there if "error" not in record]
    if with_labels:
        summary = summary_of(good, len(there) - len(good), options.unit)
        print(json.dumps(summary) if options.json else summary_text(summary))
    elif options.json:
        print(json.dumps(there, indent=2, allow_nan=False))
    elif good:
        print(table_text(good, options.unit))
    return 0 if len(good) == len(there) else 2


def _check(options: argparse.Namespace) -> None:
    """What does not go together; a large model need not be loaded to say so.

    Raises:
        DiveFastError: some of it.
    """
    if bool(options.images) == (options.data is not None):
        raise DiveFastError("expected either images or --data.")
    if options.data is not None and options.conditions is not None:
        raise DiveFastError("--class is for images that are named; --data has its own labels.")
    if options.data is None and options.limit is not None:
        raise DiveFastError("--limit needs --data.")


def _named(options: argparse.Namespace) -> tuple[list[str], Mapping[str, Mapping[str, Any]]]:
    """The records of images by their paths."""
    from dive_fast.data.paths import expand_inputs
    from dive_fast.data.reading import Pixels, read_found
    from dive_fast.evaluation.run import Source

    errors = dict(expand_inputs(options.images))
    classifier = load_classifier(options)
    names = classifier.names
    chosen = _conditions(options.conditions, names)
    told = [NONE if row is None else names[row] for row in chosen]
    channels, size, _ = classifier.model.image_shape
    sources = [
        Source(path, Pixels(partial(read_found, path, error), size, channels), name=path)
        for path, error in errors.items()
    ]

    def items(images: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any, list[int | None]]]:
        return ((key, image, chosen) for key, image in images)

    config = {"conditions": told}
    return list(errors), _run(options, classifier, sources, items, config, len(sources))


def _labelled(options: argparse.Namespace) -> tuple[Sequence[str], Mapping[str, Any]]:
    """The records of labelled images."""
    from dive_fast.data import folder_classes, open_dataset, select
    from dive_fast.data.reading import Pixels
    from dive_fast.evaluation.run import Source

    classifier = load_classifier(options, folder_classes(options.data))
    data = select(open_dataset(options.data, classifier.names), options.limit, options.seed)
    channels, size, _ = classifier.model.image_shape
    plain = classifier.model.vocabulary.unconditional is not None
    if not plain:
        log.warning(
            "%s has not learned a condition that means no class: only that of the label is "
            "measured.", classifier.model.name,
        )  # fmt: skip
    labels: dict[str, int] = {}  # of a stream they are known only when their turn has come

    def sources() -> Iterator[Source]:
        for example in data.examples:
            labels[example.id] = example.label
            facts = {"truth": example.label, "truth_name": classifier.names[example.label]}
            yield Source(example.id, Pixels(example.load, size, channels), facts, name=example.id)

    def items(images: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any, list[int | None]]]:
        for key, image in images:
            yield key, image, [labels.pop(key), *([None] if plain else [])]

    config = {"data": data.identity()}
    found = _run(options, classifier, sources(), items, config, len(data.examples))
    return data.ids, found


def _run(
    options: argparse.Namespace,
    classifier: DiffusionClassifier,
    sources: Iterable[Source],
    items: Any,
    config: Mapping[str, Any],
    total: int,
) -> Mapping[str, Mapping[str, Any]]:
    """Every image measured that has no record yet; all records by id."""
    from dive_fast.data.reading import images_ahead
    from dive_fast.evaluation import RunDirectory
    from dive_fast.evaluation.machine import environment
    from dive_fast.evaluation.run import run_over

    asked = {"unit": options.unit, "probes": options.probes, "seed": options.seed}
    records: AbstractContextManager[Any] = nullcontext(_Kept())
    if options.out is not None:
        config = {**classifier.likelihood_identity(**asked), **config}
        records = RunDirectory.open(options.out, config, environment(classifier))
    channels, size, _ = classifier.model.image_shape
    with records as kept:
        run_over(
            sources,
            lambda images: classifier.stream_log_likelihood(items(images), **asked),
            kept,
            progress=sys.stderr.isatty(),
            total=total,
            record=lambda key, found, image: _record(found, classifier.names),
            readers=options.readers,
            ahead=images_ahead(channels * size * size),
        )
        return dict(kept.done())


class _Kept:
    """Records that nobody wants written."""

    def __init__(self) -> None:
        self._records: dict[str, Mapping[str, Any]] = {}

    def finished(self, record_id: str) -> bool:
        return False

    def append(self, record: Mapping[str, Any]) -> None:
        self._records[record["id"]] = record

    def done(self) -> Mapping[str, Mapping[str, Any]]:
        return self._records


def _conditions(texts: Sequence[str] | None, names: tuple[str, ...]) -> list[int | None]:
    """Rows, None for "no class", each once.

    Raises:
        DiveFastError: there is no such class.
    """
    from dive_fast.predict.explaining import class_row

    found: dict[int | None, None] = {}
    for text in [NONE] if texts is None else texts:
        # A class may be called so.
        if text == ALL and text not in names:
            found |= dict.fromkeys(range(len(names)))
        elif text == NONE and text not in names:
            found[None] = None
        else:
            found[class_row(row_or_name(text, names), names)] = None
    return list(found)


def _record(found: Likelihood, names: tuple[str, ...]) -> dict[str, Any]:
    """One image's values, and what each class has above no class where both were measured."""
    conditions = []
    for column, row in enumerate(found.classes):
        told: dict[str, Any] = {
            "class": None if row is None else names[row],
            "row": row,
            "value": found.values[0, column].item(),
            "standard_error": found.standard_errors[0, column].item(),
        }
        if row is not None and None in found.classes:
            score, error = found.of(row).score(found.of(None))
            told |= {"score": score.item(), "score_standard_error": error.item()}
        conditions.append(told)
    return {
        "unit": found.unit,
        "bound_of": found.bound_of,
        "conditions": conditions,
        "evaluations": len(found.probes) * len(conditions),
    }
