"""What ``dive-fast explain`` asks for many images, and the files that come of it."""

from __future__ import annotations

import json
import logging
import math
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

if TYPE_CHECKING:  # torch is not loaded for the help
    from dive_fast.predict.classifier import DiffusionClassifier
    from dive_fast.predict.explaining import NoOtherClass
    from dive_fast.predict.explanation import Explanation

log = logging.getLogger(__name__)

MOST_AT_ONCE = 32  # images, of which a kill loses the maps
MAPS = ("difference", "standard_error")


@dataclass(frozen=True)
class MapSearch:
    """Maps of many images, several at once, so that the engine's batches are full.

    Attributes:
        a, b: rows of the classes; None for the answer and the runner-up of each image.
        probes: of the map; the strategy's choice if None.
        asked: strategy, seed and timesteps.
    """

    classifier: DiffusionClassifier
    a: int | None
    b: int | None
    probes: int | None
    asked: Mapping[str, Any]

    def stream(
        self, images: Iterable[tuple[str, Any]]
    ) -> Iterator[tuple[str, Explanation | NoOtherClass]]:
        """Of every (path, picture) the path and its map, or why there is nothing to compare."""
        probes = len(self.classifier.probe_list(probes=self.probes, **self.asked))
        at_once = min(MOST_AT_ONCE, math.ceil(2 * self.classifier.batch_size / probes))
        images = iter(images)
        while some := dict(islice(images, at_once)):
            yield from self._of(some)

    def _of(self, pictures: Mapping[str, Any]) -> Iterator[tuple[str, Explanation | NoOtherClass]]:
        from dive_fast.predict.explaining import NoOtherClass, completed

        pairs: dict[str, tuple[int | None, int | None]] = dict.fromkeys(pictures, (self.a, self.b))
        if None in (self.a, self.b):
            # One that has nothing to be compared with shall not stop the others.
            answers = self.classifier(list(pictures.values()), **self.asked)
            for path, found in zip(pictures, answers, strict=True):
                vocabulary = self.classifier.model.vocabulary
                try:
                    pairs[path] = completed(found, self.a, self.b, vocabulary)
                except NoOtherClass as error:
                    del pairs[path]
                    yield path, error
        if pairs:
            first, second = (list(rows) for rows in zip(*pairs.values(), strict=True))
            chosen = [pictures[path] for path in pairs]
            found = self.classifier.explain(chosen, first, second, probes=self.probes, **self.asked)
            yield from zip(pairs, found, strict=True)


class MapFiles:
    """The files of maps in a run directory.

    Args:
        out: the directory.
        done: the records that it holds.
    """

    def __init__(self, out: Path, done: Mapping[str, Mapping[str, Any]]) -> None:
        self.out = out
        self.taken = {done[path].get("drawn") for path in done}

    def add(self, path: str, found: Explanation | NoOtherClass, picture: Any) -> dict[str, Any]:
        """Draws a map and keeps its numbers; prints a line, and returns what the record says."""
        import numpy as np
        from tqdm import tqdm

        from dive_fast.core.files import replacing
        from dive_fast.errors import DiveFastError
        from dive_fast.evaluation.run import sentence

        if isinstance(found, DiveFastError):
            log.warning(sentence(path, found))
            return {"error": str(found)}
        target = self._free(f"{Path(path).stem}-{found.a}-{found.b}")
        found.image().save(target)
        with replacing(target.with_suffix(".npz")) as file:
            np.savez(file, **{name: getattr(found, name).numpy() for name in MAPS})
        sure, signs = found.significant(), found.smoothed()[0]
        shares = [(sure & (sign * signs > 0)).double().mean().item() for sign in (1, -1)]
        error = found.gap_standard_error
        text = (
            f"{path}: {found.a} rather than {found.b}: {found.gap:+.3g} +- {error:.2g}; "
            f"{found.a} on {shares[0]:.0%} of the places, {found.b} on {shares[1]:.0%}; {target}"
        )
        tqdm.write(text, file=sys.stdout)  # above the progress bar, if there is one
        return {
            "a": found.a,
            "b": found.b,
            "gap": found.gap,
            "gap_standard_error": error if math.isfinite(error) else None,
            "significant_for_a": shares[0],
            "significant_for_b": shares[1],
            "n_probes": found.n_probes,
            "evaluations": found.evaluations,
            "drawn": target.name,
        }

    def write_all(
        self, config: Mapping[str, Any], records: Mapping[str, Mapping[str, Any]]
    ) -> None:
        """Writes ``maps.json`` and ``maps.npz`` of the records' images, if there are any maps.

        Raises:
            RunError: the numbers of a map are gone.
        """
        import numpy as np

        from dive_fast.core.files import replacing

        rows = [record for record in records.values() if "error" not in record]
        if not rows:
            return
        maps = [self._numbers(record["drawn"]) for record in rows]
        failed = {path: r["error"] for path, r in records.items() if "error" in r}
        content = {"config": config, "maps": rows, "failed": failed}
        with replacing(self.out / "maps.json") as file:
            file.write(json.dumps(content, indent=2, allow_nan=False).encode() + b"\n")
        with replacing(self.out / "maps.npz") as file:
            np.savez(file, **{name: np.stack([one[name] for one in maps]) for name in MAPS})

    def _numbers(self, drawn: str) -> dict[str, Any]:
        import numpy as np

        from dive_fast.errors import RunError

        path = (self.out / drawn).with_suffix(".npz")
        try:
            with np.load(path) as file:
                return {name: file[name] for name in MAPS}
        except (OSError, EOFError, ValueError, KeyError, BadZipFile) as error:
            raise RunError(
                f"{path}: expected the numbers of a map, got none or damaged ones; choose another "
                "--out."
            ) from error

    def _free(self, name: str) -> Path:
        """A file that no other image has; only what every system allows in names."""
        stem, number = re.sub(r"[^\w.-]+", "_", name)[:100], 1
        target = f"{stem}.png"
        while target in self.taken:
            number += 1
            target = f"{stem}-{number}.png"
        self.taken.add(target)
        return self.out / target
