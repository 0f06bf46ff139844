"""``dive-fast app``: a page in the browser to try models on."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dive_fast.cli.options import add_app_options

if TYPE_CHECKING:
    from dive_fast.app.shelf import Shelf
    from dive_fast.models import Source
    from dive_fast.models.text.prompts import Classes

DESCRIPTION = """\
Serves a page on this machine: drop a picture, choose model, classes and strategy, and see the
probabilities or the boxes as they come. Nothing is sent elsewhere. Ctrl+C ends it and removes the
pictures."""

PORT = 7860
HOST = "127.0.0.1"
# What only one kind of model takes, and what belongs to one model.
_OF_CLASSIFIERS = ("average", "lora", "lora_scale", "timestep_embedding", "prediction_type")
_OF_DETECTORS = ("prior", "prior_weight")
_OF_PROMPTED = ("classes", "template", "average")
_OF_ONE = ("fitted", "lora", "lora_scale", "prediction_type")


def port(text: str) -> int:
    """A number that a port can have."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if not 1 <= value <= 65535:
        raise argparse.ArgumentTypeError(f"expected a port from 1 to 65535, got {text!r}")
    return value


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "app",
        help="try models on a page in the browser",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    group = parser.add_argument_group("page")
    group.add_argument(
        "--host",
        default=HOST,
        metavar="ADDRESS",
        help=f"where to listen (default: {HOST}, this machine alone; 0.0.0.0 lets others in, "
        "without a password)",
    )
    group.add_argument("--port", type=port, default=PORT, metavar="N", help=f"(default: {PORT})")
    group.add_argument("--open", action="store_true", help="open the page in the browser")
    group.add_argument(
        "--examples",
        action="append",
        default=[],
        metavar="FILE|DIR",
        help="pictures to choose from beside one's own; may be given several times (default: of "
        "digits and scenes some held-out ones)",
    )
    add_app_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from dive_fast.app.examples import of_the_zoo, pictures
    from dive_fast.app.server import check_address, check_gradio, serve

    # What can be wrong without a model should not wait for one.
    check_gradio()
    check_address(options.host, options.port)
    given = pictures(options.examples)
    shelf = _shelf(options)
    with shelf.taken(shelf.names[0]):
        pass

    def examples(folder: Path) -> dict[str, Sequence[str]]:
        return {name: given or of_the_zoo(shelf[name], folder) for name in shelf.names}

    def ready(url: str) -> None:
        print(f"dive-fast: {url} (Ctrl+C ends it)", flush=True)

    serve(
        shelf,
        examples,
        host=options.host,
        port=options.port,
        open_browser=options.open,
        ready=ready,
    )
    return 0


def _shelf(options: argparse.Namespace) -> Shelf:
    """All models that the options name, found and none of them loaded.

    Raises:
        DiveFastError: one is unknown, named twice, or an option is of none or only one of them.
    """
    from dive_fast.app.shelf import Entry, Shelf
    from dive_fast.cli.options import CLASSIFIER
    from dive_fast.errors import DiveFastError, some
    from dive_fast.models import check_place, resolve

    check_place(options.dtype, options.device)
    names = options.model or [CLASSIFIER]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DiveFastError(f"expected every model once, got {some(twice)} more than once.")
    if len(names) > 1:
        for name in _OF_ONE:
            if getattr(options, name) is not None:
                raise DiveFastError(f"{_option(name)} is for one model, got {len(names)}.")
    found = {
        "allow_pickle": options.allow_pickle,
        "variant": options.variant,
        "prediction_type": options.prediction_type,
    }
    sources = [resolve(name, **found) for name in names]
    _check_kinds(options, sources)
    return Shelf([Entry(source, partial(_load, options, source)) for source in sources])


def _check_kinds(options: argparse.Namespace, sources: Sequence[Source]) -> None:
    """Raises DiveFastError for an option that none of the models takes."""
    from dive_fast.errors import DiveFastError, some

    kinds = (
        (_OF_CLASSIFIERS, "classifiers", [s for s in sources if not s.finds_objects]),
        (_OF_DETECTORS, "detectors", [s for s in sources if s.finds_objects]),
        (_OF_PROMPTED, "text-conditional models", [s for s in sources if s.family.text]),
    )
    for names, kind, those in kinds:
        for name in names:
            if getattr(options, name) is not None and not those:
                known = some([str(source) for source in sources])
                raise DiveFastError(f"{_option(name)} is for {kind}, got {known}.")


def _load(
    options: argparse.Namespace,
    source: Source,
    classes: Classes | None,
    templates: Sequence[str] | None,
) -> Any:
    """A predictor of one model, with those of the options that it takes.

    Args:
        classes, templates: what the page says; None for what the options or the model say.
    """
    from dive_fast.app.shelf import SOME_CLASSES
    from dive_fast.cli.loading import load_classifier, load_detector

    own = argparse.Namespace(**vars(options))
    # The source was resolved with it.
    own.model, own.prediction_type = source, None
    if not source.family.text:
        for name in _OF_PROMPTED:
            setattr(own, name, None)
    if classes is not None:
        own.classes, own.template = classes, templates
    load = load_detector if source.finds_objects else load_classifier
    return load(own, SOME_CLASSES)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
