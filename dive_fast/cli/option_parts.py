"""Options that several commands have in common, of which ``options`` makes whole commands."""

from __future__ import annotations

import argparse

from dive_fast.cli.values import count, number, seed, weight

STRATEGIES = (
    "auto: a gradient names the few classes that race (default); enumerate: try every class; race: "
    "drop classes that cannot win; invert: optimise the condition"
)
SEARCHES = (
    "guided: read places off an error map, then split, join, move and name (default); invert: "
    "optimise a relaxed layout, as DIVE does"
)


def add_model(
    group: argparse._ArgumentGroup,
    default: str | None,
    metavar: str,
    text: str,
    several: bool = False,
) -> None:
    action = "append" if several else "store"
    group.add_argument("--model", action=action, default=default, metavar=metavar, help=text)
    add_loading(group)
    add_fitted(group)


def add_loading(group: argparse._ArgumentGroup) -> None:
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


def add_fitted(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--fitted",
        metavar="DIR",
        help="the directory that 'dive-fast fit --out' wrote (default: the model's own)",
    )


def add_prompts(
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


def add_search(
    group: argparse._ArgumentGroup, metavar: str, text: str, probes: str, setting: str
) -> None:
    group.add_argument("--strategy", metavar=metavar, help=text)
    add_probes(group, probes)
    group.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help=f"a setting of the strategy, such as {setting}; may be given several times",
    )


def add_probes(group: argparse._ArgumentGroup, default: str) -> None:
    group.add_argument(
        "--probes",
        type=count,
        metavar="K",
        help=f"(timestep, noise) pairs per image (default: {default})",
    )
    group.add_argument("--seed", type=seed, default=0, help="of noise and draws (default: 0)")


LEARNED = "learned where the model has them; presets are uniform"


def add_strategy_extras(group: argparse._ArgumentGroup, weights: str = LEARNED) -> None:
    group.add_argument(
        "--preset",
        metavar="dive-paper|diffusion-classifier",
        help="published settings instead of ours: of invert, or of enumerate",
    )
    add_timesteps(group, weights)


def add_timesteps(group: argparse._ArgumentGroup, weights: str) -> None:
    group.add_argument(
        "--timesteps",
        choices=["learned", "uniform"],
        help=f"take probes where the model's fitted timesteps say, or evenly (default: {LEARNED})",
    )
    group.add_argument(
        "--weights",
        choices=["learned", "uniform"],
        help="let the loss at each timestep count as the model's fitted weights say, or alike "
        f"(default: {weights})",
    )


def add_lora(group: argparse._ArgumentGroup) -> None:
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


def add_timestep_embedding(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--timestep-embedding",
        metavar="auto|diffusers|original",
        help="which frequencies a DiT was trained with (default: auto)",
    )


def add_prediction_type(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--prediction-type",
        choices=["epsilon", "v_prediction"],
        help="what the network of a single file predicts (default: what the file says, else what "
        "was published; needed for Stable Diffusion 2.x that does not say)",
    )


def add_average(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--average",
        metavar="embedding|loss",
        help="what is averaged over the templates of a class (default: embedding)",
    )


def add_prior(group: argparse._ArgumentGroup) -> None:
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
        help="what log p(layout) counts beside -beta times the loss (default: 0.5, and 0 until "
        "beta is fitted)",
    )
