"""What the options of a command name: strategies, classes, models."""

from __future__ import annotations

import argparse
import ast
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dive_fast.models import Source
    from dive_fast.models.text.prompts import Classes

log = logging.getLogger(__name__)

WORDS = {"true": "True", "false": "False", "none": "None"}  # as they are written elsewhere


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


def class_names(text: str) -> Classes:
    """The classes that ``--classes`` gives: a file's, a package's, or what is between commas.

    Raises:
        DataError: the file is no list of classes, or the package has no such list.
        ModelError: there is no such file.
    """
    from dive_fast.data.class_lists import read_classes
    from dive_fast.data.known_lists import is_known_list, known_classes
    from dive_fast.errors import ModelError

    path = Path(text)
    try:
        is_file = path.is_file()
    except (OSError, ValueError):  # many names may be longer than any path
        is_file = False
    if is_file:
        return read_classes(path)
    if is_known_list(text):
        return known_classes(text)
    if "," not in text and (path.suffix or path.name != text):
        raise ModelError(f"expected classes with commas between or a file of them, got {text!r}.")
    return [name.strip() for name in text.split(",")]


def templates(texts: Sequence[str] | None) -> list[str] | None:
    """The templates that ``--template`` gives, lists of packages written out; None without any.

    Raises:
        DataError: a package is not installed or has no such list.
    """
    from dive_fast.data.known_lists import is_known_list, known_templates

    if texts is None:
        return None
    return [t for text in texts for t in (known_templates(text) if is_known_list(text) else [text])]


def load_classifier(options: argparse.Namespace, classes: Sequence[str] | None = None):
    """The classifier that the options name.

    Args:
        classes: of a text-conditional model for which neither the options nor its directory name
            any.
    """
    from dive_fast.predict.classifier import DiffusionClassifier

    source = _found(options, options.prediction_type)
    classifier = DiffusionClassifier.from_pretrained(
        source,
        timestep_embedding=options.timestep_embedding or "auto",
        average=options.average,
        lora=options.lora,
        lora_scale=1.0 if options.lora_scale is None else options.lora_scale,
        **_common(options, classes, source),
    )
    if options.fitted is not None:
        classifier.load_fitted(options.fitted)
    return classifier


def load_detector(
    options: argparse.Namespace, classes: Sequence[str] | None = None, to_fit: bool = False
):
    """The detector that the options name; a warning where its prior has no proper weight.

    Args:
        classes: as in ``load_classifier``.
        to_fit: it is about to get one.
    """
    from dive_fast.predict.detector import LayoutDetector

    source = _found(options)
    detector = LayoutDetector.from_pretrained(
        source,
        {None: "auto", "none": None}.get(options.prior, options.prior),
        prior_weight=options.prior_weight,
        **_common(options, classes, source),
    )
    if options.fitted is not None:
        detector.load_fitted(options.fitted)
    name = detector.model.name
    if to_fit:
        return detector
    if detector.prior_is_left_out:
        log.warning(
            "the beta of %s is not fitted, so its prior is left out, which might hide every "
            "object: dive-fast fit gives it its weight, --prior-weight another one.",
            name,
        )
    elif detector.prior_out_of_proportion:
        log.warning(
            "the beta of %s is not fitted, so a prior of weight %g may be far too heavy: dive-fast "
            "fit or a smaller --prior-weight mends that.",
            name,
            detector.prior_weight,
        )
    return detector


def model_source(options: argparse.Namespace) -> Source:
    """The model that ``--model`` names, before it is loaded: it says what kind it is."""
    return _found(options, getattr(options, "prediction_type", None))


def load_scorer(options: argparse.Namespace):
    """The scorer of images and texts that the options name.

    Raises:
        ModelError: they name no model; or as ``ImageTextScorer.from_pretrained``.
    """
    from dive_fast.errors import ModelError
    from dive_fast.predict.scoring import ImageTextScorer

    if options.model is None:
        raise ModelError("expected --model with a text-to-image model: a directory or a hub id.")
    scorer = ImageTextScorer.from_pretrained(
        _found(options, options.prediction_type),
        lora=options.lora,
        lora_scale=1.0 if options.lora_scale is None else options.lora_scale,
        **_place_and_engine(options),
    )
    if options.fitted is not None:
        scorer.load_fitted(options.fitted)
    return scorer


def _found(options: argparse.Namespace, prediction_type: str | None = None) -> Source:
    """The model that ``--model`` names, found once; a misspelt precision does not wait for it."""
    from dive_fast.core.threads import AGAIN, choose_threads
    from dive_fast.models import check_place, resolve

    if options.threads is not None or getattr(options, "own_process", False):
        choose_threads(options.threads, again=AGAIN)
    check_place(options.dtype, options.device)
    return resolve(
        options.model,
        allow_pickle=options.allow_pickle,
        variant=options.variant,
        prediction_type=prediction_type,
    )


def _common(
    options: argparse.Namespace, classes: Sequence[str] | None, source: Source
) -> dict[str, Any]:
    """What classifiers and detectors are loaded with alike."""
    return {
        **_place_and_engine(options),
        "classes": _chosen_classes(options, classes, source),
        "templates": templates(options.template),
    }


def _place_and_engine(options: argparse.Namespace) -> dict[str, Any]:
    names = ("dtype", "device", "batch_size", "allow_pickle", "variant")
    names += ("cache", "cache_bytes", "refresh", "autocast", "compile", "channels_last")
    return {name: getattr(options, name) for name in names}


def _chosen_classes(
    options: argparse.Namespace, classes: Sequence[str] | None, source: Source
) -> Classes | None:
    """What ``--classes`` says, or stands in its place; else ``classes``, where they are needed."""
    if isinstance(options.classes, str):
        return class_names(options.classes)
    if options.classes is not None:
        return options.classes
    return classes if classes is not None and source.needs_classes else None
