"""``dive-fast evaluate``: accuracy of a classifier, or the COCO numbers of a detector."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys

from dive_fast.cli.corruptions import add_corruption, chosen_corruptions, table_text
from dive_fast.cli.jobs import annotated_images, is_detection
from dive_fast.cli.loading import (
    chosen_layout_strategy,
    chosen_strategy,
    load_classifier,
    load_detector,
)
from dive_fast.cli.options import DATA, OTHER_DATA, add_log_to, add_options_of_both, add_readers
from dive_fast.cli.spread import add_ray, ray_options
from dive_fast.cli.values import count
from dive_fast.errors import DiveFastError

log = logging.getLogger(__name__)

# Images from which a fit pays for itself within a run.
WORTH_A_FIT = 200

DESCRIPTION = """\
Runs a classifier over labelled images, or a detector over annotated ones. The data say which:

  classifier  --data digits, a folder by class, an .npz or a table, wds: or hf: (docs/data.md)
              accuracy, AUROC, F1, calibration error, evaluations and seconds per image
  detector    --data scenes, or a COCO annotation file with --images
              the twelve COCO numbers, evaluations and seconds per image

RUN/run.json holds the configuration, RUN/results.jsonl one line per image, appended as they come
(docs/records.md); at the end RUN/summary.json the figures and RUN/results.csv a table of the images
(docs/runs.md). Interrupted and run again with the same options it goes on where it stopped. An
image that cannot be read is recorded with its error and the rest go on; the exit code is then 2.

A text-conditional model without --classes is asked about the names of the sub-folders, or about the
categories of the annotation file."""


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "evaluate",
        help="measure a classifier or a detector on images with known answers",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--data",
        required=True,
        metavar=f"{DATA}|scenes|FILE.json",
        help="for a classifier digits (the held-out ones), a folder with one sub-folder per class, "
        f"an .npz with images and labels (or x_test and y_test), {OTHER_DATA}; for a "
        "detector scenes (the "
        "held-out ones), or a COCO annotation file",
    )
    parser.add_argument("--out", required=True, metavar="RUN", help="the run directory")
    parser.add_argument(
        "--limit",
        type=count,
        metavar="N",
        help="a random subset of N images; of scenes and streams the first N",
    )
    parser.add_argument(
        "--shard",
        metavar="I/N|auto",
        help="only every N-th image, from the I-th on (1 to N), into a folder of RUN of its own; "
        "auto takes both from torchrun or srun. 'dive-fast merge RUN' makes one run of all",
    )
    parser.add_argument(
        "--group-by",
        action="append",
        default=[],
        metavar="COLUMN",
        help="also the figures of the images of each value of this column of the data; may be "
        "given several times",
    )
    add_readers(parser)
    parser.add_argument("--json", action="store_true", help="print the summary as a JSON object")
    add_log_to(parser)
    classifiers = add_options_of_both(parser, strategy="auto", prior=True)
    classifiers.add_argument(
        "--head",
        metavar="FILE",
        help="a head that 'dive-fast probe' wrote, from whose ranking of the classes auto starts",
    )
    add_corruption(classifiers)
    add_ray(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    evaluated = _detector if is_detection(options) else _classifier
    options.shard = _shard(options)
    try:
        summary, text = evaluated(options)
    except KeyboardInterrupt:
        log.warning("interrupted; run again to go on from %s.", options.out)
        return 130
    if options.json:
        print(json.dumps(summary.to_dict(), allow_nan=False))
    elif summary.n == 0 and options.corruption is None:
        print(f"no image could be read ({summary.failed} failed)")
    else:
        print(text(summary))
    return 2 if summary.failed else 0


def _shard(options: argparse.Namespace):
    """The shard that is asked for; its process takes a GPU of its own where there are several."""
    from dive_fast.evaluation.shards import Shard, launched

    if options.shard is None:
        if (place := launched(os.environ)) is not None and place.of > 1:
            log.warning(
                "this is process %d of %d, and each of them evaluates all images: --shard auto "
                "divides them.", place.index, place.of,
            )  # fmt: skip
        return None
    shard = Shard.read(options.shard)
    if shard.local_rank is not None and options.device is None:
        import torch

        if (gpus := torch.cuda.device_count()) > 0:
            options.device = f"cuda:{shard.local_rank % gpus}"
    return shard


def _classifier(options: argparse.Namespace):
    from dive_fast.data import folder_classes, open_dataset, select
    from dive_fast.evaluation import evaluate, evaluate_corruptions

    strategy, corruptions = chosen_strategy(options), chosen_corruptions(options)
    classes = folder_classes(options.data)
    ray = ray_options(options, load_classifier, classes)
    classifier = load_classifier(options, classes)
    data = select(open_dataset(options.data, classifier.names), options.limit, options.seed)
    _offer_fit(options, classifier, strategy, len(data.examples))
    asked = {
        "strategy": strategy,
        "probes": options.probes,
        "seed": options.seed,
        "timesteps": options.timesteps,
        "weights": options.weights,
        "head": options.head,
        "log_to": options.log_to,
        "progress": sys.stderr.isatty(),
        "shard": options.shard,
        "group_by": options.group_by,
        "ray": ray,
        "readers": options.readers,
    }
    if corruptions is not None:
        table = evaluate_corruptions(classifier, data, options.out, corruptions, **asked)
        return table, table_text
    return evaluate(classifier, data, options.out, **asked), classifier_text


def _offer_fit(options: argparse.Namespace, classifier, strategy, images: int) -> None:
    """One line where a fit would pay for itself within the run."""
    from dive_fast.core.loss_weights import digest_of
    from dive_fast.models.files.sidecar import fitted_shortlist
    from dive_fast.strategies import Auto
    from dive_fast.strategies.hunt import FEW

    plain = isinstance(strategy, Auto) and options.head is None and len(classifier.names) > FEW
    if not plain or images < WORTH_A_FIT:
        return
    model, out = classifier.model, "" if classifier.directory is not None else " --out DIR"
    if (known := fitted_shortlist(model)) is None:
        log.warning(
            "%s was never fitted: after 'dive-fast fit --model %s --unlabelled IMAGES'%s auto "
            "needs fewer evaluations.",
            model.name,
            options.model,
            f"{out}, then --fitted DIR here" if out else "",
        )
        return
    weights = classifier.learned_weights(strategy, options.probes, options.weights)
    if known.weights != digest_of(weights):
        log.warning(
            "the shortlist of %s was learned from losses of other weights and is left out: after "
            "'dive-fast fit --what shortlist'%s auto needs fewer evaluations.",
            model.name,
            out,
        )


def _detector(options: argparse.Namespace):
    if options.group_by:
        raise DiveFastError("--group-by is for classifiers, and these data are for a detector.")
    from dive_fast.evaluation import evaluate_detections
    from dive_fast.evaluation.machine import environment

    strategy = chosen_layout_strategy(options)
    with annotated_images(options, "test") as data:
        ray = ray_options(options, load_detector, data.names)
        detector = load_detector(options, data.names)
        data.tell_problems(log.warning)
        summary = evaluate_detections(
            detector,
            data,
            options.out,
            environment=environment(detector),
            log_to=options.log_to,
            progress=sys.stderr.isatty(),
            shard=options.shard,
            ray=ray,
            readers=options.readers,
            strategy=strategy,
            probes=options.probes,
            seed=options.seed,
        )
        annotated = sum(int((~image.crowd).sum()) for image in data.images) / len(data.images)
    found = summary.objects_per_image
    if found is not None and found < annotated / 2:
        log.warning(
            "%.2f objects an image were found where %.2f are annotated: dive-fast diagnose, with "
            "the same data, says whether more training, more pixels or another search would help.",
            found,
            annotated,
        )
    return summary, detector_text


def classifier_text(summary) -> str:
    """The summary, one figure a line, and the groups as tables."""
    errors = summary.standard_errors
    figures = (
        ("accuracy", "accuracy", "{:.2%}"),
        ("top-5 accuracy", "top5_accuracy", "{:.2%}"),
        ("mean per-class accuracy", "mean_per_class_accuracy", "{:.2%}"),
        ("AUROC", "auroc", "{:.4f}"),
        ("macro F1", "macro_f1", "{:.4f}"),
        ("calibration error", "expected_calibration_error", "{:.2%}"),
        ("-log p(truth), nats", "nll", "{:.4f}"),
        ("Brier score", "brier", "{:.4f}"),
    )
    lines = []
    for title, name, form in figures:
        if (value := getattr(summary, name)) is not None:
            error = f" +- {form.format(errors[name])}" if name in errors else ""
            lines.append(f"{title:25}{form.format(value)}{error}")
    lines += [
        f"images                   {summary.n}",
        f"evaluations per image    {summary.evaluations_per_image:,.0f}",
        f"seconds per image        {summary.seconds_per_image:.3f}",
    ]
    if summary.fill_rate is not None:
        lines.append(f"batches filled           {summary.fill_rate:.1%}")
    if summary.failed:
        lines.append(f"images that failed       {summary.failed}")
    return "\n".join([*lines, *map(_groups_text, summary.groups.values())])


MOST_GROUPS = 20  # that are printed; summary.json has all


def _groups_text(groups) -> str:
    """A compact table of what a column's values come to, the lowest accuracies first."""
    order = sorted(groups.figures.items(), key=lambda item: (item[1].top1, item[0]))
    shown = order[:MOST_GROUPS]
    width = max(len(groups.column), *(len(value) for value, _ in shown), 6)
    lines = ["", f"{groups.column:{width}}  images         accuracy  calibration error"]
    for value, of in shown:
        value = value or "(none)"
        accuracy = f"{of.top1:.2%} +- {of.standard_errors['top1']:.2%}"
        lines.append(f"{value:{width}}  {of.n:6}  {accuracy:>15}  {of.ece:17.2%}")
    if len(order) > len(shown):
        lines.append(f"and {len(order) - len(shown)} more in summary.json")
    return "\n".join(lines)


def detector_text(summary) -> str:
    """The summary, one figure a line."""
    lines = [
        f"{name:22} {'-' if value is None else f'{value:.3f}'}"
        for name, value in {**summary.scores, "AP_one_class": summary.ap_one_class}.items()
    ]
    lines += [
        f"images                 {summary.n}",
        f"objects per image      {summary.objects_per_image:.2f}",
        f"evaluations per image  {summary.evaluations_per_image:,.0f}",
        f"seconds per image      {summary.seconds_per_image:.3f}",
    ]
    if summary.failed:
        lines.append(f"images that failed     {summary.failed}")
    return "\n".join(lines)
