"""``dive-fast report``: runs as one page that a person reads."""

from __future__ import annotations

import argparse

from dive_fast.cli.values import count

DESCRIPTION = """\
Makes one HTML file of one or several runs, of classifiers, detectors or both: figures side by side,
accuracy over evaluations, reliability, confusion, classes, groups, and the images that are worth a
look. It holds everything that it shows: it can be mailed, and works without a network.

Pictures are read from where the run says that its data lie, or from --data. Where they are not
found, the page is made without them and says so."""


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "report",
        help="make an HTML page of runs",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directories of evaluate")
    parser.add_argument(
        "--out", required=True, metavar="FILE.html", help="the page; an old one is replaced"
    )
    parser.add_argument(
        "--data",
        metavar="SPEC",
        help="where the images lie, as evaluate takes it; of detectors the annotation file",
    )
    parser.add_argument("--images", metavar="DIR", help="the images of an annotation file")
    pictures = parser.add_mutually_exclusive_group()
    pictures.add_argument(
        "--pictures",
        type=count,
        metavar="N",
        help="images of each kind and run (default: 24)",
    )
    pictures.add_argument("--no-pictures", action="store_true", help="none")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from dive_fast.report import write_report
    from dive_fast.report.writing import PICTURES

    n = 0 if options.no_pictures else options.pictures or PICTURES
    write_report(options.runs, options.out, data=options.data, images=options.images, pictures=n)
    print(options.out)
    return 0
