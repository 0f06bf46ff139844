"""How long a report takes and how large it is, of made-up runs of many images.

    python -m bench.report --images 50000 --classes 10
    python -m bench.report --images 50000 --classes 1000

Every class was measured on every image: the longest records that there are, 60 kB each at 1,000
classes. The pictures are JPEG files of 224 x 224, one under many names. Appends to
bench/results/report.jsonl.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
from PIL import Image

from bench.records import RESULTS, append_line
from dive_fast.evaluation.machine import machine
from dive_fast.report import write_report

BODIES = 500  # different answers, which take turns
SIDE = 224


def write_run(folder: Path, n: int, classes: int, data: Path, seed: int = 0) -> int:
    """A run whose answers are drawn from a softmax of noise; returns its size in bytes."""
    rng = np.random.default_rng(seed)
    folder.mkdir()
    names = [f"class {i}" for i in range(classes)]
    config = {
        "schema": 1,
        "model": {"family": "dit", "weights": f"{seed:016x}"},
        "strategy": {"name": "enumerate"},
        "probes": 250,
        "seed": seed,
        "data": {"source": data.name, "count": n},
    }
    content = {"config": config, "environment": machine(), "records": "classification"}
    content |= {"names": names, "data": str(data)}
    (folder / "run.json").write_text(json.dumps(content))
    bodies = [_body(rng, classes, names) for _ in range(BODIES)]
    with open(folder / "results.jsonl", "w") as file:
        for i in range(n):
            truth, body = bodies[i % BODIES]
            evaluations = int(rng.integers(20, 2000))
            key = f"{names[truth]}/{i:06d}.jpg"
            file.write(f'{{"id": "{key}", "evaluations": {evaluations}, {body}\n')
    return (folder / "results.jsonl").stat().st_size


def _body(rng: np.random.Generator, classes: int, names: list[str]) -> tuple[int, str]:
    """A right class, and the rest of a record as it is written."""
    truth = int(rng.integers(classes))
    scores = rng.normal(size=classes) * 2
    scores[truth] += rng.normal(6, 3)
    log_posterior = scores - np.logaddexp.reduce(scores)
    best = np.argsort(-log_posterior)[:5].tolist()
    p = np.exp(log_posterior)
    record = {
        "truth": truth,
        "label": names[best[0]],
        "index": best[0],
        "probability": float(p[best[0]]),
        "top": [{"label": names[i], "index": i, "score": float(p[i])} for i in best],
        "log_posterior": log_posterior.tolist(),
        "losses": rng.random(classes).tolist(),
        "n_probes": [250] * classes,
        "eliminated": [],
        "log_odds_bound": (log_posterior - log_posterior.max()).tolist(),
        "seconds": 0.5,
    }
    return truth, json.dumps(record)[1:]


def write_pictures(folder: Path, run: Path) -> None:
    """The same picture under every id of a run."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (SIDE // 8, SIDE // 8, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    source = folder / "picture.jpg"
    picture.save(source, quality=90)
    made = set()
    for line in open(run / "results.jsonl"):
        key = line[8 : line.index('"', 8)]
        target = folder / "images" / key
        if target.parent not in made:
            target.parent.mkdir(parents=True, exist_ok=True)
            made.add(target.parent)
        target.hardlink_to(source)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--runs", type=int, default=1, help="how many, side by side")
    parser.add_argument("--out", type=Path, default=RESULTS / "report.jsonl")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="report-") as name:
        folder = Path(name)
        data = folder / "images"
        sizes = [
            write_run(folder / f"run-{i}", options.images, options.classes, data, i)
            for i in range(options.runs)
        ]
        write_pictures(folder, folder / "run-0")
        page = folder / "report.html"
        start, cpu = time.perf_counter(), time.process_time()
        problems = write_report([folder / f"run-{i}" for i in range(options.runs)], page)
        row = {
            "images": options.images,
            "classes": options.classes,
            "runs": options.runs,
            "results_bytes": sum(sizes),
            "seconds": round(time.perf_counter() - start, 2),
            "cpu_seconds": round(time.process_time() - cpu, 2),
            "bytes": page.stat().st_size,
            "pictures": page.read_text().count("<img "),
            "problems": problems,
            "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "command": " ".join(["python -m bench.report", *sys.argv[1:]]),
        }
    versions = {name: version(name) for name in ("jinja2", "matplotlib", "numpy", "scikit-learn")}
    append_line(options.out, row, {**machine(), **versions})
    print(json.dumps(row))


if __name__ == "__main__":
    main()
