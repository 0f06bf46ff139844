"""What lies beside a model and changes it where it is applied: told, as nobody asked for it."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from dive_fast.errors import some

log = logging.getLogger(__name__)

_TENSORS = r"\.(safetensors|bin|pt|ckpt)"
_LORA = re.compile(
    rf"(pytorch_lora_weights|adapter_model|lora(_weights)?)\b.*{_TENSORS}|adapter_config\.json",
    re.IGNORECASE,
)
# Not every family can, and one that cannot says so.
_HOW = " unless asked for (lora='FILE', --lora FILE, of text-to-image models)"
_EMBEDDINGS = re.compile(rf"(learned_embeds|textual_inversion).*{_TENSORS}", re.IGNORECASE)


def tell_what_is_not_applied(
    directory: Path, folders: Sequence[str] | None, applied: Path | None = None
) -> None:
    """One warning about LoRA weights, and one about textual inversion, in a model's directory.

    Args:
        folders: of the directory, which are looked into as well; None for all.
        applied: the file of LoRA weights that was asked for.
    """
    if folders is None:
        folders = [path.name for path in directory.iterdir() if path.is_dir()]
    names = []
    for folder in ("", *folders):
        place = directory / folder
        with suppress(OSError):  # missing or unreadable: their reader will say
            files = [path for path in place.iterdir() if path.is_file()]
            names += [
                str(Path(folder, path.name))
                for path in files
                # Of the weights beside it, perhaps: their reader says.
                if not (folder and path.name == "adapter_config.json")
                and (applied is None or not path.samefile(applied))
            ]
    tell_of(names, directory)


def tell_of(names: Iterable[str], where: object) -> None:
    """The same of the paths of files, relative to ``where``."""
    names, kinds = sorted(names), {"LoRA weights": _LORA, "textual inversion": _EMBEDDINGS}
    for what, pattern in kinds.items():
        if found := [name for name in names if pattern.fullmatch(name.rsplit("/", 1)[-1])]:
            log.warning(
                "%s in %s: %s beside the model, which are not applied%s.",
                some(found),
                where,
                what,
                _HOW if pattern is _LORA else "",
            )
