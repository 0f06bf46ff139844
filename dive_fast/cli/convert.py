"""``dive-fast convert``: published checkpoints to a model directory."""

from __future__ import annotations

import argparse
from pathlib import Path

from dive_fast.cli.values import count


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "convert",
        help="convert a latent-diffusion layout-to-image checkpoint",
        description="Converts a published latent-diffusion layout-to-image checkpoint to a "
        "model directory in the layout of diffusers. Only weights are read of it.",
    )
    parser.add_argument("checkpoint", metavar="CKPT", help="the .ckpt, .pt or .safetensors file")
    parser.add_argument("--out", required=True, metavar="DIR", help="the model directory")
    parser.add_argument(
        "--names",
        metavar="FILE",
        help="the classes' names in their tokens' order: one a line, or a table, JSON or YAML",
    )
    parser.add_argument(
        "--latent-size", type=count, default=64, metavar="N", help="side of the latents (64)"
    )
    parser.add_argument(
        "--head-channels", type=count, default=32, metavar="N", help="of the UNet's heads (32)"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from dive_fast.errors import RunError
    from dive_fast.models.layout_to_image.convert import convert_layout_checkpoint

    # What was fitted to a model there, and its prior, would be taken for this one's.
    if (Path(options.out) / "model_index.json").exists():
        raise RunError(f"{options.out} holds a model already; choose another --out.")
    model = convert_layout_checkpoint(
        options.checkpoint,
        None if options.names is None else _read_names(Path(options.names)),
        latent_size=options.latent_size,
        head_channels=options.head_channels,
    )
    model.save_pretrained(options.out)
    layout = model.layout_format
    print(
        f"{options.out}: layouts of {layout.max_objects} objects of {len(layout.names)} classes on "
        f"a {layout.grid} x {layout.grid} grid, images of {model.image_shape[1]} pixels"
    )
    return 0


def _read_names(path: Path) -> list[str]:
    """The names that a file lists.

    Raises:
        DataError: it is no list of names.
    """
    from dive_fast.data.class_lists import read_classes
    from dive_fast.errors import DataError

    names = read_classes(path)
    if isinstance(names, dict):
        raise DataError(f"{path}: expected names alone, got prompts as well.")
    return names
