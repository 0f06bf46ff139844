"""Which of several generators knows more: the same images, probes and noise for all of them."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from dive_fast.core.bound import FEWEST, STRATUM
from dive_fast.core.files import replacing
from dive_fast.core.numbers import whole, whole_seed
from dive_fast.core.probes import check_count
from dive_fast.data import DataSet
from dive_fast.data.reading import as_readers
from dive_fast.errors import DiveFastError, RunError, shown
from dive_fast.evaluation.comparison import mcnemar
from dive_fast.evaluation.generator_checks import Facts, notes_on
from dive_fast.evaluation.generator_figures import (
    FIGURES,
    Estimate,
    Measurements,
    estimates,
    image_figures,
)
from dive_fast.evaluation.generator_runs import Settings, run_generator
from dive_fast.evaluation.outputs import write_csv
from dive_fast.evaluation.runfiles import cannot
from dive_fast.predict.classifier import DiffusionClassifier

COMPARISON, TABLE = "comparison.json", "comparison.csv"
Generator = DiffusionClassifier | Callable[[], DiffusionClassifier]


@dataclass(frozen=True)
class Difference:
    """A generator's figures less those of the reference, image by image.

    Attributes:
        figures: by name, those that both have; of ``log_likelihood`` only where both see the same
            x0.
        right_alone, reference_right_alone: images that one alone answered right.
        mcnemar: p-value of McNemar's exact test, two-sided.
    """

    figures: dict[str, Estimate]
    right_alone: int
    reference_right_alone: int
    mcnemar: float


@dataclass(frozen=True)
class GeneratorFigures:
    """What one generator came to.

    Attributes:
        name: of the generator.
        run: its run directory.
        step: of its training, for checkpoints.
        figures: by name (``generator_figures`` has the equations); ``log_likelihood`` in nats, a
            lower bound of log p(x0 | right class).
        difference: to the reference; None of the reference itself.
        evaluations, seconds: per image.
    """

    name: str
    run: str
    step: int | None
    figures: dict[str, Estimate]
    difference: Difference | None
    evaluations: float
    seconds: float


@dataclass(frozen=True)
class GeneratorComparison:
    """Generators on the images that all of them answered.

    Attributes:
        rows: one for each, in the order given; checkpoints by their steps.
        reference: the name of the one that the others are compared with.
        n: images.
        lacking: images that not all of them answered.
        classes: of the generators.
        settings: probes, classes tried of an image, seed; None stands for all or none.
        resamples: behind the intervals.
        notes: what else a reader must know, in sentences.
    """

    rows: tuple[GeneratorFigures, ...]
    reference: str
    n: int
    lacking: int
    classes: int
    settings: Settings
    resamples: int
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)


def compare_generators(
    generators: Mapping[str, Generator],
    data: DataSet,
    out: str | Path,
    *,
    steps: Mapping[str, int] | None = None,
    reference: str | None = None,
    probes: int = 100,
    likelihood_probes: int | None = 100,
    classes_per_image: int | None = None,
    seed: int = 0,
    resamples: int = 2000,
    readers: int | None = 0,
    progress: bool = False,
) -> GeneratorComparison:
    """Measures generators on the same images and compares them, image by image.

    Every generator tries every class of an image on every probe, so it costs an image
    (classes x probes + likelihood probes) evaluations for each. ``out`` gets a run directory for
    each generator, as ``evaluate`` writes, and ``comparison.json`` and ``comparison.csv``. Killed
    and called again with the same arguments it goes on where it stopped.

    Args:
        generators: by name, at least two. What is no classifier is called for one, once to see
            that they fit together and again when its turn has come, so that one is in memory.
        data: labelled images.
        steps: of the training, for those that are its checkpoints.
        reference: which one the others are compared with; the first if None.
        probes: of every class, at timesteps that are the same fractions of T for all, with the
            same noises.
        likelihood_probes: of the right class, divisible by 4, at least 8; None measures none.
        classes_per_image: try only the right class and random others, so many together; they are
            the same for all generators. All if None.
        seed: of noises, classes and resampled images.
        resamples: of the images, for the intervals.
        readers: as for ``evaluate``.
        progress: show a bar for each.

    Raises:
        DiveFastError: fewer than two generators, or an argument out of range.
        ModelError: they have other classes, or x0 of other shapes.
        RunError: ``out`` holds another comparison, or cannot be written, or no image was answered
            by all.
    """
    reference = _check_names(generators, steps, reference)
    settings = _settings(probes, likelihood_probes, classes_per_image, whole_seed(seed))
    resamples, readers = whole("resamples", resamples, 100, 1_000_000), as_readers(readers)
    out = Path(out)
    facts = []
    for name, generator in generators.items():
        facts.append(Facts.of(name, _classifier(name, generator), settings))
        facts[0].expect_comparable(facts[-1])
    if classes_per_image is not None and classes_per_image >= len(facts[0].names):
        settings = dataclasses.replace(settings, classes_per_image=None)
    folders = _folders(out, generators)
    for i, (of, folder) in enumerate(zip(facts, folders, strict=True), start=1):
        if progress:
            tqdm.write(f"{of.name} ({i} of {len(facts)})", file=sys.stderr)
        run_generator(
            _classifier(of.name, generators[of.name]),
            data,
            folder,
            settings,
            has_bound=of.no_bound is None,
            readers=readers,
            progress=progress,
        )
    asked = len(data.ids)
    found = _compared(facts, folders, steps or {}, reference, settings, resamples, asked)
    _write(out, found)
    return found


def _compared(
    facts: list[Facts],
    folders: list[Path],
    steps: Mapping[str, int],
    reference: str,
    settings: Settings,
    resamples: int,
    asked: int,
) -> GeneratorComparison:
    runs = [Measurements.read(folder, facts[0].names) for folder in folders]
    common = set(runs[0].ids).intersection(*(run.ids for run in runs[1:]))
    # Sorted, for the order of answers is chance.
    ids = sorted(common)
    if not ids:
        raise RunError(f"{folders[0].parent}: no image was answered by all generators.")
    runs = [run.take(ids) for run in runs]
    of_images = [image_figures(run) for run in runs]
    at = [f.name for f in facts].index(reference)
    rows = []
    for i, of in enumerate(facts):
        difference = None
        if i != at:
            same = of.same_space(facts[at])
            difference = _difference(
                (runs[i], of_images[i]), (runs[at], of_images[at]), same, resamples, settings.seed
            )
        rows.append(
            GeneratorFigures(
                name=of.name,
                run=str(folders[i]),
                step=steps.get(of.name),
                figures=estimates(of_images[i], resamples, settings.seed),
                difference=difference,
                evaluations=float(runs[i].evaluations.mean()),
                seconds=float(runs[i].seconds.mean()),
            )
        )
    return GeneratorComparison(
        rows=tuple(rows),
        reference=reference,
        n=len(ids),
        lacking=asked - len(ids),
        classes=len(facts[0].names),
        settings=settings,
        resamples=resamples,
        notes=tuple(notes_on(facts, settings)),
    )


def _difference(
    this: tuple[Measurements, dict[str, np.ndarray]],
    reference: tuple[Measurements, dict[str, np.ndarray]],
    same_space: bool,
    resamples: int,
    seed: int,
) -> Difference:
    (run, own), (other_run, other) = this, reference
    names = [name for name in FIGURES if name in own and name in other]
    if not same_space and "log_likelihood" in names:
        names.remove("log_likelihood")
    alone, reference_alone, p_value = mcnemar(
        run.index == run.truth, other_run.index == other_run.truth
    )
    paired = {name: own[name] - other[name] for name in names}
    return Difference(estimates(paired, resamples, seed), alone, reference_alone, p_value)


# -- what is given ---------------------------------------------------------------------------------


def _check_names(generators: Any, steps: Mapping[str, int] | None, reference: str | None) -> str:
    """The name of the reference."""
    if not isinstance(generators, Mapping) or not all(isinstance(n, str) for n in generators):
        raise DiveFastError(f"expected generators by their names, got {shown(generators)}.")
    if len(generators) < 2:
        raise DiveFastError(
            f"expected at least two generators to compare, got {len(generators) or 'none'}."
        )
    if unknown := [name for name in steps or {} if name not in generators]:
        raise DiveFastError(f"expected steps of generators, got one of {shown(unknown[0])}.")
    if reference is None:
        return next(iter(generators))
    if reference not in generators:
        listed = ", ".join(generators)
        raise DiveFastError(f"expected a reference of {listed}, got {shown(reference)}.")
    return reference


def _settings(probes: Any, likelihood_probes: Any, few: Any, seed: int) -> Settings:
    probes = check_count(probes)
    if likelihood_probes is not None:
        likelihood_probes = whole("likelihood_probes", likelihood_probes, FEWEST)
        if likelihood_probes % STRATUM:
            raise DiveFastError(
                f"expected likelihood_probes that {STRATUM} divides, got {likelihood_probes}."
            )
    few = None if few is None else whole("classes_per_image", few, 2)
    return Settings(probes, likelihood_probes, few, seed)


def _classifier(name: str, generator: Any) -> DiffusionClassifier:
    found = generator
    if not isinstance(generator, DiffusionClassifier) and callable(generator):
        found = generator()
    if not isinstance(found, DiffusionClassifier):
        raise DiveFastError(
            f"{name}: expected a DiffusionClassifier or what makes one, got {shown(found)}."
        )
    return found


def _folders(out: Path, names: Mapping[str, Any]) -> list[Path]:
    """A folder for each, called after it as far as every system allows."""
    found: list[Path] = []
    for name in names:
        stem = re.sub(r"[^\w.-]+", "_", name).strip("._")[:80] or "generator"
        folder, number = out / stem, 1
        while folder in found:
            number += 1
            folder = out / f"{stem}-{number}"
        found.append(folder)
    return found


# -- files -----------------------------------------------------------------------------------------


def _write(out: Path, found: GeneratorComparison) -> None:
    path = out / COMPARISON
    try:
        with replacing(path) as file:
            text = json.dumps(found.to_dict(), indent=2, allow_nan=False)
            file.write(text.encode(errors="backslashreplace") + b"\n")
    except OSError as error:
        raise cannot("written", path, error) from error
    columns = ["name", "step", "n"]
    for name in FIGURES:
        columns += [name, f"{name}_low", f"{name}_high"]
        columns += [f"{name}_difference", f"{name}_difference_low", f"{name}_difference_high"]
    columns += ["right_alone", "reference_right_alone", "mcnemar", "evaluations", "seconds", "run"]
    write_csv(out / TABLE, columns, _table(found))


def _table(found: GeneratorComparison) -> Iterator[list[Any]]:
    for row in found.rows:
        cells: list[Any] = [row.name, row.step, found.n]
        for name in FIGURES:
            differences = {} if row.difference is None else row.difference.figures
            for of in (row.figures, differences):
                cells += dataclasses.astuple(of[name]) if name in of else ("", "", "")
        if (d := row.difference) is None:
            cells += ["", "", ""]
        else:
            cells += [d.right_alone, d.reference_right_alone, d.mcnemar]
        yield [*cells, row.evaluations, row.seconds, row.run]
