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
    from dive_fast.data.paths import expand_inputs
    from dive_fast.predict.items import as_texts

    # What is wrong with the options should not wait for a large model to load.
    texts = as_texts([*options.text, *_lines(options.texts)])
    inputs = expand_inputs(options.images)
    masks = _masks(options.mask, len(inputs))
    if all(error for _, error in inputs):  # no model is needed to say so
        scorer, channels, size = None, 3, 1
    else:
        scorer = load_scorer(options)
        channels, size, _ = scorer.model.image_shape
    pictures = _read(inputs, masks, size, channels)
    if scorer is None or not pictures:
        return 2
    found = scorer.score(
        [picture for _, picture, _ in pictures],
        texts,
        pixel_weights=[weights for _, _, weights in pictures],
        probes=options.probes,
        seed=options.seed,
        timesteps=options.timesteps,
        weights=options.weights,
        unconditional=options.lift,
        progress=sys.stderr.isatty(),
    )
    paths = [path for path, _, _ in pictures]
    if options.json:
        print(json.dumps(_as_json(found, paths), indent=2, allow_nan=False))
    else:
        print(_as_table(found, paths))
    return 2 if len(pictures) < len(inputs) else 0


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


def _masks(paths: list[str] | None, n: int) -> list[Any]:
    """The mask of each of n images; None where there is none.

    Raises:
        DiveFastError: another number of masks.
        ImageError: one cannot be read.
    """
    from dive_fast.data.image_files import read_image
    from dive_fast.errors import DiveFastError

    if paths is None:
        return [None] * n
    if len(paths) not in (1, n):
        raise DiveFastError(
            f"expected one --mask, or one for each of {n} images, got {len(paths)}."
        )
    masks = [read_image(path) for path in paths]
    return masks * n if len(masks) == 1 else masks


def _read(
    inputs: list[tuple[str, Any]], masks: list[Any], size: int, channels: int
) -> list[tuple[str, Any, Any]]:
    """Path, image and weights of each that can be read, as the model sees them; others are told."""
    from dive_fast.data.pixel_weights import cropped
    from dive_fast.data.reading import read_found
    from dive_fast.errors import ImageError
    from dive_fast.evaluation.run import sentence

    found = []
    for (path, error), mask in zip(inputs, masks, strict=True):
        try:
            found.append((path, *cropped(read_found(path, error), mask, size, channels)))
        except ImageError as wrong:
            log.warning(sentence(path, wrong))
    return found


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
