"""A small task of noise pictures, and a Stable Diffusion that reads whole captions."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from diffusers import StableDiffusionPipeline
from PIL import Image
from tiny_sd import make_text_encoder, save_pipeline
from transformers import CLIPTokenizer

LONG = 200  # tokens: the small tokenizer makes one of nearly every letter

PAIR = {"name": "pair", "images": "image", "texts": ["right", "wrong"], "items": "items.json"}
TWICE = {
    "name": "twice",
    "images": ["first", "second"],
    "texts": ["one", "two"],
    "items": "items.jsonl",
    "category": "kind",
    "id": "number",
}


def write_picture(path: Path, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (18, 20, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def write_pair_task(folder: Path, n: int = 5, category: str | None = None) -> Path:
    """``items.json`` and ``images/``; returns the file that says what the task is."""
    rows = {}
    for number in range(n):
        write_picture(folder / "images" / f"{number}.png", number)
        name = f"{number}.png"
        rows[f"k{number}"] = {"image": name, "right": f"a cat {number}", "wrong": f"a dog {number}"}
    (folder / "items.json").write_text(json.dumps(rows))
    spec = folder / "pair.json"
    items = PAIR["items"] if category is None else {category: PAIR["items"]}
    spec.write_text(json.dumps(PAIR | {"items": items}))
    return spec


def write_twice_task(folder: Path, n: int = 3) -> Path:
    """Two images and two texts an item, in two categories."""
    lines = []
    for number in range(n):
        row = {"number": number, "kind": "even" if number % 2 == 0 else "odd"}
        for name, text in (("first", "one"), ("second", "two")):
            row[name] = f"{name}-{number}"
            write_picture(folder / "images" / f"{name}-{number}.png", 2 * number + len(text))
            row[text] = f"{text} photo of a cat {number}"
        row["two"] = f"a cat of a photo {number}"
        lines.append(json.dumps(row))
    (folder / "items.jsonl").write_text("\n".join(lines) + "\n")
    spec = folder / "twice.json"
    spec.write_text(json.dumps(TWICE))
    return spec


def lengthen(sd: Path, directory: Path) -> Path:
    """The small Stable Diffusion with a text encoder of ``LONG`` tokens, random as the rest."""
    pipeline = StableDiffusionPipeline.from_pretrained(sd, safety_checker=None)
    tokenizer = CLIPTokenizer.from_pretrained(sd / "tokenizer")
    encoder = make_text_encoder(tokenizer, length=LONG)
    parts = {**pipeline.components, "text_encoder": encoder}
    save_pipeline(StableDiffusionPipeline(**parts, requires_safety_checker=False), directory)
    config = directory / "tokenizer" / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_max_length": LONG}))
    return directory
