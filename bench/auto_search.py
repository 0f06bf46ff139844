"""How the parameters of `auto` were chosen: on moved training images, never on held-out ones.

    python -m bench.auto_search --model digits --limit 200
    python -m bench.auto_search --model omniglot --data omniglot242_32px.npz --limit 48

First table: where one gradient at the mean embedding ranks the answer of enumeration, with the
first-order estimate alone, with a curvature per class, and with a slope too (learned on the other
images). Second table: agreement with enumeration and evaluations of `auto` with one parameter
changed at a time. Losses are measured once and replayed. Where there are more classes than 16,
enumeration means the best 16 of all classes on 24 probes, on all 250. Appends to
bench/results/auto_search.jsonl.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from bench.pictures import MODELS, moved_pictures
from bench.records import append
from dive_fast import DiffusionClassifier
from dive_fast.core.probes import low_discrepancy_probes
from dive_fast.core.requests import Answer, Gradients, Losses, Search
from dive_fast.core.shortlist import Survey, digest, estimate_shortlist
from dive_fast.engine import Engine, Job
from dive_fast.engine.objective import Objective
from dive_fast.models.files.sidecar import fitted_shortlist
from dive_fast.strategies import Auto
from dive_fast.strategies.base import Task

K, SCREEN, FINALISTS = 250, 24, 16
TOPS = (1, 2, 4, 8, 20)
CHANGES: dict[str, tuple[Any, ...]] = {
    "min_agreement": (0.5, 0.8, 0.95, 0.99, 0.999),
    "shortlist": (2, 3, 4, 6, 8, 10, 12),
    "gradient_probes": (0, 6, 12, 48),
    "first_gradient": (2, 4, 12, 24),
    "final_probes": (2, 4, 12, 24),
    "growth": (1.25, 2.0),
}


class Replay:
    """Answers the requests of strategies from memory, and measures what is not there yet."""

    def __init__(self, classifier: DiffusionClassifier, x0: torch.Tensor) -> None:
        model = classifier.model
        self.engine, self.x0, self.vocabulary = Engine(model), x0, model.vocabulary
        self.shortlist = fitted_shortlist(model)
        learned, n = model.timesteps, len(model.schedule)
        self.probes = (
            low_discrepancy_probes(K, n, model.latent_shape)
            if learned is None
            else learned.probes(K, model.latent_shape, 0)
        )
        self.losses = torch.full((len(x0), len(self.vocabulary), K), torch.nan)
        self.gradients: dict[tuple, Any] = {}

    def measure(self, searches: dict[int, Search]) -> dict[int, Any]:
        jobs = (Job(i, self.x0[i], search) for i, search in searches.items())
        found = self.engine.run(jobs, self.probes, Objective())
        return {finished.key: finished.answer.trace["reply"] for finished in found}

    def enumerate(self) -> None:
        """All classes on the first probes, the best of them on all."""

        def screen() -> Search:
            every, first = torch.arange(len(self.vocabulary)), torch.arange(SCREEN)
            found = torch.full((len(every), K), torch.nan)
            found[:, :SCREEN] = yield Losses(every, first)
            best = found[:, :SCREEN].mean(dim=1).argsort()[:FINALISTS]
            found[best, SCREEN:] = yield Losses(best, torch.arange(SCREEN, K))
            return _only(found)

        for i, found in self.measure({i: screen() for i in range(len(self.x0))}).items():
            self.losses[i] = found

    def ask(self, i: int, request: Losses | Gradients) -> Any:
        ids = request.probe_ids
        if isinstance(request, Losses):
            kept = self.losses[i][request.conditions[:, None], ids]
            if kept.isnan().any():
                kept = self.measure({i: _one(request)})[i]
                self.losses[i][request.conditions[:, None], ids] = kept
            return kept
        at = None if request.relaxed else tuple(request.conditions.tolist())
        key = (i, at, tuple(ids.tolist()), request.per)
        if key not in self.gradients:
            self.gradients[key] = self.measure({i: _one(request)})[i]
        return self.gradients[key]

    def run(self, strategy: Auto, i: int) -> tuple[int, int]:
        """The answer for image i, and its evaluations."""
        task = Task(self.vocabulary, self.probes, shortlist=self.shortlist)
        search, reply, cost = strategy.search(task), None, 0
        while True:
            try:
                request = search.send(reply)
            except StopIteration as stop:
                return stop.value.index, cost
            reply = self.ask(i, request)
            cost += request.passes * len(request.conditions) * len(request.probe_ids)


def _one(request: Losses | Gradients) -> Search:
    return _only((yield request))


def _only(reply: Any) -> Answer:
    return Answer(0, torch.zeros(1), torch.zeros(1, dtype=torch.int64), {"reply": reply})


def rankings(replay: Replay, answers: torch.Tensor) -> dict[str, dict[str, float]]:
    """How often each estimate ranks enumeration's answer among the first few."""
    vocabulary, v0, probes = replay.vocabulary, replay.vocabulary.mean(), torch.arange(SCREEN)
    unit = replay.probes.unit
    asked = Gradients(v0[None], probes, per=unit)
    replies = [replay.ask(i, asked) for i in range(len(answers))]
    slopes = [[vocabulary.linear(v0, g) for g in reply.gradients[:, 0]] for reply in replies]
    slopes = torch.stack([torch.stack(by_unit, dim=1) for by_unit in slopes])
    by_probe = torch.stack([reply.losses[0] for reply in replies])
    screened = replay.losses[:, :, :SCREEN]
    linear, base, measured = slopes.mean(dim=2), by_probe.mean(dim=1), screened.mean(dim=2)

    def others(slope: float) -> torch.Tensor:
        """The estimate, its curvature learned on all other images."""
        left = measured - base[:, None] - slope * linear
        return slope * linear + (left.sum(dim=0) - left) / (len(left) - 1)

    by_unit = screened.unflatten(2, (-1, unit)).mean(dim=3)
    survey = Survey(by_unit, by_probe.unflatten(1, (-1, unit)).mean(dim=2), slopes)
    best = estimate_shortlist(survey, digest(vocabulary.names))[0].slope
    estimates = {
        "first order": linear,
        "with curvature": others(1.0),
        f"with curvature, slope {best}": others(best),
        f"all classes measured on {SCREEN} probes": measured,
    }
    rows = {}
    for title, estimate in estimates.items():
        rank = (estimate < estimate.gather(1, answers[:, None])).sum(dim=1)
        rows[title] = {f"top {n}": (rank < n).double().mean().item() for n in TOPS}
    return rows


def sweep(
    replay: Replay, answers: torch.Tensor, labels: torch.Tensor, changed: Iterable[str]
) -> list[dict[str, Any]]:
    """The default, every single change of it, and two parameters together."""
    settings = [{}] + [{key: value} for key in changed for value in CHANGES[key]]
    if {"shortlist", "first_gradient"} <= set(changed):
        settings += [{"shortlist": n, "first_gradient": m} for n in (8, 10) for m in (4, 12)]
    rows = []
    for setting in settings:
        strategy = dataclasses.replace(Auto(), **setting)
        found = [replay.run(strategy, i) for i in range(len(answers))]
        index, cost = torch.tensor(found).unbind(1)
        row = {
            "agreement": (index == answers).double().mean().item(),
            "accuracy": (index == labels).double().mean().item(),
            "evaluations": cost.double().mean().item(),
            "evaluations_max": int(cost.max()),
        }
        rows.append({"setting": setting, **row})
        title = ", ".join(f"{key} {value}" for key, value in setting.items()) or "default"
        print(f"| {title} | {row['agreement']:.1%} | {row['evaluations']:.0f} |", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="digits")
    parser.add_argument("--data", type=Path, help="the .npz of Omniglot")
    parser.add_argument("--limit", type=int, default=48, help="training images (default: 48)")
    parser.add_argument("--change", nargs="+", choices=CHANGES, default=list(CHANGES))
    options = parser.parse_args()
    if options.model == "omniglot" and options.data is None:
        parser.error("omniglot needs --data, its .npz")
    classifier = DiffusionClassifier.from_pretrained(options.model)
    x0, labels = moved_pictures(options.model, options.data, options.limit)
    replay = Replay(classifier, x0)
    replay.enumerate()
    answers = replay.losses.mean(dim=2).nan_to_num(torch.inf).argmin(dim=1)
    ranked = rankings(replay, answers)
    print(f"| the answer is in the | {' | '.join(f'top {n}' for n in TOPS)} |")
    for title, row in ranked.items():
        print(f"| {title} | {' | '.join(f'{x:.0%}' for x in row.values())} |")
    row = {
        "model": options.model,
        "n": len(labels),
        "enumerate_accuracy": (answers == labels).double().mean().item(),
        "ranking": ranked,
        "sweep": sweep(replay, answers, labels, options.change),
    }
    append("auto_search", row, classifier)


if __name__ == "__main__":
    main()
