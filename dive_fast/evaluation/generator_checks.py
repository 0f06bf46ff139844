"""Whether generators can be compared: the same classes, and noise that suits them all."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dive_fast.errors import ModelError, shown
from dive_fast.evaluation.generator_runs import Settings
from dive_fast.predict.classifier import DiffusionClassifier
from dive_fast.predict.measuring import bound_in_nats

_ALIKE = {"rtol": 1e-3, "atol": 1e-3}  # x0 of the same picture in one space


@dataclass(frozen=True, eq=False)
class Facts:
    """What is to be known of a generator before it runs.

    Attributes:
        name: what it is called in sentences.
        names: of its classes.
        shape: of x0.
        timesteps: T.
        x0: of a picture of noise, which tells latent spaces apart.
        no_bound: why it has no likelihood; None where it has one, or none is asked for.
    """

    name: str
    names: tuple[str, ...]
    shape: tuple[int, ...]
    timesteps: int
    x0: torch.Tensor
    no_bound: str | None

    @classmethod
    def of(cls, name: str, classifier: DiffusionClassifier, settings: Settings) -> Facts:
        """Those of a classifier.

        Raises:
            ModelError: it knows one class only.
        """
        model, no_bound = classifier.model, None
        if len(classifier.names) < 2:
            raise ModelError(
                f"{name}: expected a model of at least two classes, got {shown(classifier.names)}."
            )
        if settings.likelihood_probes is not None:
            try:
                bound_in_nats(classifier, settings.likelihood_probes, settings.seed)
            except ModelError as error:
                no_bound = str(error)
        generator = torch.Generator().manual_seed(0)
        picture = torch.rand(1, *model.image_shape, generator=generator) * 2 - 1
        return cls(
            name,
            classifier.names,
            tuple(model.latent_shape),
            len(model.schedule),
            classifier.encode_pixels(picture).float().cpu(),
            no_bound,
        )

    def expect_comparable(self, other: Facts) -> None:
        """That another one knows the same classes and takes the same noise.

        Raises:
            ModelError: it does not.
        """
        if len(self.names) != len(other.names):
            raise ModelError(
                f"expected generators of the same classes, got {len(self.names)} in {self.name} "
                f"and {len(other.names)} in {other.name}."
            )
        for row, (one, two) in enumerate(zip(self.names, other.names, strict=True)):
            if one != two:
                raise ModelError(
                    f"expected generators of the same classes, got {shown(one)} as class {row} in "
                    f"{self.name} and {shown(two)} in {other.name}."
                )
        if self.shape != other.shape:
            raise ModelError(
                f"expected generators that the same noise suits, got x0 of {list(self.shape)} in "
                f"{self.name} and {list(other.shape)} in {other.name}."
            )

    def same_space(self, other: Facts) -> bool:
        """Whether both see the same x0 of a picture, so that densities of it compare."""
        return torch.allclose(self.x0, other.x0, **_ALIKE)


def notes_on(facts: list[Facts], settings: Settings) -> list[str]:
    """What a reader of the figures must know, in sentences."""
    first, found = facts[0], []
    if others := [f.name for f in facts if f.timesteps != first.timesteps]:
        found.append(
            f"{_listed(others)} and {first.name} have other numbers of timesteps: probes are at "
            "the same fractions of them, which need not be the same levels of noise."
        )
    if settings.classes_per_image is not None:
        found.append(
            f"each image was tried on its right class and {settings.classes_per_image - 1} random "
            f"others of {len(first.names)}: accuracy, rank, margin and nll are among these."
        )
    if settings.likelihood_probes is None:
        return found
    found += [f"{f.name} has no likelihood: {f.no_bound}" for f in facts if f.no_bound is not None]
    if others := [f.name for f in facts if f.no_bound is None and not first.same_space(f)]:
        found.append(
            f"{_listed(others)} and {first.name} see other x0 of the same picture (another VAE or "
            "scale): their likelihoods are densities of different things and are not compared."
        )
    return found


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
