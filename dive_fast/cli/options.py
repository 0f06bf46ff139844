"""Options that several commands share.

``classify`` asks a classifier and ``detect`` a detector; ``evaluate`` and ``fit`` ask the one that
their data is for, and have the options of both.
"""

from __future__ import annotations

import argparse

from dive_fast.cli.engine_options import add_engine
from dive_fast.cli.option_parts import (
    LEARNED,
    SEARCHES,
    STRATEGIES,
    add_average,
    add_loading,
    add_lora,
    add_model,
    add_prediction_type,
    add_prior,
    add_probes,
    add_prompts,
    add_search,
    add_strategy_extras,
    add_timestep_embedding,
    add_timesteps,
)
from dive_fast.cli.values import log_target, readers

CLASSIFIER, DETECTOR = "digits", "scenes"  # models of the zoo
DATA = "digits|DIR|FILE|wds:TARS|hf:NAME@SPLIT"  # of a classifier
OTHER_DATA = (
    "a table of paths and labels (.csv, .tsv, .jsonl), webdataset's tar files "
    "(wds:path/{000..099}.tar), or a data set of Hugging Face (hf:NAME[:CONFIG]@SPLIT); "
    "docs/data.md has all"
)


def add_log_to(parser: argparse.ArgumentParser) -> None:
    """Of the commands that compute for long."""
    parser.add_argument(
        "--log-to",
        type=log_target,
        metavar="tensorboard|wandb|trackio",
        help="log figures as they come; behind a colon a directory (tensorboard:DIR; default: in "
        "--out) or a project (wandb:PROJECT, trackio:PROJECT; default: dive_fast)",
    )


def add_images(parser: argparse.ArgumentParser) -> None:
    """The images that ``classify`` and ``detect`` look at."""
    parser.add_argument(
        "images", nargs="+", metavar="IMAGE", help="image files, folders of them, or globs"
    )


def add_readers(parser: argparse.ArgumentParser) -> None:
    """What ``read_ahead`` is told."""
    parser.add_argument(
        "--readers",
        type=readers,
        metavar="N|auto",
        help="processes that read images ahead; 0 reads them between the batches (default: auto, "
        "which starts some where reading keeps the network waiting and cores are free)",
    )


def add_classifier_options(parser: argparse.ArgumentParser) -> None:
    """What ``load_classifier`` and ``chosen_strategy`` read."""
    add_model_options(parser)
    group = parser.add_argument_group("strategy")
    add_search(
        group,
        "auto|enumerate|race|invert",
        STRATEGIES,
        "100; dive-paper 250",
        "min_agreement=0.99",
    )
    add_strategy_extras(group)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """What ``load_classifier`` reads."""
    group = parser.add_argument_group("model")
    add_model(
        group,
        CLASSIFIER,
        "digits|DIR|FILE|HUB_ID",
        "the built-in model of handwritten digits (default), a diffusers model directory, a "
        ".safetensors file of Stable Diffusion, or a hub id such as facebook/DiT-XL-2-256",
    )
    add_lora(group)
    add_timestep_embedding(group)
    add_prediction_type(group)
    add_average(add_prompts(parser, "Stable Diffusion", "'a photo of a {}.'"))
    add_engine(parser)


def add_detector_options(parser: argparse.ArgumentParser) -> None:
    """What ``load_detector`` and ``chosen_layout_strategy`` read."""
    group = parser.add_argument_group("model")
    add_model(
        group,
        DETECTOR,
        "scenes|DIR|HUB_ID",
        "the built-in model of scenes of digits (default), or a directory or hub id of a "
        "layout-to-image model",
    )
    add_prior(group)
    add_prompts(parser, "GLIGEN, GeoDiffusion", "what the model was trained with")
    add_engine(parser)
    group = parser.add_argument_group("search")
    add_search(group, "guided|invert", SEARCHES, "48", "margin=0.05")


def add_scorer_options(
    parser: argparse.ArgumentParser, *, searches: bool, default: str = "race"
) -> None:
    """What ``load_scorer`` reads and, where it searches, ``chosen_strategy``.

    Args:
        default: the strategy where none is named.
    """
    group = parser.add_argument_group("model")
    add_model(
        group,
        None,
        "DIR|FILE|HUB_ID",
        "a text-to-image model: a diffusers directory, a .safetensors file of Stable Diffusion, or "
        "a hub id such as stable-diffusion-v1-5/stable-diffusion-v1-5 (needed)",
    )
    add_lora(group)
    add_prediction_type(group)
    add_engine(parser)
    group = parser.add_argument_group("strategy" if searches else "probes")
    if searches:
        text = f"{STRATEGIES.replace(' (default)', '')} (default: {default})"
        add_search(group, "race|auto|enumerate|invert", text, "100; dive-paper 250", "error=0.001")
        add_strategy_extras(group, "uniform")
    else:
        add_probes(group, "100")
        add_timesteps(group, "uniform")


def add_segmenter_options(parser: argparse.ArgumentParser) -> None:
    """What a classifier or a detector that segments is loaded with, and asked."""
    group = parser.add_argument_group("model")
    add_model(
        group,
        DETECTOR,
        "scenes|digits|DIR|HUB_ID",
        "the built-in model of scenes of digits (default), or a directory or hub id of a "
        "layout-to-image model or of a model of classes",
    )
    add_prompts(parser, "Stable Diffusion; GLIGEN, GeoDiffusion", "the family's own")
    add_engine(parser)
    group = parser.add_argument_group("maps")
    add_search(
        group,
        "guided|invert",
        "of a layout-to-image model: " + SEARCHES,
        "64 of classes; 48 of a search, of whose first 8 maps are made",
        "margin=0.05",
    )
    classifiers = parser.add_argument_group("only for a model of classes")
    add_timesteps(classifiers, LEARNED)
    classifiers.add_argument(
        "--background",
        action="store_true",
        default=None,
        help="let the condition 'no class' compete, where the model has learned it",
    )
    add_lora(classifiers)
    add_timestep_embedding(classifiers)
    add_prediction_type(classifiers)
    add_average(classifiers)
    add_prior(parser.add_argument_group("only for a layout-to-image model"))


def add_app_options(parser: argparse.ArgumentParser) -> None:
    """What the models of ``dive-fast app`` are loaded with, classifiers and detectors."""
    group = parser.add_argument_group("models")
    add_model(
        group,
        None,
        "digits|scenes|DIR|FILE|HUB_ID",
        f"a model of the zoo, a model directory, a .safetensors file or a hub id; may be given "
        f"several times, for a list to choose from (default: {CLASSIFIER})",
        several=True,
    )
    add_lora(group)
    add_timestep_embedding(group)
    add_prediction_type(group)
    add_prior(group)
    add_average(add_prompts(parser, "Stable Diffusion, GLIGEN and others", "the family's own"))
    add_engine(parser)


def add_generator_options(parser: argparse.ArgumentParser) -> None:
    """What ``load_classifier`` reads, for several models that positional arguments name."""
    group = parser.add_argument_group("models, all of them")
    add_loading(group)
    add_timestep_embedding(group)
    add_prediction_type(group)
    add_average(add_prompts(parser, "Stable Diffusion", "'a photo of a {}.'"))
    add_engine(parser)


def add_options_of_both(
    parser: argparse.ArgumentParser, *, strategy: str, prior: bool
) -> argparse._ArgumentGroup:
    """The options of a command whose data say whether it is about a classifier or a detector.

    Args:
        strategy: of a classifier, where none is named.
        prior: whether a detector may have a prior in it.

    Returns:
        The group of options for classifiers only, which may get more.
    """
    group = parser.add_argument_group("model")
    add_model(
        group,
        None,
        "digits|scenes|DIR|HUB_ID",
        f"a model of the zoo, a model directory, or a hub id (default: {CLASSIFIER} as classifier, "
        f"{DETECTOR} as detector)",
    )
    add_prompts(parser, "Stable Diffusion; GLIGEN, GeoDiffusion", "the family's own")
    add_engine(parser)
    group = parser.add_argument_group("strategy")
    add_search(
        group,
        "NAME",
        "of a classifier: auto, enumerate, race or invert; of a detector: guided or invert "
        f"(default: {strategy}; guided)",
        "of a classifier 100, dive-paper 250; of a detector 48",
        "min_agreement=0.99 of auto or margin=0.05 of guided",
    )
    classifiers = parser.add_argument_group(
        "only for a classifier",
        "(--data digits, a folder by class, an .npz or a table, wds: or hf:)",
    )
    add_strategy_extras(classifiers)
    add_lora(classifiers)
    add_timestep_embedding(classifiers)
    add_prediction_type(classifiers)
    add_average(classifiers)
    group = parser.add_argument_group(
        "only for a detector", "(--data scenes, or a COCO annotation file)"
    )
    group.add_argument(
        "--images", metavar="DIR", help="the images of the annotation file; needed with it"
    )
    if prior:
        add_prior(group)
    return classifiers
