"""``dive-fast explain``: where one class explains each image better than another."""

from __future__ import annotations

import argparse
import json
import logging
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dive_fast.cli.loading import chosen_strategy, load_classifier
from dive_fast.cli.options import add_classifier_options, add_images

if TYPE_CHECKING:  # torch is not loaded for the help
    from dive_fast.predict.classifier import DiffusionClassifier
    from dive_fast.predict.explanation import Explanation

log = logging.getLogger(__name__)

DESCRIPTION = """\
Draws over each image where class A explains it better (red) and where B does (blue): the loss of
B less that of A before the mean over the places. Places within two standard errors stay grey.

DIR gets one PNG per image, maps.json (classes, mean difference and its standard error, what the
map cost) and maps.npz (difference and standard_error, float32 [N, h, w] in the model's own space,
in the order of maps.json). Files of an earlier call are replaced. An image that cannot be read is
told, and the rest go on; the exit code is then 2."""


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "explain",
        help="draw where one class explains images better than another",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_images(parser)
    parser.add_argument("--out", required=True, metavar="DIR", help="where the maps go")
    parser.add_argument(
        "--class",
        dest="a",
        metavar="A",
        help="a class by its name, or its row (default: the answer for each image)",
    )
    parser.add_argument(
        "--against", dest="b", metavar="B", help="another (default: the runner-up for each image)"
    )
    add_classifier_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from dive_fast.data.paths import expand_inputs
    from dive_fast.errors import ImageError
    from dive_fast.predict.explaining import NoOtherClass, check_pair

    strategy = chosen_strategy(options)
    asked = {"strategy": strategy, "probes": options.probes, "seed": options.seed}
    asked |= {"timesteps": options.timesteps, "weights": options.weights}
    out = Path(options.out)
    _check_folder(out)
    errors = dict(expand_inputs(options.images))
    classifier = load_classifier(options)
    a, b = (_row(text, classifier.names) for text in (options.a, options.b))
    if a is not None and b is not None:
        check_pair(a, b, classifier.model.vocabulary)
    written = _Written(out, {**classifier.identity(**asked), "a": options.a, "b": options.b})
    try:
        for path, error in errors.items():
            try:
                picture = _read(path, error, classifier)
                (found,) = classifier.explain(picture, a, b, **asked)
            except (ImageError, NoOtherClass) as error:
                written.fail(path, str(error))
            else:
                print(written.add(path, found), flush=True)
    finally:
        written.close()
    return 2 if written.failed else 0


def _check_folder(out: Path) -> None:
    """That maps can go there; a misspelt name should not wait for a large model to load.

    Raises:
        RunError: it is a file.
    """
    from dive_fast.errors import RunError

    if out.exists() and not out.is_dir():
        raise RunError(f"{out}: expected a directory, got a file.")


def _read(path: str, error: Any, classifier: DiffusionClassifier) -> Any:
    """The image as the model sees it.

    Raises:
        ImageError: it cannot be read, or is no such image.
    """
    from dive_fast.data.images import center_crop, to_mode
    from dive_fast.data.reading import read_found

    channels, size, _ = classifier.model.image_shape
    return center_crop(to_mode(read_found(path, error), channels), size)


def _row(text: str | None, names: tuple[str, ...]) -> int | None:
    """The row of a class: of its name, else the number that it is.

    Raises:
        DiveFastError: there is none.
    """
    from dive_fast.predict.explaining import class_row

    if text is None:
        return None
    is_number = text not in names and re.fullmatch(r"[0-9]{1,18}", text)
    return class_row(int(text) if is_number else text, names)


class _Written:
    """The files of one call.

    Args:
        out: the folder, which is made for the first map.
        config: what decides the maps, for JSON.
    """

    def __init__(self, out: Path, config: dict[str, Any]) -> None:
        self.out, self.config = out, config
        self.rows: list[dict[str, Any]] = []
        self.maps: dict[str, list[Any]] = {"difference": [], "standard_error": []}
        self.failed: dict[str, str] = {}

    def fail(self, path: str, error: str) -> None:
        from dive_fast.evaluation.run import sentence

        self.failed[path] = error
        log.warning(sentence(path, error))

    def add(self, path: str, found: Explanation) -> str:
        """Draws a map; returns a line on it."""
        target = self._free(f"{Path(path).stem}-{found.a}-{found.b}")
        self.out.mkdir(parents=True, exist_ok=True)
        found.image().save(target)
        sure, signs = found.significant(), found.smoothed()[0]
        shares = [(sure & (sign * signs > 0)).double().mean().item() for sign in (1, -1)]
        error = found.gap_standard_error
        for name, maps in self.maps.items():  # and not the groups of probes behind them
            maps.append(getattr(found, name).numpy())
        self.rows.append(
            {
                "id": path,
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
        )
        return (
            f"{path}: {found.a} rather than {found.b}: {found.gap:+.3g} +- {error:.2g}; "
            f"{found.a} on {shares[0]:.0%} of the places, {found.b} on {shares[1]:.0%}; {target}"
        )

    def close(self) -> None:
        """Writes the numbers, if there are any."""
        import numpy as np

        from dive_fast.core.files import replacing

        if not self.rows:
            return
        content = {"config": self.config, "maps": self.rows, "failed": self.failed}
        with replacing(self.out / "maps.json") as file:
            file.write(json.dumps(content, indent=2, allow_nan=False).encode() + b"\n")
        with replacing(self.out / "maps.npz") as file:
            np.savez(file, **{name: np.stack(maps) for name, maps in self.maps.items()})

    def _free(self, name: str) -> Path:
        """A file that no other image of this call has; only what every system allows in names."""
        stem, number = re.sub(r"[^\w.-]+", "_", name)[:100], 1
        taken = {row["drawn"] for row in self.rows}
        target = f"{stem}.png"
        while target in taken:
            number += 1
            target = f"{stem}-{number}.png"
        return self.out / target
