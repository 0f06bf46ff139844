"""Records of a classifier's run, as ``evaluate`` writes them."""

from __future__ import annotations

import math

import numpy as np


def record(key: str, truth: int, probabilities: list[float], **more: object) -> dict:
    """One of a classifier; a probability of 0 was not measured."""
    index = int(np.argmax(probabilities))
    log = [math.log(p) if p else None for p in probabilities]
    order = sorted(range(len(log)), key=lambda i: -probabilities[i])
    top = [{"label": f"c{i}", "index": i, "score": probabilities[i]} for i in order][:5]
    return {
        "id": key,
        "truth": truth,
        "label": f"c{index}",
        "index": index,
        "probability": probabilities[index],
        "top": top,
        "log_posterior": log,
        "losses": [1.0] * len(log),
        "n_probes": [3] * len(log),
        "eliminated": [],
        "log_odds_bound": [None] * len(log),
        "evaluations": 10,
        "seconds": 0.5,
        **more,
    }
