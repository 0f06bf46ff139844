"""Which data set of Hugging Face is meant, and how the library ``datasets`` gets it."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from dive_fast.data.spec import split_options
from dive_fast.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

OPTIONS = ("image", "label", "classes", "revision", "streaming")
_FILES = {".parquet": "parquet", ".arrow": "arrow"}


@dataclass(frozen=True)
class HubSet:
    """What ``hf:NAME[:CONFIG]@SPLIT?OPTIONS`` says.

    Attributes:
        place: a name on the hub, a folder or a file.
        config, split, revision: as ``datasets.load_dataset`` takes them, or None.
        image, label: the columns, where they are named.
        by_index: the data's numbers of classes are the model's rows, whatever they are called.
        streaming: read once and in order, without a copy on disk.
    """

    place: str
    config: str | None
    split: str | None
    revision: str | None = None
    image: str | None = None
    label: str | None = None
    by_index: bool = False
    streaming: bool = False

    @property
    def name(self) -> str:
        """What the data are called wherever they lie."""
        place = os.path.basename(os.path.abspath(self.place)) if self.is_local else self.place
        config = f":{self.config}" if self.config else ""
        return f"{place}{config}@{self.split}" if self.split else f"{place}{config}"

    @property
    def where(self) -> str:
        config = f":{self.config}" if self.config else ""
        return f"hf:{self.place}{config}" + (f"@{self.split}" if self.split else "")

    @property
    def is_local(self) -> bool:
        return os.path.exists(self.place)

    def __reduce__(self) -> tuple[type, tuple]:
        # Another process may work elsewhere.
        place = os.path.abspath(self.place) if self.is_local else self.place
        return HubSet, (place, *(getattr(self, f.name) for f in fields(self)[1:]))


def parse_hub_set(spec: str) -> HubSet:
    """What the user named, without looking for it.

    Raises:
        DataError: it is not of the form ``hf:NAME[:CONFIG][@SPLIT][?OPTIONS]``.
    """
    place, options = split_options(spec, OPTIONS)
    place = place.removeprefix("hf:")
    name, _, split = (place, "", "") if os.path.exists(place) else _parted(place, "@")
    name, _, config = (name, "", "") if os.path.exists(name) else name.partition(":")
    if not name:
        raise DataError(f"{spec}: expected hf:NAME[:CONFIG]@SPLIT, got no name.")
    for option, value in (("streaming", "true"), ("classes", "index")):
        if options.get(option, value) != value:
            raise DataError(f"{spec}: expected {option}={value}, got {options[option]!r}.")
    return HubSet(
        name,
        config or None,
        split or None,
        options.get("revision"),
        options.get("image"),
        options.get("label"),
        by_index="classes" in options,
        streaming="streaming" in options,
    )


def _parted(text: str, sign: str) -> tuple[str, str, str]:
    before, found, after = text.rpartition(sign)
    return (before, found, after) if found else (text, "", "")


def load_hub_set(source: HubSet) -> Dataset | IterableDataset:
    """The split, as the library has it.

    Raises:
        DataError: the library is not installed, or the data or the split cannot be had.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{source.where}: such data need the library datasets, which is not installed: "
            "pip install 'dive_fast[hf]'."
        ) from error
    if not source.is_local and source.place.startswith((".", "/", "~")):
        raise DataError(f"{source.where}: expected a data set, but {source.place} is not there.")
    try:
        with _quiet(datasets):
            data = _loaded(datasets, source)
    except DataError:
        raise
    except Exception as error:  # a network, a file system, a builder: each has its own errors
        raise DataError(f"{source.where}: cannot be loaded: {reason(error)}.") from error
    if isinstance(data, dict):
        got = f"the splits {', '.join(data)}"
        raise DataError(f"{source.where}: expected hf:NAME[:CONFIG]@SPLIT, got {got}.")
    if data.features is None:
        raise DataError(f"{source.where}: expected columns of known types; leave streaming out.")
    return data


def _loaded(datasets: Any, source: HubSet) -> Any:
    """What the library makes of it: one split, or several where none is named."""
    place = source.place
    common = {"revision": source.revision, "streaming": source.streaming}
    if kind := _FILES.get(os.path.splitext(place)[1].lower()) if os.path.isfile(place) else None:
        split = source.split or "train"
        return datasets.load_dataset(kind, data_files={split: place}, split=split, **common)
    saved = ("dataset_dict.json", "state.json")
    if not any(os.path.exists(os.path.join(place, name)) for name in saved):
        return datasets.load_dataset(place, source.config, split=source.split, **common)
    data = datasets.load_from_disk(place)
    if isinstance(data, dict) and source.split in data:
        data = data[source.split]
    elif source.split is not None and (isinstance(data, dict) or str(data.split) != source.split):
        got = ", ".join(data) if isinstance(data, dict) else data.split
        raise DataError(
            f"{source.where}: expected a split that there is, got {source.split!r}; there is "
            f"{got or 'one part without a name: leave the split out'}."
        )
    if source.streaming:
        raise DataError(f"{source.where}: what save_to_disk wrote is not streamed; it is read as "
                        "it lies there without streaming=true.")  # fmt: skip
    return data


@contextlib.contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """No progress bars in files, no lines about retries: what fails is told in one sentence."""
    from huggingface_hub.utils import logging

    level, bars = logging.get_verbosity(), datasets.are_progress_bars_disabled()
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if not bars:
            datasets.enable_progress_bars()


def reason(error: BaseException) -> str:
    """What went wrong, on one line that is not too long."""
    text = " ".join(str(error).split()) or type(error).__name__
    return (text if len(text) <= 300 else f"{text[:300]}...").rstrip(".")
