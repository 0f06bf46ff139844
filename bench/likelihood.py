"""Bits per dimension of the held-out digits, and how well they rank the classes.

python -m bench.likelihood
python -m bench.likelihood --images 100 --probes 80
"""

from __future__ import annotations

import argparse
import json
import time

import torch

from bench.records import append
from dive_fast import DiffusionClassifier
from dive_fast.core.bound import standard_error
from dive_fast.data.digits import load_digits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=397)
    parser.add_argument("--probes", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    held_out = load_digits("test")
    images, labels = held_out.images[: args.images], torch.as_tensor(held_out.labels[: args.images])
    clf = DiffusionClassifier.from_pretrained("digits")
    start = time.perf_counter()
    settings = {"unit": "bits/dim", "probes": args.probes, "seed": args.seed}
    given = clf.log_likelihood(images, "all", **settings)
    plain = clf.log_likelihood(images, **settings)
    seconds = time.perf_counter() - start
    score, error = given.score(plain)
    right = torch.arange(len(images)), labels
    row = {"images": len(images), "probes": args.probes, "seed": args.seed}
    for name, values, draws in (
        ("right class", given.values[right], given.draws[right]),
        ("no class", plain.values[:, 0], plain.draws[:, 0]),
        ("saved", score[right], (plain.draws - given.draws)[right]),
    ):
        # The images share the probes, so their draws are averaged first.
        row[name] = {
            "bits/dim": float(values.mean()),
            "error by probes": float(standard_error(draws.mean(dim=0))),
            "error by images": float(values.std()) / len(images) ** 0.5,
        }
    wrong = score.scatter(1, labels[:, None], torch.nan)
    row |= {
        "error of one image": float(given.standard_errors.mean()),
        "error of one score": float(error.mean()),
        "right class first": float((score.argmax(dim=1) == labels).double().mean()),
        "right class above 0": float((score[right] > 0).double().mean()),
        "others above 0": float((wrong > 0).sum()) / (9 * len(images)),
        "seconds": round(seconds, 1),
    }
    print(json.dumps(row, indent=1))
    append("likelihood", row, clf)


if __name__ == "__main__":
    main()
