"""What a configuration asks for is compared with the weights before memory is taken."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from tiny_layout import make_layout_model, make_layout_transformer
from weight_files import STEM, changed, copied, write_header

from dive_fast import ModelError
from dive_fast.models import load_model

CLASSES = ["cat", "dog"]

MEASURE = """
import json
import resource
import sys

from dive_fast import ModelError
from dive_fast.models import load_model

def refused(case):
    directory, classes = case
    try:
        load_model(directory, device="cpu", classes=classes)
    except ModelError as error:
        return str(error)

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

sound, *cases = json.loads(sys.stdin.read())
assert all(refused(case) is None for case in sound)
before = peak()
said = [refused(case) for case in cases]
print(json.dumps([peak() - before, said]))
"""

GREEDY = [
    ("dit", "transformer", {"num_layers": 10**6}),
    ("dit", "transformer", {"sample_size": 10**5}),
    ("dit", "transformer", {"sample_size": 4096, "patch_size": 2}),
    ("dit", "transformer", {"num_embeds_ada_norm": 10**9}),
    ("dit", "transformer", {"attention_head_dim": 10**6}),
    ("dit", "vae", {"block_out_channels": [8] * 10**6}),
    ("dit", "vae", {"layers_per_block": 10**6}),
    ("dit", "vae", {"latent_channels": 10**6}),
    ("sd", "unet", {"layers_per_block": 10**6}),
    ("sd", "unet", {"cross_attention_dim": 10**9}),
    ("sd", "unet", {"block_out_channels": [2**20, 2**20]}),
    ("sd", "unet", {"sample_size": 10**5}),
    ("sd", "text_encoder", {"num_hidden_layers": 10**6}),
    ("sd", "text_encoder", {"vocab_size": 10**9}),
    ("sd", "text_encoder", {"hidden_size": 10**6}),
    ("sd", "text_encoder", {"max_position_embeddings": 10**9}),
    ("layout", "layout_encoder", {"n_slots": 10**9}),
    ("layout", "layout_encoder", {"layers": 1000}),
    ("layout", "vae", {"num_vq_embeddings": 10**9}),
    ("transformer", "transformer", {"pos_embed_max_size": 4096}),
    ("transformer", "transformer", {"num_layers": 10**6}),
]


def test_memory_stays_small(latent_dit_dir, sd, tmp_path):
    """What a configuration asks for is compared with the weights before it is allocated."""
    layout, transformer = tmp_path / "layout", tmp_path / "transformer"
    make_layout_model(vae="vq").save_pretrained(layout)
    make_layout_transformer().save_pretrained(transformer)
    sources = {"dit": latent_dit_dir, "sd": sd, "layout": layout, "transformer": transformer}
    classes = {"sd": CLASSES}
    cases: list = [[(str(path), classes.get(kind)) for kind, path in sources.items()]]
    for n, (kind, folder, values) in enumerate(GREEDY):
        directory = changed(sources[kind], tmp_path / str(n), f"{folder}/config.json", **values)
        cases.append((str(directory), classes.get(kind)))
    many = copied(latent_dit_dir, tmp_path / "many")
    header = {f"weight {n}": entry_of(4 * n) for n in range(3 * 10**5)}
    write_header(many / "transformer" / f"{STEM}.safetensors", header, bytes(4 * len(header)))
    cases.append((str(many), None))
    done = subprocess.run(
        [sys.executable, "-c", MEASURE], input=json.dumps(cases), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    megabytes, said = json.loads(done.stdout)
    unrefused = [case for case, sentence in zip(GREEDY, said, strict=False) if sentence is None]
    assert not unrefused and None not in said, said
    assert megabytes < 300


def entry_of(start: int) -> dict:
    return {"dtype": "F32", "shape": [1], "data_offsets": [start, start + 4]}


def test_a_pickle_that_its_configuration_exceeds(dit_dir, tmp_path):
    directory = changed(dit_dir, tmp_path / "model", "transformer/config.json", num_layers=10**6)
    path = directory / "transformer" / f"{STEM}.safetensors"
    torch.save(load_file(path), path.with_suffix(".bin"))
    path.unlink()
    with pytest.raises(ModelError, match="it makes far more than the"):
        load_model(directory, allow_pickle=True)
