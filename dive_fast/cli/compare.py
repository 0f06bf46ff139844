"""``dive-fast compare``: which of several generators knows more."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from dive_fast.cli.options import DATA, OTHER_DATA, add_generator_options, add_readers
from dive_fast.cli.values import count, seed

log = logging.getLogger(__name__)

DESCRIPTION = """\
Asks several generators about the same labelled images, with the same probes and noise, and tells
how much each knows of the classes: accuracy, mean rank and margin of the right class, -log p of it,
and the bound on the images' own likelihood; with paired differences to the reference, bootstrap
intervals of 95% and McNemar's test (docs/compare.md).

A generator is [NAME=]MODEL[+LORA[@SCALE]]:

  digits  runs/mnist  org/model          as --model of classify
  base=org/model  tuned=org/model+style.safetensors@0.8

OUT gets a run directory for each, as 'dive-fast evaluate' writes, for report and compare-runs, and
comparison.json, .csv, and with --checkpoints .svg and .png. Interrupted and run again with the same
options it goes on where it stopped."""


class Spec(NamedTuple):
    """A generator as it was named."""

    name: str
    model: str
    lora: str | None = None
    lora_scale: float | None = None
    step: int | None = None


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "compare",
        help="compare generators by what they know of labelled images",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("models", nargs="*", metavar="GENERATOR", help="two or more")
    parser.add_argument(
        "--checkpoints",
        metavar="DIR",
        help="a generator for each checkpoint of a training, by its steps; of LoRAs on the one "
        "GENERATOR that is given",
    )
    parser.add_argument(
        "--data",
        required=True,
        metavar=DATA,
        help=f"digits (the held-out ones), a folder by class, an .npz, {OTHER_DATA}",
    )
    parser.add_argument("--out", required=True, metavar="OUT", help="the comparison's directory")
    parser.add_argument("--limit", type=count, metavar="N", help="a random subset of N images")
    parser.add_argument(
        "--reference",
        metavar="NAME",
        help="whom the others are compared with (default: the first; of checkpoints the last)",
    )
    parser.add_argument(
        "--probes", type=count, default=100, metavar="K", help="of every class (default: 100)"
    )
    parser.add_argument(
        "--likelihood-probes",
        type=int,
        default=100,
        metavar="K",
        help="for the likelihood under the right class, divisible by 4; 0 leaves it out "
        "(default: 100)",
    )
    parser.add_argument(
        "--classes-per-image",
        type=count,
        metavar="M",
        help="try the right class and M - 1 random others, the same for all (default: all)",
    )
    parser.add_argument(
        "--resamples",
        type=count,
        default=2000,
        metavar="R",
        help="of the images, for the intervals (default: 2000)",
    )
    parser.add_argument("--seed", type=seed, default=0, help="of noise and draws (default: 0)")
    add_readers(parser)
    parser.add_argument("--json", action="store_true", help="print the comparison as JSON")
    add_generator_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from dive_fast.data import folder_classes, open_dataset, select
    from dive_fast.evaluation import compare_generators

    specs = _specs(options)
    classes = folder_classes(options.data)
    generators = {spec.name: partial(_load, spec, options, classes) for spec in specs}
    names = generators[specs[0].name]().names
    data = select(open_dataset(options.data, names), options.limit, options.seed)
    found = compare_generators(
        generators,
        data,
        options.out,
        steps={spec.name: spec.step for spec in specs if spec.step is not None},
        reference=options.reference or (specs[-1].name if options.checkpoints else None),
        probes=options.probes,
        likelihood_probes=options.likelihood_probes or None,
        classes_per_image=options.classes_per_image,
        seed=options.seed,
        resamples=options.resamples,
        readers=options.readers,
        progress=sys.stderr.isatty(),
    )
    _draw(found, Path(options.out))
    print(json.dumps(found.to_dict(), allow_nan=False) if options.json else text(found))
    return 2 if found.lacking else 0


# -- the generators --------------------------------------------------------------------------------


def _specs(options: argparse.Namespace) -> list[Spec]:
    """All that the options name, checkpoints last.

    Raises:
        DiveFastError: fewer than two, two of one name, or a LoRA's checkpoint without its model.
    """
    from dive_fast.errors import DiveFastError

    given = [read_spec(given) for given in options.models]
    found = given if options.checkpoints is None else _with_checkpoints(given, options.checkpoints)
    if len(found) < 2:
        raise DiveFastError(f"expected at least two generators to compare, got {len(found)}.")
    for i, spec in enumerate(found):
        if any(spec.name == other.name for other in found[:i]):
            raise DiveFastError(
                f"expected generators of different names, got {spec.name!r} twice: give it as "
                f"NAME={spec.name}."
            )
    return found


def _with_checkpoints(given: list[Spec], directory: str) -> list[Spec]:
    from dive_fast.errors import DiveFastError
    from dive_fast.evaluation.checkpoints import find_checkpoints

    found = list(given)
    for checkpoint in find_checkpoints(directory):
        path, step = str(checkpoint.path), checkpoint.step
        if not checkpoint.is_lora:
            found.append(Spec(f"step {step}", path, step=step))
            continue
        if len(given) != 1 or given[0].lora is not None:
            raise DiveFastError(
                f"{path} is a LoRA: expected one GENERATOR, without another LoRA, that it belongs "
                f"to, got {len(given) or 'none'}."
            )
        found.append(Spec(f"step {step}", given[0].model, path, step=step))
    return found


def read_spec(given: str) -> Spec:
    """[NAME=]MODEL[+LORA[@SCALE]]; what exists as a path is one, whatever is in its name.

    Raises:
        DiveFastError: an empty part, or a scale that is no number.
    """
    from dive_fast.errors import DiveFastError

    name, equals, rest = given.partition("=")
    if not equals or os.path.exists(given):
        name, rest = "", given
    cuts = [len(rest), *(i for i, letter in enumerate(rest) if letter == "+")]
    cut = next((i for i in cuts if os.path.exists(rest[:i])), min(cuts[1:], default=len(rest)))
    model, plus, lora = rest[:cut], rest[cut : cut + 1], rest[cut + 1 :]
    scale = None
    if "@" in lora and not os.path.exists(lora):
        lora, _, number = lora.rpartition("@")
        try:
            scale = float(number)
        except ValueError:
            scale = float("nan")
    if not model or (plus and not lora) or (equals and not name and not os.path.exists(given)):
        raise DiveFastError(f"expected a generator as [NAME=]MODEL[+LORA[@SCALE]], got {given!r}.")
    if scale is not None and not abs(scale) < float("inf"):
        raise DiveFastError(f"expected a number behind the @ of a LoRA, got {given!r}.")
    return Spec(name or given, model, lora or None, scale)


def _load(spec: Spec, options: argparse.Namespace, classes: Sequence[str] | None):
    from dive_fast.cli.loading import load_classifier

    own: dict[str, Any] = {"model": spec.model, "lora": spec.lora, "fitted": None}
    own["lora_scale"] = spec.lora_scale
    return load_classifier(argparse.Namespace(**{**vars(options), **own}), classes)


# -- what is told ----------------------------------------------------------------------------------

_TITLES = {
    "accuracy": ("accuracy", "{:.2%}", "{:+.2%}"),
    "rank": ("mean rank", "{:.3f}", "{:+.3f}"),
    "margin": ("margin, nats", "{:.3f}", "{:+.3f}"),
    "nll": ("-log p(truth), nats", "{:.4f}", "{:+.4f}"),
    "log_likelihood": ("log p(x0 | truth), nats", "{:.1f}", "{:+.2f}"),
}


def _draw(found, out: Path) -> None:
    """The figures over the steps, where there are steps and matplotlib."""
    if sum(row.step is not None for row in found.rows) < 2:
        return
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        log.warning(
            "the drawing needs matplotlib, which is not installed: pip install 'dive_fast[report]'."
        )
        return
    from dive_fast.report.training import draw_steps

    for name in ("comparison.svg", "comparison.png"):
        draw_steps(found, out / name)


def text(found) -> str:
    """The figures of each generator, and the differences to the reference."""
    names = [n for n in _TITLES if any(n in row.figures for row in found.rows)]
    head = ["", *(_TITLES[n][0] for n in names), "evaluations"]
    rows = [
        [
            row.name,
            *(_cell(row.figures.get(n), _TITLES[n][1]) for n in names),
            f"{row.evaluations:,.0f}",
        ]
        for row in found.rows
    ]
    against = [f"less {found.reference}", *(_TITLES[n][0] for n in names), "McNemar"]
    differences = [
        [
            row.name,
            *(_cell(row.difference.figures.get(n), _TITLES[n][2]) for n in names),
            f"{row.difference.right_alone} : {row.difference.reference_right_alone}, "
            f"p = {row.difference.mcnemar:.3g}",
        ]
        for row in found.rows
        if row.difference is not None
    ]
    lines = [*_table(head, rows), "", *_table(against, differences), ""]
    lacking = f" ({found.lacking} more could not be read)" if found.lacking else ""
    lines.append(f"{found.n} images{lacking}, {found.settings.probes} probes of every class")
    return "\n".join([*lines, *(f"note: {note}" for note in found.notes)])


def _cell(estimate, form: str) -> str:
    if estimate is None:
        return "-"
    value = form.format(estimate.value)
    if estimate.low is None:
        return value
    return f"{value} [{form.format(estimate.low)}, {form.format(estimate.high)}]"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (head, *rows)
    ]
