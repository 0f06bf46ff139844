"""``dive-fast score``: how well each text explains each image."""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dive_fast.cli.loading import load_scorer
from dive_fast.cli.options import add_images, add_scorer_options

if TYPE_CHECKING:  # torch is not loaded for the help
    import torch

    from dive_fast.predict.scores import Scores

log = logging.getLogger(__name__)

DESCRIPTION = """\
Prints a table: for every image (row) and text (column) the mean loss of a text-to-image model, and
the probability of the text among those given. The lower loss is the better one; compare texts of
one image by it. To compare images under one text takes --lift: what a text adds over no text.

Texts are prompts as they stand. An image that cannot be read is told and the rest go on; the exit
code is then 2."""


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "score",
        help="score texts against images",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_images(parser)
    parser.add_argument(
        "--text", nargs="+", action="extend", default=[], metavar="TEXT", help="one or several"
    )
    parser.add_argument("--texts", metavar="FILE", help="a file of more texts, one a line")
    parser.add_argument(
        "--mask",
        action="append",
        metavar="PNG",
        help="what pixels count: a picture of grey levels of the image's own size, white 1 and "
        "black 0; one for all images, or one for each in their order",
    )
    parser.add_argument(
        "--lift",
        action="store_true",
        help="also beta (loss without text - loss), in nats: it can be compared between images",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object instead")
    add_scorer_options(parser, searches=False)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from dive_fast.predict.items import as_texts

    # What is wrong with the options should not wait for a large model to load.
    texts = as_texts([*options.text, *_lines(options.texts)])
    pictures, masks, failed = _read(options.images, options.mask)
    if not pictures:
        return 2
    found = load_scorer(options).score(
        [picture for _, picture in pictures],
        texts,
        pixel_weights=masks,
        probes=options.probes,
        seed=options.seed,
        timesteps=options.timesteps,
        unconditional=options.lift,
        progress=sys.stderr.isatty(),
    )
    paths = [path for path, _ in pictures]
    if options.json:
        print(json.dumps(_as_json(found, paths), indent=2, allow_nan=False))
    else:
        print(_as_table(found, paths))
    return 2 if failed else 0


def _lines(path: str | None) -> list[str]:
    """The texts of a file.

    Raises:
        DataError: it cannot be read.
    """
    from dive_fast.errors import DataError

    if path is None:
        return []
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}).") from error
    except ValueError as error:
        raise DataError(f"{path}: expected a text file in UTF-8, got something else.") from error
    return [line.strip() for line in lines if line.strip()]


def _read(
    images: list[str], masks: list[str] | None
) -> tuple[list[tuple[str, Any]], list[Any] | None, bool]:
    """The images that can be read with their paths, the mask of each, and whether some cannot.

    Raises:
        DiveFastError: another number of masks.
        ImageError: a mask cannot be read.
    """
    from dive_fast.data.image_files import read_image
    from dive_fast.data.paths import expand_inputs
    from dive_fast.data.reading import read_found
    from dive_fast.errors import DiveFastError, ImageError
    from dive_fast.evaluation.run import sentence

    inputs = expand_inputs(images)
    given = None if masks is None else [read_image(path) for path in masks]
    if given is not None and len(given) not in (1, len(inputs)):
        raise DiveFastError(
            f"expected one --mask, or one for each of {len(inputs)} images, got {len(given)}."
        )
    found, of_found, failed = [], [], False
    for number, (path, error) in enumerate(inputs):
        try:
            found.append((path, read_found(path, error)))
        except ImageError as wrong:
            log.warning(sentence(path, wrong))
            failed = True
        else:
            of_found.append(None if given is None else given[number if len(given) > 1 else 0])
    return found, None if given is None else of_found, failed


def _as_table(found: Scores, paths: list[str]) -> str:
    """The texts by number, then a row for each image, and the lifts below."""
    lines = [f"{i:3}  {text}" for i, text in enumerate(found.texts, start=1)]
    cells = [
        [f"{loss:.5f} {p:4.0%}" for loss, p in zip(row, likely, strict=True)]
        for row, likely in zip(
            found.losses.tolist(), found.log_posterior.exp().tolist(), strict=True
        )
    ]
    lines += ["", *_grid("loss, probability", paths, cells)]
    if found.unconditional is not None:
        cells = [[f"{x:+.2f}" for x in row] for row in found.lift().tolist()]
        lines += ["", *_grid("lift, nats", paths, cells)]
    return "\n".join(lines)


def _grid(title: str, paths: list[str], cells: list[list[str]]) -> list[str]:
    """A heading with the texts' numbers, and a line for each image."""
    first = max(map(len, (title, *paths)))
    width = max(len(cell) for row in cells for cell in row)
    heading = "  ".join(f"{i:>{width}}" for i in range(1, len(cells[0]) + 1))
    rows = (
        f"{path:{first}}  {'  '.join(f'{cell:>{width}}' for cell in row)}"
        for path, row in zip(paths, cells, strict=True)
    )
    return [f"{title:{first}}  {heading}", *rows]


def _as_json(found: Scores, paths: list[str]) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    for i, path in enumerate(paths):
        row = {
            "id": path,
            "best": int(found.best[i]),
            "losses": found.losses[i].tolist(),
            "standard_errors": _numbers(found.standard_errors[i]),
            "log_posterior": found.log_posterior[i].tolist(),
        }
        if found.unconditional is not None:
            row["unconditional"] = found.unconditional[i].item()
            row["lift"] = found.lift()[i].tolist()
        rows.append(row)
    return {
        "texts": list(found.texts),
        "probes": found.n_probes,
        "beta": found.beta,
        "evaluations": found.evaluations,
        "images": rows,
    }


def _numbers(values: torch.Tensor) -> list[float | None]:
    """null where there is none: of a single probe no error is known."""
    return [x if math.isfinite(x) else None for x in values.tolist()]
