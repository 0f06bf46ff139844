"""The models of the page: loaded when they are first asked for, and kept."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dive_fast.errors import DiveFastError, shown, some
from dive_fast.models import Source
from dive_fast.models.text.prompts import Classes, ClassPrompts
from dive_fast.predict.classifier import DiffusionClassifier
from dive_fast.predict.detector import LayoutDetector

Predictor = DiffusionClassifier | LayoutDetector
# (classes, templates) to a predictor; None for what the command line or the model says of them.
Loader = Callable[[Classes | None, Sequence[str] | None], Predictor]

# What a text-conditional model is asked about before anybody says.
SOME_CLASSES = ("cat", "dog")
FEWEST = 2  # classes that there is a choice among


@dataclass
class Entry:
    """One model.

    Attributes:
        source: where it lies.
        load: makes a predictor of it.
        predictor: None before it was loaded.
        first: the classes that it had then, of a text-conditional model.
    """

    source: Source
    load: Loader
    predictor: Predictor | None = None
    first: Prompted | None = None
    _now: Prompted | None = None
    _device: torch.device | None = None

    @property
    def detects(self) -> bool:
        """Whether it finds objects; else it tells classes apart."""
        return self.source.finds_objects

    @property
    def prompted(self) -> bool:
        """Whether its classes are a text that may be changed."""
        return self.source.family.text

    def ready(self) -> Predictor:
        """The predictor, loaded if it is not yet, on its device.

        Raises:
            DiveFastError: it cannot be loaded.
        """
        if self.predictor is None:
            self._keep(self.load(None, None))
            self.first = self._now
        self._move(self._device)
        return self.predictor

    def put_aside(self) -> None:
        """Makes room on an accelerator; the weights stay in main memory."""
        if self.predictor is not None:
            self._move(torch.device("cpu"))

    def ask_about(self, classes: str, template: str) -> bool:
        """Other classes from now on, where the boxes say others; see ``Prompted.read``.

        Returns:
            Whether the weights had to be loaded again.

        Raises:
            DiveFastError: no such classes or template.
        """
        predictor = self.ready()
        if not self.prompted:
            return False
        wanted = Prompted.read(classes, template, fewest=1 if self.detects else FEWEST)
        if wanted == self._now:
            return False
        back = wanted == self.first
        templates = (wanted.template,) if wanted.template else None
        set_classes = getattr(predictor.model, "set_classes", None)
        if set_classes is None:
            self._keep(self.load(*((None, None) if back else (wanted.names, templates))))
        elif back:
            set_classes(self.first.given, None, predictor.model.classes.average)
        else:
            set_classes(wanted.names, templates, predictor.model.classes.average)
        self._now = wanted
        return set_classes is None

    def _keep(self, predictor: Predictor) -> None:
        self.predictor, self._device = predictor, predictor.model.device
        self._now = Prompted.of(predictor) if self.prompted else None

    def _move(self, device: torch.device) -> None:
        model = self.predictor.model
        if model.device != device:
            model.to(device, model.dtype)


@dataclass(frozen=True)
class Prompted:
    """What the boxes for classes and template say.

    Attributes:
        names: of the classes.
        template: what makes a prompt of a name; "" for the model's own.
        given: their prompts, where the model takes others without being loaded again.
    """

    names: tuple[str, ...]
    template: str
    given: Any = field(default=None, compare=False)

    @classmethod
    def of(cls, predictor: Predictor) -> Prompted:
        """As a model stands."""
        classes, given = getattr(predictor.model, "classes", None), None
        if isinstance(classes, ClassPrompts):
            given = dict(zip(classes.names, classes.prompts, strict=True))
        return cls(tuple(predictor.names), "", given)

    @classmethod
    def read(cls, classes: str, template: str, fewest: int) -> Prompted:
        """One class a line; empty lines count for nothing.

        Raises:
            DiveFastError: fewer than ``fewest``, or one named twice.
        """
        names = tuple(line.strip() for line in (classes or "").splitlines() if line.strip())
        if len(names) < fewest:
            raise DiveFastError(
                f"expected at least {fewest} class{'es' * (fewest > 1)}, one a line, got "
                f"{len(names) or 'none'}."
            )
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise DiveFastError(f"expected every class once, got {some(twice)} more than once.")
        return cls(names, (template or "").strip())


class Shelf:
    """All models, by what the user called them. One of them is at work at a time.

    On an accelerator there is only that one; the others wait in main memory.

    Args:
        entries: one per model, in the order of the list to choose from.
    """

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.entries = {str(entry.source): entry for entry in entries}
        self._lock = threading.Lock()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.entries)

    def __getitem__(self, name: str) -> Entry:
        """Raises DiveFastError for a model that is none of these."""
        if name not in self.entries:
            raise DiveFastError(f"expected a model of {some(self.names)}, got {shown(name)}.")
        return self.entries[name]

    @contextlib.contextmanager
    def taken(self, name: str) -> Iterator[Entry]:
        """A model to work with, loaded; nobody else has one until the context is left.

        Raises:
            DiveFastError: there is no such model, or it cannot be loaded.
        """
        entry = self[name]
        with self._lock:
            for other in self.entries.values():
                if other is not entry:
                    other.put_aside()
            entry.ready()
            yield entry
