"""Classes as prompts: what a text-conditional model is asked about."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from dive_fast.core.distinct import told_apart
from dive_fast.errors import ModelError
from dive_fast.models.files.checkpoint import read_class_names, read_json
from dive_fast.models.files.sidecar import read_extra

DEFAULT_TEMPLATES = ("a photo of a {}.",)
AVERAGES = ("embedding", "loss")

# Names, or names to their prompt or prompts.
Classes: TypeAlias = Sequence[str] | Mapping[str, str | Sequence[str]]


@dataclass(frozen=True)
class ClassPrompts:
    """The prompts of every class.

    Attributes:
        names: one per class, all different: of equal ones each has its row in brackets.
        prompts: one tuple per class, each of at least one prompt.
        average: how several prompts of one class become one answer. "embedding": the mean of their
            embeddings is one condition. "loss": each is a condition of its own, and the class's
            loss is the mean of theirs; every class then needs as many prompts.
    """

    names: tuple[str, ...]
    prompts: tuple[tuple[str, ...], ...]
    average: str = "embedding"

    @classmethod
    def make(
        cls,
        classes: Classes,
        templates: Sequence[str] | None = None,
        average: str | None = None,
    ) -> ClassPrompts:
        """From names and templates, or from names with their own prompts.

        Args:
            classes: names, to be put into every template; or a mapping from each name to its
                prompt or list of prompts, which are taken as they stand. Equal names are told
                apart by their rows ("crane (134)"), with a warning; their prompts are the same.
            templates: each with "{}" where the name goes; "a photo of a {}." if None.
            average: "embedding" (the default) or "loss".

        Raises:
            ModelError: no classes, a name that is empty or no text, a template without "{}",
                templates for classes that have prompts already, or an unknown average.
        """
        if average is None:
            average = "embedding"
        if average not in AVERAGES:
            raise ModelError(f"expected an average of {', '.join(AVERAGES)}, got {average!r}.")
        if isinstance(classes, Mapping):
            if templates is not None:
                raise ModelError("expected templates, or classes with their prompts, got both.")
            names = _texts(classes, "classes")
            prompts = [_prompts_of(name, classes[name]) for name in classes]
        else:
            names = _texts(classes, "classes")
            patterns = _templates(templates)
            prompts = [tuple(p.replace("{}", name) for p in patterns) for name in names]
        names = told_apart(names, prompts=True)
        if average == "loss" and len(set(map(len, prompts))) > 1:
            raise ModelError(
                "average='loss' needs as many prompts for every class, got "
                f"{min(map(len, prompts))} to {max(map(len, prompts))}."
            )
        return cls(names, tuple(prompts), average)

    @property
    def parts(self) -> int:
        """Conditions per class."""
        return len(self.prompts[0]) if self.average == "loss" else 1

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        named = {name: list(p) for name, p in zip(self.names, self.prompts, strict=True)}
        return {"prompts": named, "average": self.average}


def require_classes(directory: Path, classes: Classes | None) -> Classes:
    """``classes``, or those that the model directory itself names.

    Raises:
        ModelError: there are none.
    """
    if classes is None:
        classes = stored_classes(directory)
    if classes is None:
        raise ModelError(
            f"{directory} is a text-conditional model and needs classes: classes=['cat', 'dog'], "
            f"or --classes cat,dog on the command line."
        )
    return classes


def stored_classes(directory: Path) -> Classes | None:
    """The classes that a model directory itself names.

    Raises:
        ModelError: one of its files cannot be read.
    """
    stated = read_extra(directory).get("classes")
    if stated is not None:
        return stated
    labels = read_json(directory / "model_index.json").get("id2label")
    if not labels:
        return None
    n = len(labels) if isinstance(labels, dict) else 0
    # Equal names stay equal here: prompts are made of them.
    return list(read_class_names({"id2label": labels}, n, distinct=False))


def _templates(templates: Sequence[str] | None) -> tuple[str, ...]:
    if templates is None:
        return DEFAULT_TEMPLATES
    patterns = _texts(templates, "templates")
    for pattern in patterns:
        if "{}" not in pattern:
            raise ModelError(f"a template needs {{}} where the class goes, got {pattern!r}.")
    return patterns


def _prompts_of(name: str, prompts: str | Sequence[str]) -> tuple[str, ...]:
    # The empty prompt is a prompt, if someone writes it out.
    listed = (prompts,) if isinstance(prompts, str) else ()
    if not listed and isinstance(prompts, Iterable):
        listed = tuple(prompts)
    if not listed or not all(_is_text(prompt) for prompt in listed):
        raise ModelError(f"the class {name!r} needs a prompt or a list of them, got {prompts!r}.")
    return listed


def _texts(values: Any, what: str) -> tuple[str, ...]:
    """At least one text, none of them empty."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise ModelError(f"{what} must be a list of texts, got {values!r}.")
    texts = tuple(values)
    if not texts:
        raise ModelError(f"{what} must hold at least one text, got none.")
    for text in texts:
        if not _is_text(text) or not text.strip():
            raise ModelError(f"{what} must hold texts that are not empty, got {text!r}.")
    return texts


def _is_text(value: Any) -> bool:
    """Whether it is a text that can be written: file names that are no UTF-8 cannot."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
