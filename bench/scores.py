"""Candidates of each item's own: what a search over them costs, and how often it agrees.

Items are held-out handwritten characters, each with its own draw of character names as candidates,
the right one among them. The zoo's model has class embeddings and no text encoder: its names are
taken as its prompts, and everything behind the text encoder runs as for any text-to-image model.

python -m bench.scores --data omniglot242_32px.npz
python -m bench.scores --data omniglot242_32px.npz --candidates 4 --items 200
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence

import torch

from bench.records import append
from dive_fast import ImageTextScorer
from dive_fast.core.vocabulary import Vocabulary
from dive_fast.data import open_dataset, select
from dive_fast.models import load_model
from dive_fast.models.dit.model import DiT
from dive_fast.models.text.prompted import PromptedModel
from dive_fast.models.text.prompts import ClassPrompts

STRATEGIES = ("enumerate", "race", "auto")


class Names:
    """A text half that knows the names of classes."""

    pooled = 0

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self.dim, self.shape = vocabulary.dim, vocabulary.shape
        self.row = {name: i for i, name in enumerate(vocabulary.names)}

    def modules(self) -> tuple[torch.nn.Module, ...]:
        return ()

    def table(
        self, classes: ClassPrompts, device: torch.device, twins: bool = False
    ) -> torch.Tensor:
        return self.vocabulary.rows([self.row[prompt] for (prompt,) in classes.prompts])

    def twins(self, prompts: Sequence[str], table: torch.Tensor) -> None:
        return None


class NamesAsPrompts(DiT, PromptedModel):
    """A DiT whose class names are its prompts."""

    def __init__(self, model: DiT) -> None:
        self.__dict__.update(vars(model))
        names = model.vocabulary.names
        self.text = Names(model.vocabulary)
        self.classes = ClassPrompts(names, tuple((name,) for name in names))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="omniglot")
    parser.add_argument("--data", required=True)
    parser.add_argument("--items", type=int, default=200)
    parser.add_argument("--candidates", type=int, default=16)
    parser.add_argument("--probes", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model = load_model(args.model, device="cpu")
    data = select(open_dataset(args.data, model.vocabulary.names), args.items, args.seed)
    scorer = ImageTextScorer(NamesAsPrompts(model))
    generator = torch.Generator().manual_seed(args.seed)
    items, truths = [], {}
    for example, label in zip(data.examples, data.labels.tolist(), strict=True):
        order = torch.randperm(len(model.vocabulary), generator=generator).tolist()
        rows = [label, *[row for row in order if row != label][: args.candidates - 1]]
        rows = [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]
        names = [model.vocabulary.names[row] for row in rows]
        items.append((example.id, example.load(), names))
        truths[example.id] = model.vocabulary.names[label]
    answers: dict[str, dict[str, str]] = {}
    for strategy in STRATEGIES:
        start = time.perf_counter()
        asked = {"strategy": strategy, "probes": args.probes, "seed": args.seed}
        found = dict(scorer.choose(items, **asked))
        seconds = time.perf_counter() - start
        answers[strategy] = {key: choice.text for key, choice in found.items()}
        n = len(found)
        right = sum(answers[strategy][key] == truths[key] for key in truths) / n
        same = sum(answers[strategy][key] == answers["enumerate"][key] for key in truths)
        row = {
            **vars(args),
            "strategy": strategy,
            "accuracy": right,
            "accuracy_error": (right * (1 - right) / n) ** 0.5,
            "agrees": same,
            "of": n,
            "evaluations": sum(choice.evaluations for choice in found.values()) / n,
            "seconds_per_item": seconds / n,
        }
        row["data"] = args.data.rpartition("/")[2]
        print(json.dumps(row))
        append("scores", row, scorer)


if __name__ == "__main__":
    main()
