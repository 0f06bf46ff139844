"""What each part of `auto` is worth: the same images with one part left out at a time.

    python -m bench.auto_ablation --model digits --limit 60
    python -m bench.auto_ablation --model mnist --data mnist_28px.npz --limit 60

On moved training images, from losses that are measured once (all classes on 24 probes, the best 16
on 100) and replayed; agreement is with enumeration over the same 100 probes. The row "without
pairs" has a list of its own, with a noise for every probe. The rows "differences" say how the
losses of the best classes part on either list. Appends to bench/results/auto_ablation.jsonl.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from bench.pictures import moved_pictures
from bench.records import append
from dive_fast import DiffusionClassifier
from dive_fast.core.probes import ProbeList, low_discrepancy_probes
from dive_fast.core.shortlist import digest, estimate_shortlist
from dive_fast.data.mnist import load_mnist
from dive_fast.predict.checking import Measured, checks
from dive_fast.predict.fitting_shortlist import measured, survey_of
from dive_fast.strategies import evidence, hunt
from dive_fast.training.dit import MNIST, augment_images

K, FIRST, BLOCKS = 100, 24, (2, 4, 8, 16)
PARTS: dict[str, dict[tuple[Any, str], Any]] = {
    "all": {},
    "without the control variate": {(evidence, "CONTROL"): 0.0, (evidence, "HIGHEST"): 0.0},
    "own variances only": {(evidence, "PRIOR_UNITS"): 0.5},
    "one level for near ties and clear cases": {(hunt, "GAMMA"): 0.0},
    "one level for measured and unmeasured": {(hunt, "ENTRY"): (1.0, 1.0)},
}


def pictures(model: str, data: Path | None, limit: int) -> torch.Tensor:
    """x0 of moved training images."""
    if model != "mnist":
        return moved_pictures(model, data, limit)[0]
    train, generator = load_mnist(data, "train"), torch.Generator().manual_seed(1)
    pick = torch.randperm(len(train.images), generator=generator)[:limit]
    x0 = torch.from_numpy(train.images[pick.numpy()]).float().div(127.5).sub(1).unsqueeze(1)
    x0 = augment_images(x0, dataclasses.replace(MNIST, augment=1.0), generator)
    return F.avg_pool2d(x0, x0.shape[-1] // MNIST.sample_size)


def probe_lists(classifier: DiffusionClassifier) -> dict[str, ProbeList]:
    """With pairs of noises, and with the same timesteps but a noise for every probe."""
    model = classifier.model
    learned = getattr(model, "timesteps", None)
    n, shape = len(model.schedule), model.latent_shape
    pairs = low_discrepancy_probes(K, n, shape) if learned is None else learned.probes(K, shape, 0)
    plain = low_discrepancy_probes(K, n, shape, antithetic=False)
    single = dataclasses.replace(pairs, noise=plain.noise, unit=1)
    return {"pairs": pairs, "single": single}


@contextmanager
def changed(values: dict[tuple[Any, str], Any]) -> Iterator[None]:
    """Constants of the strategy, set for a while."""
    before = {key: getattr(*key) for key in values}
    for (module, name), value in values.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for (module, name), value in before.items():
            setattr(module, name, value)


def differences(images: list[Measured]) -> dict[str, Any]:
    """How l_c - l_b of the best class b and its 4 nearest rivals behaves, over all images.

    The variance of its mean over n probes, between blocks of n, and its correlation between the
    units of an image with what the gradient expects of it: the median, of the nearest rival.
    """
    losses = torch.stack([image.losses for image in images]).double()
    order = losses.mean(dim=2).argsort(dim=1)[:, :5]
    near = losses.gather(1, order[:, :, None].expand(-1, -1, losses.shape[2]))
    difference = near[:, 1:] - near[:, :1]
    sizes = [n for n in BLOCKS if 2 * n <= difference.shape[2]]
    blocks = {n: difference.unfold(2, n, n).mean(dim=3).var(dim=2) for n in sizes}
    expected = torch.stack([image.slopes for image in images]).double()
    expected = expected.gather(1, order[:, :2, None].expand(-1, -1, expected.shape[2]))
    expected = expected[:, 1] - expected[:, 0]
    unit = len(images[0].base) // expected.shape[1]
    found = difference[:, 0, : len(images[0].base)].unfold(1, unit, unit).mean(dim=2)
    correlations = [
        torch.corrcoef(torch.stack(both))[0, 1].item() for both in zip(found, expected, strict=True)
    ]
    return {
        "variance": {n: value.mean().item() for n, value in blocks.items()},
        "correlation": torch.tensor(correlations).median().item(),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="digits")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--limit", type=int, default=60)
    parser.add_argument("--level", type=float, default=0.95)
    options = parser.parse_args(argv)
    classifier = DiffusionClassifier.from_pretrained(options.model)
    x0 = pictures(options.model, options.data, options.limit)

    def write(row: dict[str, Any]) -> None:
        row = {"model": options.model, **row}
        append("auto_ablation", row, classifier)
        print(row, flush=True)

    names = digest(classifier.names)
    for kind, probes in probe_lists(classifier).items():
        images = measured(classifier, x0, probes, FIRST)
        fits = estimate_shortlist(survey_of(images), names)[1]
        for part, values in PARTS.items() if kind == "pairs" else [("without pairs", {})]:
            for fitted in (True, False):
                chosen = fits if fitted else [None] * len(fits)
                if part == "without the control variate" and fitted:
                    chosen = [dataclasses.replace(fit, control=0.0) for fit in fits]
                with changed(values):
                    (found,) = checks(images, chosen, probes, [options.level])
                row = {"part": part, "fitted": fitted, **dataclasses.asdict(found)}
                write({**row, "agreement": 1 - found.wrong / found.images})
        write({"part": f"differences, {kind}", "images": len(x0), **differences(images)})


if __name__ == "__main__":
    main()
