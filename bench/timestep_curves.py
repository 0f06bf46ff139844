"""Accuracy against number of probes, with uniform and with learned timesteps.

    python -m bench.timestep_curves --model digits --data digits
    python -m bench.timestep_curves --draw timesteps.png

Timesteps are learned twice, from labelled training images and from images that the model generates
itself. Accuracy is of enumeration on the first k probes, on held-out images; agreement is with
enumeration on 250 uniform probes of another seed. Appends to bench/results/timestep_curves.jsonl;
`--draw` only reads the last record there.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from dive_fast import DiffusionClassifier
from dive_fast.core.probes import low_discrepancy_probes
from dive_fast.data import load_all, open_dataset, select
from dive_fast.evaluation.machine import environment

RESULTS = Path(__file__).parent / "results" / "timestep_curves.jsonl"
COUNTS = (1, 2, 4, 8, 16, 32, 64, 100)
REFERENCE_PROBES = 250
REFERENCE_SEED = 1


def measure(options: argparse.Namespace) -> dict:
    """One record: fits on the training part, then measures the held-out part."""
    classifier = DiffusionClassifier.from_pretrained(options.model)
    held_out = select(open_dataset(options.data, classifier.names), options.limit, seed=0)
    training = open_dataset(options.train or options.data, classifier.names, part="train")
    training = select(training, options.fit_images, seed=0)
    progress = sys.stderr.isatty()
    learned = {
        "labelled": classifier.fit_timesteps(*load_all(training), progress=progress),
        "generated": classifier.fit_timesteps(generate=options.generate, progress=progress),
    }
    images, labels = load_all(held_out)
    x0, labels = classifier.encode(images), torch.from_numpy(labels)
    shape, n_timesteps = classifier.model.latent_shape, len(classifier.model.schedule)
    k = max(COUNTS)

    def answers(probes, counts: tuple[int, ...]) -> list[torch.Tensor]:
        losses = classifier.losses(latents=x0, probes=probes, progress=progress)
        return [losses[:, :, :n].mean(dim=2).argmin(dim=1) for n in counts]

    reference_list = low_discrepancy_probes(REFERENCE_PROBES, n_timesteps, shape, REFERENCE_SEED)
    (reference,) = answers(reference_list, (REFERENCE_PROBES,))
    curves = []
    for seed in range(options.seeds):
        seed = seed if seed < REFERENCE_SEED else seed + 1
        lists = {"uniform": low_discrepancy_probes(k, n_timesteps, shape, seed)}
        lists |= {name: weights.probes(k, shape, seed) for name, weights in learned.items()}
        for name, probes in lists.items():
            for count, found in zip(COUNTS, answers(probes, COUNTS), strict=True):
                curves.append(
                    {
                        "timesteps": name,
                        "seed": seed,
                        "probes": count,
                        "accuracy": _share(found == labels),
                        "agreement": _share(found == reference),
                    }
                )
    return {
        "model": options.model,
        "data": held_out.identity(),
        "fitted_on": training.identity(),
        "generated": options.generate,
        "reference_accuracy": _share(reference == labels),
        "learned": {name: weights.to_dict() for name, weights in learned.items()},
        "curves": curves,
        "environment": environment(classifier),
    }


def _share(hits: torch.Tensor) -> float:
    return hits.double().mean().item()


def by_name(record: dict, figure: str) -> dict[str, list[float]]:
    """One list over the numbers of probes for each kind of timesteps, the mean over the seeds."""
    found: dict[str, dict[int, list[float]]] = {}
    for row in record["curves"]:
        counts = found.setdefault(row["timesteps"], {})
        counts.setdefault(row["probes"], []).append(row[figure])
    return {
        name: [sum(counts[k]) / len(counts[k]) for k in COUNTS] for name, counts in found.items()
    }


def table(record: dict) -> str:
    """A Markdown table: accuracy and, in brackets, agreement with the reference."""
    accuracy, agreement = by_name(record, "accuracy"), by_name(record, "agreement")
    lines = [
        f"{record['model']}, {record['data']['count']} held-out images, timesteps learned from "
        f"{record['fitted_on']['count']} labelled or {record['generated']} generated ones; "
        f"enumeration on {REFERENCE_PROBES} probes: {record['reference_accuracy']:.1%}",
        "",
        f"| probes | {' | '.join(accuracy)} |",
        f"|---|{'---|' * len(accuracy)}",
    ]
    for i, count in enumerate(COUNTS):
        cells = [f"{accuracy[name][i]:.1%} ({agreement[name][i]:.1%})" for name in accuracy]
        lines.append(f"| {count} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(record: dict, path: Path) -> None:
    """Accuracy over the number of probes, and the learned density."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    accuracy = by_name(record, "accuracy")
    colours = {name: f"C{i}" for i, name in enumerate(accuracy)}
    for name, values in accuracy.items():
        percent = [100 * value for value in values]
        left.plot(COUNTS, percent, marker="o", label=name, color=colours[name])
    left.set_xscale("log", base=2)
    left.set_xlabel("probes")
    left.set_ylabel("accuracy, %")
    left.legend()
    for name, weights in record["learned"].items():
        density = weights["density"]
        edges = [weights["n_timesteps"] * b / len(density) for b in range(len(density) + 1)]
        right.stairs(density, edges, label=name, color=colours[name])
    right.axhline(1, color=colours["uniform"])
    right.set_xlabel("timestep")
    right.set_ylabel("probes, relative to uniform")
    right.legend()
    figure.suptitle(f"{record['model']}, {record['data']['count']} held-out images")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="digits")
    parser.add_argument("--data", default="digits", help="digits, a folder or an .npz")
    parser.add_argument("--train", help="training images (default: the training part of --data)")
    parser.add_argument("--limit", type=int, help="held-out images (default: all)")
    parser.add_argument("--fit-images", type=int, default=200, help="(default: 200)")
    parser.add_argument("--generate", type=int, default=200, help="(default: 200)")
    parser.add_argument("--seeds", type=int, default=1, help="lists of probes (default: 1)")
    parser.add_argument("--draw", type=Path, metavar="FILE", help="draw the last record, no run")
    options = parser.parse_args()
    if options.draw is not None:
        draw(json.loads(RESULTS.read_text(encoding="utf-8").splitlines()[-1]), options.draw)
        return
    record = measure(options)
    RESULTS.parent.mkdir(exist_ok=True)
    with open(RESULTS, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    print(table(record))


if __name__ == "__main__":
    main()
