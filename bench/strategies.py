"""Every strategy on a zoo model, against full enumeration and the two published loops.

    python -m bench.strategies --model digits --data digits --runs runs/digits
    python -m bench.strategies --model mnist --data mnist_28px.npz --limit 500 --runs runs/mnist

All entries see the same held-out images and the same probes; K = 250 unless the name says another.
Each runs in a process of its own, so that the peak of memory is its own, and writes a run
directory below --runs: cut off and started again it goes on there (seconds are then those of all
sessions). Agreement is with the entry "enumerate". Appends one line an entry to
bench/results/strategies.jsonl; `python -m bench.plot_strategies` draws them.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiTTransformer2DModel

from bench.baselines import diffusion_classifier, dive
from bench.records import append
from dive_fast import DiffusionClassifier, zoo
from dive_fast.data import DataSet, open_dataset, select
from dive_fast.evaluation import evaluate, read_records, summarise
from dive_fast.strategies import Auto, DivePaper, Enumerate, Invert, Race, Strategy

K = 250


@dataclass(frozen=True)
class Entry:
    """A strategy with its number of probes; at most ``limit`` images where it is slow."""

    strategy: Strategy
    probes: int = K
    limit: int | None = None


ENTRIES = {
    "enumerate": Entry(Enumerate()),
    **{f"enumerate K={k}": Entry(Enumerate(), k) for k in (2, 4, 8, 16, 32, 64, 100)},
    "race": Entry(Race()),
    "race error=0.2": Entry(Race(error=0.2, min_probes=8)),
    **{f"auto {p}": Entry(Auto(min_agreement=p)) for p in (0.8, 0.9, 0.95, 0.999)},
    "auto": Entry(Auto()),
    **{f"auto K={k}": Entry(Auto(), k) for k in (16, 32, 64, 100)},
    "invert": Entry(Invert()),
    "invert K=100": Entry(Invert(), 100),
    "dive-paper": Entry(DivePaper(), limit=40),
}


def published_enumeration(transformer, x0: torch.Tensor, n_classes: int, alphas_cumprod, noises):
    """Answer and evaluations of one image by eval_prob_dit's loop."""
    errors = diffusion_classifier.eval_prob_all(
        transformer, x0, n_classes, alphas_cumprod, noises, len(alphas_cumprod) // K
    )
    return int(errors.mean(dim=1).argmin()), n_classes * K


def published_dive(transformer, x0: torch.Tensor, n_classes: int, alphas_cumprod, noises):
    """Answer and evaluations of one image by DIVE's loop."""
    found = dive.invert(
        transformer, x0, alphas_cumprod, noises, t_interval=len(alphas_cumprod) // K
    )
    return found.pred, found.n_forward + found.n_backward


BASELINES: dict[str, Callable] = {
    "published DIVE loop": published_dive,
    "published enumeration loop": published_enumeration,
}


def run_entry(name: str, options: argparse.Namespace) -> dict:
    """Classifies the images, or the rest of them, and returns the figures."""
    classifier = DiffusionClassifier.from_pretrained(options.model, batch_size=options.batch_size)
    data = open_dataset(options.data, classifier.names)
    if name in BASELINES:
        row = run_baseline(name, classifier, select(data, options.baseline_images, seed=0), options)
    else:
        entry = ENTRIES[name]
        limits = [x for x in (options.limit, entry.limit) if x is not None]
        chosen = select(data, min(limits, default=None), seed=0)
        run = options.runs / name.replace(" ", "-")
        if not options.finished_only:
            evaluate(
                classifier,
                chosen,
                run,
                strategy=entry.strategy,
                probes=entry.probes,
                progress=sys.stderr.isatty(),
            )
        mine = read_records(run)
        row = summarise(list(mine.values())).to_dict()
        if not options.finished_only and classifier.last_run.batches:
            row["fill_rate"] = classifier.last_run.fill_rate
        row |= agreement(options.runs, mine)
    # Linux counts it in KiB.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    row |= {"peak_memory_mib": round(peak), "threads": torch.get_num_threads()}
    row = {"model": options.model, "classes": len(classifier.names), "entry": name, **row}
    append(options.results, row, classifier)
    return row


def run_baseline(
    name: str, classifier: DiffusionClassifier, data: DataSet, options: argparse.Namespace
) -> dict:
    """A published loop as its script runs it: one image at a time."""
    # Our model has its embedders taken out; the loops want the network as it is.
    directory = zoo.path(options.model) if options.model in zoo.names() else Path(options.model)
    transformer = DiTTransformer2DModel.from_pretrained(directory / "transformer").eval()
    transformer.requires_grad_(False)
    shape, alphas = classifier.model.latent_shape, classifier.model.schedule.a.square()
    noises = dive.noise_table(shape)
    predictions, evaluations, seconds = {}, 0, 0.0
    for example in data.examples:
        x0 = classifier.encode([example.load()])
        start = time.perf_counter()
        found, cost = BASELINES[name](transformer, x0, len(classifier.names), alphas, noises)
        seconds += time.perf_counter() - start
        predictions[example.id], evaluations = found, evaluations + cost
    n = len(predictions)
    right = sum(predictions[e.id] == e.label for e in data.examples)
    return {
        "accuracy": right / n,
        "n": n,
        "evaluations_per_image": evaluations / n,
        "seconds_per_image": seconds / n,
        **agreement(
            options.runs,
            {e.id: {"index": predictions[e.id], "truth": e.label} for e in data.examples},
        ),
    }


def agreement(runs: Path, records: dict[str, dict]) -> dict:
    """How often images are answered as by the entry "enumerate", over those that both saw."""
    reference = runs / "enumerate" / "results.jsonl"
    full = read_records(reference.parent) if reference.exists() else {}
    both = [key for key in records if key in full]
    if not both:
        return {"agreement": None, "agreement_n": 0}

    def share(hits: list[bool]) -> float:
        return sum(hits) / len(both)

    truth = {key: records[key]["truth"] for key in both}
    return {
        "agreement": share([full[k]["index"] == records[k]["index"] for k in both]),
        "agreement_n": len(both),
        "accuracy_there": share([records[k]["index"] == truth[k] for k in both]),
        "enumerate_accuracy_there": share([full[k]["index"] == truth[k] for k in both]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="digits")
    parser.add_argument("--data", default="digits")
    parser.add_argument("--runs", type=Path, required=True, help="folder of the run directories")
    parser.add_argument("--limit", type=int, help="a random subset of N images")
    parser.add_argument("--baseline-images", type=int, default=5, help="for the published loops")
    parser.add_argument(
        "--results", default="strategies", help="name of the record; another for timings alone"
    )
    parser.add_argument(
        "--finished-only",
        action="store_true",
        help="compute nothing: the figures of what the run directories hold so far",
    )
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument(
        "--only", nargs="+", choices=[*ENTRIES, *BASELINES], metavar="ENTRY", help="not all entries"
    )
    options = parser.parse_args()
    names = options.only or [*ENTRIES, *BASELINES]
    if len(names) == 1:
        row = run_entry(names[0], options)
        print({k: v for k, v in row.items() if k != "environment"}, flush=True)
        return
    common = ["--model", options.model, "--data", options.data, "--runs", str(options.runs)]
    common += ["--batch-size", str(options.batch_size), "--results", options.results]
    common += ["--baseline-images", str(options.baseline_images)]
    common += ["--limit", str(options.limit)] if options.limit else []
    common += ["--finished-only"] if options.finished_only else []
    for name in names:
        subprocess.run(
            [sys.executable, "-m", "bench.strategies", *common, "--only", name], check=True
        )


if __name__ == "__main__":
    main()
