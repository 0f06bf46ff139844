"""Options that several commands share."""

from __future__ import annotations

import argparse
import ast
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dive_fast.cli.prior_options import add_prior_options

if TYPE_CHECKING:
    from dive_fast.models import Source

CLASSIFIER, DETECTOR = "digits", "scenes"  # models of the zoo
SCENES = "scenes"  # its annotated pictures
WORDS = {"true": "True", "false": "False", "none": "None"}  # as they are written elsewhere


def count(text: str) -> int:
    """A whole number of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return value


def seed(text: str) -> int:
    """A whole number that every generator takes."""
    try:
        value = int(text)
    except ValueError:
        value = -1
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(
            f"expected a whole number from 0 to 2^63 - 1, got {text!r}"
        )
    return value


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """The options that ``load_classifier`` reads."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        default=CLASSIFIER,
        metavar="digits|DIR|HUB_ID",
        help="the built-in model of handwritten digits (default), a diffusers model directory, "
        "or a hub id such as facebook/DiT-XL-2-256",
    )
    _add_network_options(group)
    group.add_argument(
        "--timestep-embedding",
        default="auto",
        metavar="auto|diffusers|original",
        help="which frequencies a DiT was trained with (default: auto)",
    )
    text = _add_prompt_options(parser, "Stable Diffusion", "'a photo of a {}.'")
    text.add_argument(
        "--average",
        metavar="embedding|loss",
        help="what is averaged over the templates of a class (default: embedding)",
    )
    _add_engine_options(parser)


def add_detector_options(parser: argparse.ArgumentParser) -> None:
    """The options that ``load_detector`` reads."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        default=DETECTOR,
        metavar="scenes|DIR|HUB_ID",
        help="the built-in model of scenes of digits (default), or a directory or hub id of a "
        "layout-to-image model",
    )
    add_prior_options(group)
    _add_network_options(group)
    _add_prompt_options(parser, "GLIGEN, GeoDiffusion", "what the model was trained with")
    _add_engine_options(parser)


def _add_prompt_options(
    parser: argparse.ArgumentParser, models: str, default_template: str
) -> argparse._ArgumentGroup:
    group = parser.add_argument_group(f"classes of a text-conditional model ({models})")
    group.add_argument(
        "--classes",
        metavar="NAMES|FILE",
        help="names with commas between, or a file with one per line",
    )
    group.add_argument(
        "--template",
        action="append",
        metavar="TEXT",
        help="makes a prompt of a name, with {} in its place; may be given several times "
        f"(default: {default_template})",
    )
    return group


def _add_network_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: cuda where there is one)")
    group.add_argument("--dtype", default="float32", help="float32 (default), bfloat16 or float16")
    group.add_argument(
        "--batch-size",
        type=count,
        metavar="ROWS",
        help="rows per forward of the network at most (default: 256, on the CPU fewer for large "
        "networks); halved when memory runs out",
    )
    group.add_argument("--allow-pickle", action="store_true", help="also load pickled .bin weights")
    group.add_argument(
        "--fitted",
        metavar="DIR",
        help="the directory that 'dive-fast fit --out' wrote (default: the model's own)",
    )


def _add_engine_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("engine")
    group.add_argument(
        "--cache",
        default="auto",
        metavar="off|exact|encoder",
        help="activations kept between evaluations: exact: same answers; encoder: approximate "
        "gradients (default: what was measured best for the model)",
    )
    group.add_argument(
        "--cache-bytes",
        type=count,
        default=1 << 30,
        metavar="BYTES",
        help="bound on what is kept (default: 1 GiB)",
    )
    group.add_argument(
        "--refresh",
        type=count,
        default=2,
        metavar="N",
        help="with --cache encoder: computed anew at every N-th gradient (default: 2)",
    )
    group.add_argument(
        "--autocast",
        action="store_const",
        const="bfloat16",
        help="run the network under bfloat16 autocast; the weights keep --dtype",
    )
    group.add_argument(
        "--compile", action="store_true", help="run the network through torch.compile"
    )
    group.add_argument(
        "--channels-last", action="store_true", help="lay convolutions out in channels-last order"
    )


def add_strategy_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("strategy")
    group.add_argument(
        "--strategy",
        metavar="auto|enumerate|race|invert",
        help="auto: a gradient names the few classes that race (default); enumerate: try every "
        "class; race: drop classes that cannot win; invert: optimise the condition",
    )
    group.add_argument(
        "--preset",
        metavar="dive-paper|diffusion-classifier",
        help="published settings instead of ours: of invert, or of enumerate",
    )
    group.add_argument(
        "--probes",
        type=count,
        metavar="K",
        help="(timestep, noise) pairs per image (default: 100; dive-paper 250)",
    )
    group.add_argument(
        "--timesteps",
        choices=["learned", "uniform"],
        help="take probes where the model's fitted timesteps say, or evenly (default: learned "
        "where the model has them; presets are uniform)",
    )
    group.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a setting of the strategy, such as min_agreement=0.99; may be given several times",
    )
    group.add_argument("--seed", type=seed, default=0, help="of noise and draws (default: 0)")


def add_layout_strategy_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("search")
    group.add_argument(
        "--strategy",
        metavar="guided|invert",
        help="guided: read places off an error map, then split, join, move and name (default); "
        "invert: optimise a relaxed layout, as DIVE does",
    )
    group.add_argument(
        "--probes", type=count, metavar="K", help="(timestep, noise) pairs per image (default: 48)"
    )
    group.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a setting of the search, such as margin=0.05; may be given several times",
    )
    group.add_argument("--seed", type=seed, default=0, help="of noise and draws (default: 0)")


def chosen_strategy(options: argparse.Namespace):
    """The strategy that the options name, with its settings.

    Raises:
        DiveFastError: an unknown name or setting, or a value that the strategy refuses.
    """
    from dive_fast.errors import DiveFastError
    from dive_fast.strategies import resolve_strategy

    try:
        return resolve_strategy(options.strategy, options.preset, strategy_settings(options))
    except TypeError as error:  # a number where several belong
        given = ", ".join(options.set)
        raise DiveFastError(f"{given}: not a value that the strategy takes ({error}).") from error


def chosen_layout_strategy(options: argparse.Namespace):
    """The search for layouts that the options name, with its settings.

    Raises:
        DiveFastError: as ``chosen_strategy``.
    """
    from dive_fast.strategies.layout import resolve_layout_strategy

    return resolve_layout_strategy(options.strategy, strategy_settings(options))


def strategy_settings(options: argparse.Namespace) -> dict[str, Any]:
    """What ``--set`` says, values read as Python literals where they are such, in any case.

    Raises:
        DiveFastError: no NAME=VALUE.
    """
    from dive_fast.errors import DiveFastError

    settings = {}
    for text in options.set:
        name, equals, value = text.partition("=")
        if not equals:
            raise DiveFastError(f"expected --set NAME=VALUE, got {text!r}.")
        try:
            settings[name] = ast.literal_eval(WORDS.get(value.lower(), value))
        except (ValueError, SyntaxError):
            settings[name] = value
    return settings


def class_names(text: str) -> list[str]:
    """The names that ``--classes`` gives: a file's lines, or what stands between commas.

    Raises:
        ModelError: the file cannot be read.
    """
    from dive_fast.errors import ModelError

    path = Path(text)
    try:
        if path.is_file():
            lines = path.read_text(encoding="utf-8").splitlines()
            return [line.strip() for line in lines if line.strip()]
    except (OSError, ValueError) as error:
        raise ModelError(f"{text} cannot be read as a list of classes: {error}.") from error
    if "," not in text and (path.suffix or path.name != text):
        raise ModelError(f"expected classes with commas between or a file of them, got {text!r}.")
    return [name.strip() for name in text.split(",")]


def load_classifier(options: argparse.Namespace, classes: Sequence[str] | None = None):
    """The classifier that the model options name.

    Args:
        classes: of a text-conditional model for which neither the options nor its directory name
            any.
    """
    from dive_fast.models import resolve
    from dive_fast.predict.classifier import DiffusionClassifier

    source = resolve(options.model, allow_pickle=options.allow_pickle)
    classifier = DiffusionClassifier.from_pretrained(
        source,
        dtype=options.dtype,
        device=options.device,
        batch_size=options.batch_size,
        allow_pickle=options.allow_pickle,
        timestep_embedding=options.timestep_embedding,
        **_engine(options),
        classes=_chosen_classes(options, classes, source),
        templates=options.template,
        average=options.average,
    )
    if options.fitted is not None:
        classifier.load_fitted(options.fitted)
    return classifier


def load_detector(options: argparse.Namespace, classes: Sequence[str] | None = None):
    """The detector that the options of ``add_detector_options`` name.

    Args:
        classes: as in ``load_classifier``.
    """
    from dive_fast.models import resolve
    from dive_fast.predict.detector import LayoutDetector

    source = resolve(options.model, allow_pickle=options.allow_pickle)
    detector = LayoutDetector.from_pretrained(
        source,
        {None: "auto", "none": None}.get(options.prior, options.prior),
        prior_weight=options.prior_weight,
        dtype=options.dtype,
        device=options.device,
        batch_size=options.batch_size,
        allow_pickle=options.allow_pickle,
        **_engine(options),
        classes=_chosen_classes(options, classes, source),
        templates=options.template,
    )
    if options.fitted is not None:
        detector.load_fitted(options.fitted)
    return detector


def _chosen_classes(
    options: argparse.Namespace, classes: Sequence[str] | None, source: Source
) -> Sequence[str] | None:
    """What ``--classes`` says; else ``classes``, if the model cannot do without."""
    if options.classes is not None:
        return class_names(options.classes)
    return classes if classes is not None and source.needs_classes else None


def _engine(options: argparse.Namespace) -> dict[str, Any]:
    names = ("cache", "cache_bytes", "refresh", "autocast", "compile", "channels_last")
    return {name: getattr(options, name) for name in names}
