"""Bits per dimension of the held-out digits, and how well they rank the classes.

python -m bench.likelihood
python -m bench.likelihood --images 100 --probes 80
"""

from __future__ import annotations

import argparse
import time

import torch

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
    for name, values, draws in (
        ("right class", given.values[right], given.draws[right]),
        ("no class", plain.values[:, 0], plain.draws[:, 0]),
        ("saved by the right class", score[right], (plain.draws - given.draws)[right]),
    ):
        # The images share the probes, so their draws are averaged first.
        noise = float(standard_error(draws.mean(dim=0)))
        images_error = float(values.std()) / len(images) ** 0.5
        print(f"{name}: {values.mean():.3f} +- {noise:.3f} (probes) +- {images_error:.3f} (images)")
    print(
        f"standard error of one image: {given.standard_errors.mean():.3f}, score {error.mean():.3f}"
    )
    best = score.argmax(dim=1)
    positive = (score[right] > 0).double().mean()
    wrong = score.scatter(1, labels[:, None], torch.nan)
    print(f"right class first: {(best == labels).double().mean():.4f}")
    others = float((wrong > 0).sum()) / (9 * len(images))
    print(f"score above 0: right class {positive:.4f}, others {others:.4f}")
    print(f"{len(images)} images, {args.probes} probes, {seconds:.0f} s")


if __name__ == "__main__":
    main()
