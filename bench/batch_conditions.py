"""What a batch copies to bring its conditions to the network: bytes and seconds per batch.

    python -m bench.batch_conditions

Enumeration over 1,000 classes of Stable Diffusion 1.5's size (77 x 768 values each) in batches of 8
rows: one image, one probe, one thread, and a network that is a small sum. Bytes are those of all
tensors that the engine's operations make, counted in a run of their own; seconds are those of its
batches. Appends to bench/results/batch_conditions.jsonl.
"""

from __future__ import annotations

import argparse

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.records import append
from dive_fast import DiffusionClassifier
from dive_fast.core.schedule import Schedule, make_betas
from dive_fast.core.vocabulary import Vocabulary

DIM = 77 * 768
SHAPE = (4, 8, 8)


class Additive:
    """eps = x_t + the condition's first values: a network that costs next to nothing."""

    name = "additive"
    latent_shape = image_shape = SHAPE
    device, dtype, beta = torch.device("cpu"), torch.float32, 1.0

    def __init__(self, n_classes: int) -> None:
        self.schedule = Schedule.from_betas(make_betas("scaled_linear", 1000, 0.00085, 0.012))
        table = torch.randn(n_classes, DIM, generator=torch.Generator().manual_seed(0))
        self.vocabulary = Vocabulary(table, [f"class {c}" for c in range(n_classes)])

    def identity(self) -> dict:
        return {"name": self.name}

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        return images

    def predict(self, x_t: torch.Tensor, t: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        return x_t + condition[:, : x_t[0].numel()].view_as(x_t)


class Allocated(TorchDispatchMode):
    """Counts the bytes of every tensor that an operation makes; views are none."""

    nbytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        known = set(_storages((args, kwargs)))
        self.nbytes += sum(n for place, n in _storages(made).items() if place not in known)
        return made


def _storages(tree) -> dict[int, int]:
    """Where the tensors of nested arguments lie, and their bytes."""
    tensors = [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]
    return {x.untyped_storage().data_ptr(): x.nbytes for x in tensors}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=8, help="per batch")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    classifier = DiffusionClassifier(Additive(options.classes), batch_size=options.rows)
    x0 = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(1))

    def run() -> torch.Tensor:
        return classifier.losses(latents=x0, probes=1)

    with Allocated() as allocated:
        losses = run()
    batches = classifier.last_run.batches
    seconds = []
    for _ in range(options.rounds):
        assert torch.equal(run(), losses)
        seconds.append(classifier.last_run.seconds / batches)
    row = {
        "classes": options.classes,
        "dim": DIM,
        "rows": options.rows,
        "batches": batches,
        "table_bytes": classifier.model.vocabulary.table.nbytes,
        "bytes_per_batch": allocated.nbytes / batches,
        "seconds_per_batch": sorted(seconds)[len(seconds) // 2],
        "seconds_per_batch_min": min(seconds),
        "mean_loss": losses.mean().item(),
        "threads": torch.get_num_threads(),
    }
    append("batch_conditions", row, classifier)
    print(row)


if __name__ == "__main__":
    main()
