"""How well a model of classes segments pictures that are put together of two halves.

    python -m bench.segmentation_halves --data mnist_28px.npz --limit 150

The pictures are those of ``bench.explain``: the left half of a test image of class a beside the
right half of one of class b. A place of ink (above half of white) should be given the class of its
half; dark places are not judged. Once the two classes are told, once all ten compete. Nothing is
fitted; ``--fit`` prints what a fit to pictures of training images would find. Appends to
bench/results/segmentation.jsonl.
"""

from __future__ import annotations

import argparse
import json

import numpy as np
import torch

from bench.explain import halves
from bench.records import append
from dive_fast import DiffusionClassifier
from dive_fast.data.mnist import load_mnist
from dive_fast.predict.fitting_segmentation import Annotated, fit_rule

TRAINING = 100  # pictures that the rule is fitted to
UNKNOWN = -1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="MNIST's file")
    parser.add_argument("--limit", type=int, default=150, help="pictures")
    parser.add_argument("--all-limit", type=int, default=40, help="of them where all compete")
    parser.add_argument("--probes", type=int, default=64)
    parser.add_argument("--fit", action="store_true", help="print a fit, and measure nothing")
    options = parser.parse_args()
    classifier = DiffusionClassifier.from_pretrained("mnist")
    if options.fit:
        print(_fit(classifier, options))
        return
    test = load_mnist(options.data, "test")
    images, pairs = halves(test.images, test.labels, options.limit)
    truth = masks(images, pairs)
    for told in (True, False):
        n = len(images) if told else min(options.all_limit, len(images))
        found = _labels(classifier, images[:n], pairs, told, options.probes)
        row = {
            "method": "error maps of classes, nothing fitted",
            "data": "halves of mnist",
            "classes": "the two" if told else "all ten",
            "pictures": n,
            "probes": options.probes,
            **figures(found, truth[:n]),
        }
        print(json.dumps(row))
        append("segmentation", row, classifier)


def masks(images: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """The class of each place with ink, int64 [N, h, w]; -1 elsewhere."""
    middle = images.shape[2] // 2
    truth = np.repeat(pairs[:, :1, None], images.shape[1], axis=1).repeat(images.shape[2], axis=2)
    truth[:, :, middle:] = pairs[:, 1, None, None]
    return np.where(images > 127, truth, UNKNOWN)


def _fit(classifier: DiffusionClassifier, options: argparse.Namespace):
    """The rule of two classes: of every picture its own."""
    train = load_mnist(options.data, "train")
    images, pairs = halves(train.images, train.labels, TRAINING)
    annotated, beta = [], classifier.model.inverse_temperature
    for image, pair, mask in zip(images, pairs, masks(images, pairs), strict=True):
        maps = classifier.error_maps(image, pair.tolist(), probes=options.probes)[0]
        rows = np.select([mask == pair[0], mask == pair[1]], [0, 1], UNKNOWN)
        annotated.append(Annotated.of(-maps, torch.from_numpy(rows)))
    return fit_rule(annotated, classifier._rule(None, beta), background=False)


def _labels(classifier, images, pairs, told: bool, probes: int) -> np.ndarray:
    """The class of every place, int64 [N, h, w]."""
    if not told:
        found = classifier.segment(list(images), probes=probes)
        return np.stack([one.labels.numpy() for one in found])
    labels = []
    for image, pair in zip(images, pairs, strict=False):
        (one,) = classifier.segment(image, pair.tolist(), probes=probes)
        labels.append(pair[one.labels.numpy()])
    return np.stack(labels)


def figures(labels: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Share of the ink that is right, its standard error between pictures, and mIoU."""
    known = truth != UNKNOWN
    right = (labels == truth) & known
    each = right.sum(axis=(1, 2)) / known.sum(axis=(1, 2))
    ious = []
    for c in np.unique(truth[known]):
        said, true = (labels == c) & known, truth == c
        ious.append((said & true).sum() / (said | true).sum())
    return {
        "ink_right": float(right.sum() / known.sum()),
        "error": float(each.std() / len(each) ** 0.5),
        "miou": float(np.mean(ious)),
    }


if __name__ == "__main__":
    main()
