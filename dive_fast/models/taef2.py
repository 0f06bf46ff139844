"""TAEF2's weights in the forms in which people have them, without ``config.json``.

taef2.safetensors                                      encoder.layers.N, decoder.layers.N
taef2_encoder, taef2_decoder (.safetensors or .pth)    N, and N of the decoder is one more
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from dive_fast.errors import ModelError
from dive_fast.models.files.checkpoint import load_weights
from dive_fast.models.files.reading import first_line, root_cause
from dive_fast.models.files.tensors import Entry, PickledTensors, SafeTensors
from dive_fast.models.files.weights import WeightSet
from dive_fast.models.tiny_autoencoder import AutoencoderTAEF2

SETS = (
    ("taef2.safetensors",),
    ("taef2_encoder.safetensors", "taef2_decoder.safetensors"),
    ("taef2_encoder.pth", "taef2_decoder.pth"),
)
FILES = tuple(name for names in SETS for name in names)
# What precedes the names of a file's weights, and the number of its first layer.
_PARTS = {"taef2_encoder": ("encoder.layers.", 0), "taef2_decoder": ("decoder.layers.", 1)}


def load_taef2(folder: Path) -> AutoencoderTAEF2:
    """The autoencoder of the one set of ``SETS`` in a folder, float32, complete and frozen.

    Pickled files are read with ``weights_only=True``.

    Raises:
        ModelError: two sets, half a one, or weights that are damaged, not finite, or of another
            autoencoder.
    """
    names = _one_set(folder)
    return load_weights(
        AutoencoderTAEF2, {}, lambda: _Published(folder, names), folder, stated="TAEF2"
    )


def _one_set(folder: Path) -> tuple[str, ...]:
    there = [name for name in FILES if (folder / name).is_file()]
    begun = [names for names in SETS if not set(names).isdisjoint(there)]
    if len(begun) != 1:
        raise ModelError(
            f"expected one set of TAEF2's weights in {folder}, got {' and '.join(there) or 'none'}."
        )
    if missing := set(begun[0]).difference(there):
        raise ModelError(f"expected {missing.pop()} beside {there[0]} in {folder}, found none.")
    return begun[0]


class _Published:
    """The files of one set as ``load_weights`` takes them.

    Attributes:
        entries: by the names that the class has for them.
    """

    def __init__(self, folder: Path, names: tuple[str, ...]) -> None:
        self.entries: dict[str, Entry] = {}
        self._files: dict[Path, SafeTensors | PickledTensors] = {}
        for name in names:
            file = self._files[folder / name] = _opened(folder, name)
            for key, entry in file.entries.items():
                self.entries[_renamed(key, Path(name).stem)] = entry

    def fill(self, entry: Entry, target: Tensor) -> None:
        self._files[entry.file].fill(entry, target)


def _opened(folder: Path, name: str) -> SafeTensors | PickledTensors:
    kind = PickledTensors if name.endswith(".pth") else SafeTensors
    try:
        return kind(folder, WeightSet([name]))
    except ModelError:
        raise
    except Exception as error:  # pickle, zip and torch each raise their own kinds
        raise ModelError(
            f"{folder / name} is truncated or damaged: {first_line(root_cause(error))}"
        ) from error


def _renamed(key: str, stem: str) -> str:
    """As the class calls it; what has no number stays what it is, for the sentence on it."""
    if stem not in _PARTS:
        return key
    (prefix, first), (number, dot, rest) = _PARTS[stem], key.partition(".")
    known = number.isascii() and number.isdigit() and str(int(number)) == number
    return f"{prefix}{int(number) - first}{dot}{rest}" if known else prefix + key
