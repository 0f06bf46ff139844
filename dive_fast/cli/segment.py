"""``dive-fast segment``: which class each place of each image shows."""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dive_fast.cli.loading import (
    chosen_layout_strategy,
    class_names,
    load_classifier,
    load_detector,
    model_source,
)
from dive_fast.cli.options import add_images, add_segmenter_options

if TYPE_CHECKING:  # torch is not loaded for the help
    from dive_fast.predict.segmentation import Segmentation

DESCRIPTION = """\
Says for every place of an image which class it shows: by error maps of the classes, or, under a
layout-to-image model, of the objects that are found first, each against the layout without it.

DIR/run.json holds the configuration, DIR/results.jsonl one line per image, appended as they come
(the share of the places of each class, and the names of its files), DIR/labels/ the label maps
(PNG with a palette; values are rows of "classes"), DIR/overlays/ them over the images, and with
--posterior DIR/posteriors/ the probabilities (npz, float32 [C, h, w]). Interrupted and run again
with the same options it goes on where it stopped. An image that cannot be read is recorded with
its error, is read again next time, and the rest go on; the exit code is then 2."""

OF_CLASSIFIERS = (
    *("background", "timesteps", "weights", "timestep_embedding", "average", "lora", "lora_scale"),
    "prediction_type",
)
OF_DETECTORS = ("prior", "prior_weight", "strategy")


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "segment",
        help="say which class each place of images shows",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_images(parser)
    parser.add_argument("--out", required=True, metavar="DIR", help="where the results go")
    parser.add_argument(
        "--posterior", action="store_true", help="write the probabilities of all classes, too"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON list instead of lines")
    add_segmenter_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from dive_fast.data.images import read_image, to_mode
    from dive_fast.data.paths import expand_inputs
    from dive_fast.evaluation import RunDirectory
    from dive_fast.evaluation.machine import environment
    from dive_fast.evaluation.run import Source, run_over

    # Misspelt names should not wait for a large model to load.
    errors = dict(expand_inputs(options.images))
    predictor, stream, config = _prepared(options)

    def image(path: str) -> Any:
        if (error := errors[path]) is not None:
            raise error
        return to_mode(read_image(path), 3)

    config = {**config, "posterior": options.posterior}
    with RunDirectory.open(options.out, config, environment(predictor)) as results:
        run_over(
            [Source(path, partial(image, path), name=path) for path in errors],
            stream,
            results,
            progress=sys.stderr.isatty(),
            record=partial(_record, results.path, options.posterior),
        )
        done = results.done()
        records = [done[path] for path in errors]
    if options.json:
        print(json.dumps(records, indent=2, allow_nan=False))
    good = [record for record in records if "error" not in record]
    for record in good if not options.json else ():
        print(f"{record['id']}: {_line(record)}")
    return 0 if len(good) == len(records) else 2


def _prepared(options: argparse.Namespace) -> tuple[Any, Any, dict[str, Any]]:
    """The predictor, its stream with all that was asked, and what decides the answers.

    Raises:
        DiveFastError: an option of the other kind of model, or as the predictor.
    """
    from dive_fast.predict.segmenting import PROBES
    from dive_fast.predict.segmenting_layouts import MAP_PROBES

    source = model_source(options)
    _refuse_others(options, source.finds_objects)
    common = {"probes": options.probes, "seed": options.seed}
    if source.finds_objects:
        asked = {**common, "strategy": chosen_layout_strategy(options)}
        detector = load_detector(options)
        stream = partial(detector.segment_stream, **asked)
        config = _config(detector, detector.identity(**asked))
        return detector, stream, {**config, "map_probes": MAP_PROBES}
    classes = None
    if options.classes is not None and not source.family.text:
        # Of a model that has its classes, --classes names those that compete.
        classes, options.classes = list(class_names(options.classes)), None
    classifier = load_classifier(options)
    asked = {name: getattr(options, name) for name in ("timesteps", "weights", "seed")}
    asked["probes"] = PROBES if options.probes is None else options.probes
    more = {"classes": classes, "background": bool(options.background)}
    stream = partial(classifier.segment_stream, **asked, **more)
    return classifier, stream, {**_config(classifier, classifier.identity(**asked)), **more}


def _config(predictor: Any, identity: dict[str, Any]) -> dict[str, Any]:
    from dive_fast.models.protocol import optional

    rule = optional(predictor.model, "segmentation")
    return {**identity, "rule": None if rule is None else rule.to_dict()}


def _refuse_others(options: argparse.Namespace, finds_objects: bool) -> None:
    from dive_fast.errors import DiveFastError

    mine, other = ("layouts", "classes") if finds_objects else ("classes", "layouts")
    for name in OF_CLASSIFIERS if finds_objects else OF_DETECTORS:
        if getattr(options, name) is not None:
            option = name.replace("_", "-")
            raise DiveFastError(
                f"--{option} is for models of {other}; {options.model} is one of {mine}."
            )
    if options.set and not finds_objects:
        raise DiveFastError(f"--set is for models of layouts; {options.model} is one of classes.")


def _record(
    out: Path, posterior: bool, path: str, found: Segmentation, image: Any
) -> dict[str, Any]:
    """Writes the files of an image under a name that is still free; their names and the areas."""
    import numpy as np

    from dive_fast.core.files import replacing

    folders = ["labels", "overlays", *(["posteriors"] if posterior else [])]
    for folder in folders:
        (out / folder).mkdir(exist_ok=True)
    stem, number = Path(path).stem, 1
    name = stem
    while (out / "labels" / f"{name}.png").exists():
        number += 1
        name = f"{stem}-{number}"
    found.draw().save(out / "overlays" / f"{name}.png")
    record = {**found.to_dict(), "overlay": f"overlays/{name}.png"}
    if posterior:
        record["posterior"] = f"posteriors/{name}.npz"
        with replacing(out / record["posterior"]) as file:
            np.savez_compressed(
                file, posterior=found.posterior.numpy(), classes=np.array(found.names, dtype=str)
            )
    # Last, since its name marks the others as taken.
    record["label_map"] = f"labels/{name}.png"
    found.label_image().save(out / record["label_map"])
    return record


def _line(record: dict[str, Any]) -> str:
    areas = sorted(record["areas"].items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {share:.1%}" for name, share in areas if share > 0)
