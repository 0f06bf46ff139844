"""Options that several commands share.

``classify`` asks a classifier and ``detect`` a detector; ``evaluate`` and ``fit`` ask the one that
their data is for, and have the options of both.
"""

from __future__ import annotations

import argparse

from dive_fast.cli.engine_options import add_engine
from dive_fast.cli.values import count, log_target, number, readers, seed, weight

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
    _add_search(
        group,
        "auto|enumerate|race|invert",
        _STRATEGIES,
        "100; dive-paper 250",
        "min_agreement=0.99",
    )
    _add_strategy_extras(group)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """What ``load_classifier`` reads."""
    group = parser.add_argument_group("model")
    _add_model(
        group,
        CLASSIFIER,
        "digits|DIR|FILE|HUB_ID",
        "the built-in model of handwritten digits (default), a diffusers model directory, a "
        ".safetensors file of Stable Diffusion, or a hub id such as facebook/DiT-XL-2-256",
    )
    _add_lora(group)
    _add_timestep_embedding(group)
    _add_prediction_type(group)
    _add_average(_add_prompts(parser, "Stable Diffusion", "'a photo of a {}.'"))
    add_engine(parser)


def add_detector_options(parser: argparse.ArgumentParser) -> None:
    """What ``load_detector`` and ``chosen_layout_strategy`` read."""
    group = parser.add_argument_group("model")
    _add_model(
        group,
        DETECTOR,
        "scenes|DIR|HUB_ID",
        "the built-in model of scenes of digits (default), or a directory or hub id of a "
        "layout-to-image model",
    )
    _add_prior(group)
    _add_prompts(parser, "GLIGEN, GeoDiffusion", "what the model was trained with")
    add_engine(parser)
    group = parser.add_argument_group("search")
    _add_search(group, "guided|invert", _SEARCHES, "48", "margin=0.05")


def add_scorer_options(
    parser: argparse.ArgumentParser, *, searches: bool, default: str = "race"
) -> None:
    """What ``load_scorer`` reads and, where it searches, ``chosen_strategy``.

    Args:
        default: the strategy where none is named.
    """
    group = parser.add_argument_group("model")
    _add_model(
        group,
        None,
        "DIR|FILE|HUB_ID",
        "a text-to-image model: a diffusers directory, a .safetensors file of Stable Diffusion, or "
        "a hub id such as stable-diffusion-v1-5/stable-diffusion-v1-5 (needed)",
    )
    _add_lora(group)
    _add_prediction_type(group)
    add_engine(parser)
    group = parser.add_argument_group("strategy" if searches else "probes")
    if searches:
        text = f"{_STRATEGIES.replace(' (default)', '')} (default: {default})"
        _add_search(group, "race|auto|enumerate|invert", text, "100; dive-paper 250", "error=0.001")
        _add_strategy_extras(group, "uniform")
    else:
        _add_probes(group, "100")
        _add_timesteps(group, "uniform")


def add_app_options(parser: argparse.ArgumentParser) -> None:
    """What the models of ``dive-fast app`` are loaded with, classifiers and detectors."""
    group = parser.add_argument_group("models")
    _add_model(
        group,
        None,
        "digits|scenes|DIR|FILE|HUB_ID",
        f"a model of the zoo, a model directory, a .safetensors file or a hub id; may be given "
        f"several times, for a list to choose from (default: {CLASSIFIER})",
        several=True,
    )
    _add_lora(group)
    _add_timestep_embedding(group)
    _add_prediction_type(group)
    _add_prior(group)
    _add_average(_add_prompts(parser, "Stable Diffusion, GLIGEN and others", "the family's own"))
    add_engine(parser)


def add_generator_options(parser: argparse.ArgumentParser) -> None:
    """What ``load_classifier`` reads, for several models that positional arguments name."""
    group = parser.add_argument_group("models, all of them")
    _add_loading(group)
    _add_timestep_embedding(group)
    _add_prediction_type(group)
    _add_average(_add_prompts(parser, "Stable Diffusion", "'a photo of a {}.'"))
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
    _add_model(
        group,
        None,
        "digits|scenes|DIR|HUB_ID",
        f"a model of the zoo, a model directory, or a hub id (default: {CLASSIFIER} as classifier, "
        f"{DETECTOR} as detector)",
    )
    _add_prompts(parser, "Stable Diffusion; GLIGEN, GeoDiffusion", "the family's own")
    add_engine(parser)
    group = parser.add_argument_group("strategy")
    _add_search(
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
    _add_strategy_extras(classifiers)
    _add_lora(classifiers)
    _add_timestep_embedding(classifiers)
    _add_prediction_type(classifiers)
    _add_average(classifiers)
    group = parser.add_argument_group(
        "only for a detector", "(--data scenes, or a COCO annotation file)"
    )
    group.add_argument(
        "--images", metavar="DIR", help="the images of the annotation file; needed with it"
    )
    if prior:
        _add_prior(group)
    return classifiers


_STRATEGIES = (
    "auto: a gradient names the few classes that race (default); enumerate: try every class; race: "
    "drop classes that cannot win; invert: optimise the condition"
)
_SEARCHES = (
    "guided: read places off an error map, then split, join, move and name (default); invert: "
    "optimise a relaxed layout, as DIVE does"
)


def _add_model(
    group: argparse._ArgumentGroup,
    default: str | None,
    metavar: str,
    text: str,
    several: bool = False,
) -> None:
    action = "append" if several else "store"
    group.add_argument("--model", action=action, default=default, metavar=metavar, help=text)
    _add_loading(group)
    _add_fitted(group)


def _add_loading(group: argparse._ArgumentGroup) -> None:
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
        "--variant",
        metavar="NAME",
        help="take the weights of a variant, such as fp16, where there are such (default: full "
        "precision, or the only variant)",
    )


def _add_fitted(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--fitted",
        metavar="DIR",
        help="the directory that 'dive-fast fit --out' wrote (default: the model's own)",
    )


def _add_prompts(
    parser: argparse.ArgumentParser, models: str, default_template: str
) -> argparse._ArgumentGroup:
    group = parser.add_argument_group(f"classes of a text-conditional model ({models})")
    group.add_argument(
        "--classes",
        metavar="NAMES|FILE|LIST",
        help="names with commas between; a file: one name a line, or a table (.csv, .tsv), JSON "
        "or YAML, also with prompts; or a package's list: open_clip:imagenet, clip_benchmark:pets",
    )
    group.add_argument(
        "--template",
        action="append",
        metavar="TEXT|LIST",
        help="makes a prompt of a name, with {} in its place; or a package's list of such: "
        "open_clip:openai (80), open_clip:simple (7), clip_benchmark:pets; may be given several "
        "times "
        f"(default: {default_template})",
    )
    return group


def _add_search(
    group: argparse._ArgumentGroup, metavar: str, text: str, probes: str, setting: str
) -> None:
    group.add_argument("--strategy", metavar=metavar, help=text)
    _add_probes(group, probes)
    group.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help=f"a setting of the strategy, such as {setting}; may be given several times",
    )


def _add_probes(group: argparse._ArgumentGroup, default: str) -> None:
    group.add_argument(
        "--probes",
        type=count,
        metavar="K",
        help=f"(timestep, noise) pairs per image (default: {default})",
    )
    group.add_argument("--seed", type=seed, default=0, help="of noise and draws (default: 0)")


_LEARNED = "learned where the model has them; presets are uniform"


def _add_strategy_extras(group: argparse._ArgumentGroup, weights: str = _LEARNED) -> None:
    group.add_argument(
        "--preset",
        metavar="dive-paper|diffusion-classifier",
        help="published settings instead of ours: of invert, or of enumerate",
    )
    _add_timesteps(group, weights)


def _add_timesteps(group: argparse._ArgumentGroup, weights: str) -> None:
    group.add_argument(
        "--timesteps",
        choices=["learned", "uniform"],
        help=f"take probes where the model's fitted timesteps say, or evenly (default: {_LEARNED})",
    )
    group.add_argument(
        "--weights",
        choices=["learned", "uniform"],
        help="let the loss at each timestep count as the model's fitted weights say, or alike "
        f"(default: {weights})",
    )


def _add_lora(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--lora",
        metavar="FILE|DIR|HUB_ID",
        help="LoRA weights that are fused into a text-to-image model, for this call",
    )
    group.add_argument(
        "--lora-scale",
        type=number,
        metavar="X",
        help="what the differences of --lora are multiplied with (default: 1)",
    )


def _add_timestep_embedding(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--timestep-embedding",
        metavar="auto|diffusers|original",
        help="which frequencies a DiT was trained with (default: auto)",
    )


def _add_prediction_type(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--prediction-type",
        choices=["epsilon", "v_prediction"],
        help="what the network of a single file predicts (default: what the file says, else what "
        "was published; needed for Stable Diffusion 2.x that does not say)",
    )


def _add_average(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--average",
        metavar="embedding|loss",
        help="what is averaged over the templates of a class (default: embedding)",
    )


def _add_prior(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--prior",
        metavar="auto|none|DIR",
        help="the prior over layouts: the model's own where it has one (auto, the default), none, "
        "or a directory that 'dive-fast train-prior' wrote",
    )
    group.add_argument(
        "--prior-weight",
        type=weight,
        metavar="X",
        help="what log p(layout) counts beside -beta times the loss (default: 0.5)",
    )
