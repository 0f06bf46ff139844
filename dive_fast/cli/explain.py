"""``dive-fast explain``: where one class explains each image better than another."""

from __future__ import annotations

import argparse
import logging
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dive_fast.cli.explain_files import MapFiles, MapSearch
from dive_fast.cli.loading import chosen_strategy, load_classifier
from dive_fast.cli.options import add_classifier_options, add_images
from dive_fast.cli.values import row_or_name

if TYPE_CHECKING:  # torch is not loaded for the help
    from dive_fast.predict.classifier import DiffusionClassifier

log = logging.getLogger(__name__)

DESCRIPTION = """\
Draws over each image where class A explains it better (red) and where B does (blue): the loss of
B less that of A before the mean over the places. Places within two standard errors stay grey.

DIR gets a PNG and an .npz per image, DIR/run.json the configuration, DIR/results.jsonl one line per
image, appended as they come; interrupted and run again with the same options it goes on where it
stopped. At the end maps.json (classes, mean difference and its standard error, what the map cost)
and maps.npz (difference and standard_error, float32 [N, h, w] in the model's own space, in the
order of maps.json) have all images of the call. An image that cannot be read is told, and the rest
go on; the exit code is then 2."""


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "explain",
        help="draw where one class explains images better than another",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_images(parser)
    parser.add_argument("--out", required=True, metavar="DIR", help="where the maps go")
    parser.add_argument(
        "--class",
        dest="a",
        metavar="A",
        help="a class by its name, or its row (default: the answer for each image)",
    )
    parser.add_argument(
        "--against", dest="b", metavar="B", help="another (default: the runner-up for each image)"
    )
    add_classifier_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from dive_fast.data.paths import expand_inputs
    from dive_fast.evaluation import RunDirectory
    from dive_fast.evaluation.machine import environment
    from dive_fast.evaluation.run import Source, run_over
    from dive_fast.predict.explaining import check_classes, check_pair

    strategy = chosen_strategy(options)
    asked = {"strategy": strategy, "seed": options.seed, "timesteps": options.timesteps}
    asked["weights"] = options.weights
    _check_folder(Path(options.out))
    errors = dict(expand_inputs(options.images))
    classifier = load_classifier(options)
    check_classes(classifier.model)
    a, b = (_row(text, classifier.names) for text in (options.a, options.b))
    if a is not None and b is not None:
        check_pair(a, b, classifier.model.vocabulary)
    config = classifier.identity(**asked, probes=options.probes)
    # Rows: a class may be given by its name or its number.
    config = {**config, "explained": {"a": a, "b": b}}
    maps = MapSearch(classifier, a, b, options.probes, asked)
    sources = [
        Source(path, partial(_read, path, error, classifier), name=path)
        for path, error in errors.items()
    ]
    try:
        with RunDirectory.open(options.out, config, environment(classifier)) as records:
            files = MapFiles(records.path, records.done())
            run_over(sources, maps.stream, records, progress=sys.stderr.isatty(), record=files.add)
            done = {path: records.done()[path] for path in errors}
            files.write_all(config, done)
    except KeyboardInterrupt:
        log.warning("interrupted; run again to go on from %s.", options.out)
        return 130
    return 2 if any("error" in record for record in done.values()) else 0


def _check_folder(out: Path) -> None:
    """That maps can go there; a misspelt name should not wait for a large model to load.

    Raises:
        RunError: it is a file.
    """
    from dive_fast.errors import RunError

    if out.exists() and not out.is_dir():
        raise RunError(f"{out}: expected a directory, got a file.")


def _read(path: str, error: Any, classifier: DiffusionClassifier) -> Any:
    """The image as the model sees it.

    Raises:
        ImageError: it cannot be read, or is no such image.
    """
    from dive_fast.data.images import center_crop, to_mode
    from dive_fast.data.reading import read_found

    channels, size, _ = classifier.model.image_shape
    return center_crop(to_mode(read_found(path, error), channels), size)


def _row(text: str | None, names: tuple[str, ...]) -> int | None:
    """The row of a class: of its name, else the number that it is.

    Raises:
        DiveFastError: there is none.
    """
    from dive_fast.predict.explaining import class_row

    if text is None:
        return None
    return class_row(row_or_name(text, names), names)
