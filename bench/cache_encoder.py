"""Cache level "encoder" against its refresh interval, on moved training images.

    python -m bench.cache_encoder --limit 100
    python -m bench.cache_encoder --model omniglot --data omniglot242_32px.npz --limit 48

The searches: `invert`; `adamw`, a plain AdamW loop on 25 probes (the published loop, its K being
one batch, so that every step asks for the same probes); `paper`, the published loop at K = 100,
where a probe comes back once in 4 steps (slow). Refresh 1 is level "exact"; agreement is with level
"off" of the same search. Evaluations count every row as a whole forward or backward, whatever was
reused. Appends to bench/results/cache_encoder.jsonl.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from bench import records
from bench.pictures import MODELS, moved_pictures
from dive_fast import DiffusionClassifier
from dive_fast.engine import EngineOptions
from dive_fast.strategies import DivePaper, Invert

# title, strategy, its probes
SEARCHES = {
    "invert": ("invert", Invert(), 100),
    "adamw": ("AdamW, 40 steps on 25 probes", DivePaper(loops=40, learning_rate=0.05), 25),
    "paper": ("dive-paper, 20 loops over 100 probes", DivePaper(), 100),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="digits")
    parser.add_argument("--data", type=Path, help="the .npz of Omniglot")
    parser.add_argument("--limit", type=int, default=100, help="pictures (default: 100)")
    parser.add_argument("--refresh", type=int, nargs="+", default=[1, 2, 3, 5, 10])
    parser.add_argument("--search", choices=SEARCHES, nargs="+", default=["invert", "adamw"])
    arguments = parser.parse_args()
    if arguments.model == "omniglot" and arguments.data is None:
        parser.error("omniglot needs --data, its .npz")
    classifier = DiffusionClassifier.from_pretrained(arguments.model, cache="off")
    x0, labels = moved_pictures(arguments.model, arguments.data, arguments.limit)
    levels = [EngineOptions(cache="off")]
    levels += [EngineOptions(cache="encoder", refresh=refresh) for refresh in arguments.refresh]
    print(f"{'search':38} {'cache':10} accuracy  agreement  evaluations  encoders reused  seconds")
    for title, strategy, probes in (SEARCHES[name] for name in arguments.search):
        reference = None
        for options in levels:
            classifier.options = options
            start = time.perf_counter()
            answers = classifier(latents=x0, strategy=strategy, probes=probes, timesteps="uniform")
            seconds = (time.perf_counter() - start) / len(x0)
            reference = answers if reference is None else reference
            record, n = classifier.last_run, len(x0)
            row = {
                "model": arguments.model,
                "search": title,
                "probes": probes,
                "cache": options.cache,
                "refresh": options.refresh if options.cache == "encoder" else None,
                "n": n,
                "accuracy": sum(a.index == y for a, y in zip(answers, labels.tolist(), strict=True))
                / n,
                "agreement": sum(
                    a.index == r.index for a, r in zip(answers, reference, strict=True)
                )
                / n,
                "evaluations_per_image": record.evaluations / n,
                "reused_rows_per_image": record.reused_rows / n,
                "cache_bytes": record.cache_bytes,
                "seconds_per_image": seconds,
            }
            name = f"refresh {options.refresh}" if row["refresh"] else "off"
            print(
                f"{title:38} {name:10} {row['accuracy']:8.1%} {row['agreement']:10.1%} "
                f"{row['evaluations_per_image']:12,.0f} {row['reused_rows_per_image']:16,.0f} "
                f"{seconds:8.3f}",
                flush=True,
            )
            records.append("cache_encoder", row, classifier)


if __name__ == "__main__":
    main()
