"""What detection with GLIGEN and GeoDiffusion takes: memory, evaluations, and that it runs.

    python -m bench.open_vocabulary write gligen published --pixels 64 --out DIR
    python -m bench.open_vocabulary detect DIR --family gligen --dtype bfloat16
    python -m bench.open_vocabulary rows gligen --rows 1 2
    python -m bench.open_vocabulary live gligen
    python -m bench.open_vocabulary evaluations --classes 2 10 80 --objects 1 3 8

Weights are random, of the published shapes: answers mean nothing, and only ``evaluations``, on a
model that knows its pictures, has searches as long as real ones. All but that count what happens
to the network itself, and compare it with diffusers' own call. Each appends to
bench/results/open_vocabulary.jsonl. Nothing here was measured on a GPU.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import CLIPTextModel, CLIPTokenizer

from bench.live_memory import LiveBytes
from bench.open_vocabulary_models import FAMILIES, SIZES, unet, write
from bench.painted_layouts import SHARED, TEXTURE, PaintedLayouts
from bench.records import RESULTS, append_line
from dive_fast import LayoutDetector
from dive_fast.core.layouts import Layout
from dive_fast.engine import Engine, Job
from dive_fast.engine.objective import Objective
from dive_fast.evaluation.machine import machine
from dive_fast.models.geodiffusion.model import GeoDiffusion
from dive_fast.strategies.layout import Board, Guided

GIGABYTES = (8, 12, 16, 24)
BESIDE = 3 * 10**9  # VAE and text encoder in float32, an image in the VAE, and the cache's 1 GiB
LEAST = {"rough_probes": 1, "step_probes": 1, "final_probes": 1, "rounds": 1, "margin": 0.0}
BOX = Layout(torch.tensor([[0.25, 0.25, 0.75, 0.75]]), torch.tensor([1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    made = commands.add_parser("write")
    made.add_argument("family", choices=FAMILIES)
    made.add_argument("size", choices=SIZES)
    made.add_argument("--pixels", type=int, default=64)
    made.add_argument("--out", type=Path, required=True)
    made.set_defaults(run=lambda o: write(o.out, o.family, o.size, o.pixels))
    found = commands.add_parser("detect")
    found.add_argument("directory", type=Path)
    found.add_argument("--family", choices=FAMILIES, required=True)
    found.add_argument("--size", choices=SIZES, default="published")
    found.add_argument("--dtype", default="float32")
    found.add_argument("--images", type=int, default=2)
    found.set_defaults(run=detect)
    rows = commands.add_parser("rows")
    rows.add_argument("family", choices=FAMILIES)
    rows.add_argument("--dtype", default="float32")
    rows.add_argument("--pixels", type=int, default=512)
    rows.add_argument("--rows", type=int, nargs="+", default=[1, 2])
    rows.set_defaults(run=memory_of_rows)
    live = commands.add_parser("live")
    live.add_argument("family", choices=FAMILIES)
    live.add_argument("--pixels", type=int, default=512)
    live.set_defaults(run=live_memory)
    counted = commands.add_parser("evaluations")
    counted.add_argument("--classes", type=int, nargs="+", default=[2, 10, 80])
    counted.add_argument("--objects", type=int, nargs="+", default=[1, 3, 8])
    counted.add_argument("--images", type=int, default=3)
    counted.add_argument("--step-probes", type=int, default=12)
    counted.add_argument("--final-probes", type=int, default=24)
    counted.add_argument("--max-objects", type=int)
    counted.add_argument("--texture", type=float, default=TEXTURE)
    counted.add_argument("--shared", type=float, default=SHARED)
    counted.set_defaults(run=count_evaluations)
    options = parser.parse_args()
    options.run(options)


def record(what: str, row: dict[str, Any]) -> None:
    print(what, row, flush=True)
    append_line(RESULTS / "open_vocabulary.jsonl", {"what": what, **row}, machine())


def peak_bytes() -> int:
    """The largest resident size since ``reset_peak``."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def pictures(n: int) -> list[np.ndarray]:
    """Two bright boxes on noise, wider than high."""
    rng = np.random.default_rng(0)
    found = rng.integers(0, 80, (n, 96, 160, 3), dtype=np.uint8)
    for image in found:
        for colour in ((230, 60, 40), (40, 200, 240)):
            top, left = rng.integers(0, 50), rng.integers(0, 100)
            image[top : top + 40, left : left + 50] = colour
    return list(found)


def detect(options: argparse.Namespace) -> None:
    """A directory through ``LayoutDetector``: rows counted at the network, its loss compared."""
    reset_peak()
    detector = LayoutDetector.from_pretrained(
        options.directory,
        classes=["cat", "dog"],
        dtype=options.dtype,
        device="cpu",
        cache="off",
        batch_size=4,
    )
    model = detector.model
    loaded, rows = peak_bytes(), []
    hook = model.unet.conv_out.register_forward_pre_hook(
        lambda _, given: rows.append(len(given[0]))
    )
    reset_peak()
    start = time.perf_counter()
    found = detector(pictures(options.images), probes=1, max_objects=1, **LEAST)
    seconds, peak = time.perf_counter() - start, peak_bytes()
    hook.remove()
    counts = [each.evaluations for each in found]
    assert sum(counts) == sum(rows), (counts, sum(rows))
    assert all(np.isfinite(np.asarray(each.confidence)).all() for each in found)
    difference = compared_with_diffusers(model, options.directory)
    record(
        "detect",
        {
            "family": options.family,
            "size": options.size,
            "dtype": options.dtype,
            "pixels": model.image_shape[1],
            "batch_size": 4,
            "parameters": {
                "unet": parameters(model.unet),
                "vae": parameters(model.vae),
            },
            "peak_loading": loaded,
            "peak": peak,
            "evaluations": counts,
            "objects": [len(each) for each in found],
            "seconds": seconds,
            "seconds_per_evaluation": seconds / sum(counts),
            "difference_from_diffusers": difference,
        },
    )


def parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@torch.no_grad()
def compared_with_diffusers(model: Any, directory: Path) -> float:
    """The relative difference of the loss of one object from that of diffusers' own call."""
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(1, *model.latent_shape, generator=generator).to(model.dtype)
    noise = torch.randn(x_t.shape, generator=generator)
    t = torch.tensor([400])
    ours = model.predict(x_t, t, model.embed(model.layout_format.encode(BOX)[None]))
    given = inputs_of_the_pipeline(model, directory)
    theirs = model.unet(x_t, t, **given).sample
    one, other = ((each.float() - noise).square().mean() for each in (ours, theirs))
    difference = float((one - other).abs() / other)
    assert difference < (1e-4 if model.dtype == torch.float32 else 1e-2), difference
    return difference


def inputs_of_the_pipeline(model: Any, directory: Path) -> dict[str, Any]:
    """The text's states and the grounding of ``BOX``, by transformers alone."""
    tokenizer = CLIPTokenizer.from_pretrained(directory / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(directory / "text_encoder", dtype=torch.float32)

    def states(text: str) -> Tensor:
        tokens = tokenizer(text, padding="max_length", truncation=True, return_tensors="pt")
        return encoder(tokens.input_ids)[0].to(model.dtype)

    if isinstance(model, GeoDiffusion):
        grid = model.layout_format.grid
        first, second = (
            round(float(side) * (grid - 1)) * (grid + 1) for side in BOX.boxes[0, [0, 2]]
        )
        return {"encoder_hidden_states": states(f"An image with dog <l{first}> <l{second}>")}
    boxes, masks, phrases = torch.zeros(1, 30, 4), torch.zeros(1, 30), torch.zeros(1, 30, 768)
    phrase = encoder(**tokenizer("dog", return_tensors="pt")).pooler_output
    phrases = phrases[:, :, : phrase.shape[1]]
    boxes[0, 0], masks[0, 0], phrases[0, 0] = BOX.boxes[0], 1, phrase[0]
    grounding = {"boxes": boxes, "masks": masks, "positive_embeddings": phrases}
    return {
        "encoder_hidden_states": states(""),
        "cross_attention_kwargs": {
            "gligen": {key: value.to(model.dtype) for key, value in grounding.items()}
        },
    }


def memory_of_rows(options: argparse.Namespace) -> None:
    """The resident peak of forwards of so many rows, fewest first, without gradient."""
    dtype = getattr(torch, options.dtype)
    network = published(options.family, options.pixels, dtype)
    peaks, seconds = {}, {}
    reset_peak()
    before = peak_bytes()
    for n in options.rows:
        given = inputs(options.family, n, options.pixels, dtype)
        start = time.perf_counter()
        with torch.no_grad():
            found = network(**given).sample
        seconds[n] = time.perf_counter() - start
        peaks[n] = peak_bytes() - before
        assert found.isfinite().all()
    record(
        "rows",
        {
            "family": options.family,
            "dtype": options.dtype,
            "pixels": options.pixels,
            "parameters": parameters(network),
            "peak_beyond_weights": peaks,
            "seconds": seconds,
        },
    )


def live_memory(options: argparse.Namespace) -> None:
    """Bytes of a row in bfloat16 with and without a gradient, counted; and what fits by that."""
    row: dict[str, Any] = {"family": options.family, "pixels": options.pixels}
    with FakeTensorMode():
        network = published(options.family, options.pixels, torch.bfloat16)
        for what in ("without", "with"):
            peaks = []
            for n in (1, 2):
                given = inputs(options.family, n, options.pixels, torch.bfloat16)
                condition = given["encoder_hidden_states"].requires_grad_(what == "with")
                with LiveBytes(list(network.parameters())) as live:
                    result = network(**given).sample
                    if what == "with":
                        torch.autograd.grad(result.sum(), condition)
                del result
                peaks.append(live.peak)
            row[f"bytes_{what}_gradient"] = peaks
        weights = 2 * parameters(network)
    record("live", {**row, "weights": weights, "rows": rows_that_fit(row, weights)})


def rows_that_fit(row: dict[str, Any], weights: int) -> dict[str, dict[int, int]]:
    """Rows of a batch by gigabytes of a GPU, of which a tenth and ``BESIDE`` stay free."""
    found = {}
    for what in ("without", "with"):
        one, two = row[f"bytes_{what}_gradient"]
        found[what] = {
            gb: max(0, int((0.9 * gb * 1e9 - BESIDE - weights - (2 * one - two)) // (two - one)))
            for gb in GIGABYTES
        }
    return found


def published(family: str, pixels: int, dtype: torch.dtype) -> UNet2DConditionModel:
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        return unet(family, "published", pixels // 8)
    finally:
        torch.set_default_dtype(torch.float32)


def inputs(family: str, n: int, pixels: int, dtype: torch.dtype) -> dict[str, Any]:
    """Of a network, for n rows."""
    side = pixels // 8
    given = {
        "sample": torch.randn(n, 4, side, side, dtype=dtype),
        "timestep": torch.full((n,), 400),
        "encoder_hidden_states": torch.randn(n, 77, 768, dtype=dtype),
    }
    if family == "gligen":
        objects = {
            "boxes": torch.rand(n, 30, 4, dtype=dtype),
            "masks": torch.ones(n, 30, dtype=dtype),
            "positive_embeddings": torch.randn(n, 30, 768, dtype=dtype),
        }
        given["cross_attention_kwargs"] = {"gligen": objects}
    return given


def count_evaluations(options: argparse.Namespace) -> None:
    """``guided`` on painted pictures: evaluations, and whether it finds what was painted."""
    strategy = Guided(
        step_probes=options.step_probes,
        final_probes=options.final_probes,
        max_objects=options.max_objects,
    )
    for n_classes in options.classes:
        for n_objects in options.objects:
            row = counted(strategy, n_classes, n_objects, options)
            record("evaluations", {**row, "settings": settings_of(strategy)})


def settings_of(strategy: Guided) -> dict[str, int | float]:
    names = ("rough_probes", "step_probes", "final_probes", "rounds", "margin", "max_objects")
    return {name: getattr(strategy, name) for name in names}


def counted(
    strategy: Guided, n_classes: int, n_objects: int, options: argparse.Namespace
) -> dict[str, Any]:
    """The searches of some pictures of so many objects each."""
    model = PaintedLayouts(n_classes, n_objects + 2, options.texture, options.shared)
    probes = strategy.probes(None, 1000, model.latent_shape, 0)
    board = Board(model.vocabulary.table, model.layout_format, probes)
    scenes = [model.scene(n_objects, seed) for seed in range(options.images)]
    jobs = [Job(i, x0, strategy.search(board)) for i, (_, x0) in enumerate(scenes)]
    found = sorted(Engine(model, 64).run(jobs, probes, Objective()), key=lambda each: each.key)
    evaluations = [each.evaluations for each in found]
    exact = [
        len(set(each.answer.items) & set(items))
        for each, (items, _) in zip(found, scenes, strict=True)
    ]
    return {
        "classes": n_classes,
        "objects": n_objects,
        "slots": n_objects + 2,
        "texture": options.texture,
        "shared": options.shared,
        "evaluations": evaluations,
        "mean": mean(evaluations),
        "found": [len(each.answer.items) for each in found],
        "found_exactly": exact,
    }


if __name__ == "__main__":
    main()
