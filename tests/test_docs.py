"""The Python of README.md and docs/ runs as it stands there."""

from __future__ import annotations

import re
import textwrap
from argparse import Namespace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline
from networks import PatchTransformer
from pictures import noise_picture
from PIL import Image
from task_inputs import write_pair_task
from tiny_geodiffusion import write_geodiffusion
from tiny_gligen import write_gligen
from tiny_lora import write_lora
from tiny_sd import write_to_hub
from tiny_unet import make_unet

from dive_fast import Detections, DiffusionClassifier
from dive_fast.data import open_dataset, select
from dive_fast.data.coco import CocoDataset, CocoImage
from dive_fast.data.digits import load_digits
from dive_fast.evaluation import evaluate
from dive_fast.models.source import FAMILIES
from dive_fast.strategies import base

ROOT = Path(__file__).parents[1]
PAGES = (
    "README.md",
    "docs/strategies.md",
    "docs/models.md",
    "docs/data.md",
    "docs/caching.md",
    "docs/accelerate.md",
    "docs/compat.md",
    "docs/timesteps.md",
    "docs/weights.md",
    "docs/probe.md",
    "docs/features.md",
    "docs/explain.md",
    "docs/likelihood.md",
    "docs/corruptions.md",
    "docs/segmentation.md",
    "docs/scores.md",
    "docs/tasks.md",
    "docs/compare.md",
    "docs/train_classes.md",
    "docs/detection.md",
    "docs/open_vocabulary.md",
    "docs/diagnose.md",
    "docs/layouts.md",
    "docs/records.md",
    "docs/ray.md",
    "docs/runs.md",
    "docs/report.md",
    "docs/logging.md",
)


def snippets() -> list:
    found = []
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        blocks = re.findall(r"^( *)```python\n(.*?)^\1```", text, re.S | re.M)
        for i, (_, code) in enumerate(blocks):
            found.append(pytest.param(textwrap.dedent(code), id=f"{page}-{i}"))
    return found


def text_conditional() -> dict:
    """Arguments of the published text-to-image loop."""
    unet = make_unet("sd2")
    return {
        "unet": unet,
        "latent": torch.zeros(1, 4, 8, 8),
        "latent_size": 8,
        "text_embeds": torch.randn(3, 5, unet.config.cross_attention_dim),
        "scheduler": EulerDiscreteScheduler(),
        "args": Namespace(
            n_samples=[4, 8], to_keep=[2, 1], n_trials=1, batch_size=32, dtype="float32", loss="l2"
        ),
    }


def annotated() -> dict:
    """One detection, and the annotated image that it is right about."""
    Image.new("L", (32, 32)).save("scene.png")
    boxes, classes = torch.tensor([[2.0, 4, 12, 16]]), torch.tensor([1])
    image = CocoImage(7, Path("scene.png"), (32, 32), boxes, classes, torch.tensor([False]))
    return {
        "found": Detections(boxes, classes, [0.93], ("zero", "one")),
        "data": CocoDataset(("zero", "one"), (1, 2), (image,), "boxes.json"),
    }


def write_photos() -> None:
    """A folder with two classes."""
    for i in range(10):
        place = Path("photos", "dog" if i % 2 else "cat", f"{i}.png")
        place.parent.mkdir(parents=True, exist_ok=True)
        noise_picture((20, 18), 60 + i).save(place)


def finish_runs(clf: DiffusionClassifier) -> None:
    """Two runs on the same images."""
    data = select(open_dataset("digits", clf.names), 3, seed=0)
    evaluate(clf, data, "runs/auto")
    evaluate(clf, data, "runs/enumerate", strategy="enumerate", probes=10)


def test_every_page_has_code():
    ids = [p.id for p in snippets()]
    assert all(any(i.startswith(page) for i in ids) for page in PAGES)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hub cache in which tiny models stand for the published ones, so that examples run."""
    cache = tmp_path_factory.mktemp("hub")
    write_to_hub(cache, "stable-diffusion-v1-5/stable-diffusion-v1-5")
    write_to_hub(cache, "masterful/gligen-1-4-generation-text-box", write_gligen)
    write_to_hub(cache, "KaiChen1998/geodiffusion-coco-stuff-512x512", write_geodiffusion)
    return cache


@pytest.mark.parametrize("code", snippets())
def test_code_runs(code, tmp_path, monkeypatch, hub):
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(base, "_STRATEGIES", dict(base._STRATEGIES))
    monkeypatch.setitem(FAMILIES, "MyPipeline", None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    if "datasets." in code:
        pytest.importorskip("datasets", reason="data sets of Hugging Face need their library")
    if "open_clip:" in code:
        find_spec("open_clip") or pytest.skip("the lists come with open_clip")
    if "lora=" in code:
        pytest.importorskip("peft", reason="LoRA weights need peft")
        (model,) = hub.glob("models--stable-diffusion-v1-5*/snapshots/*")
        write_lora(StableDiffusionPipeline.from_pretrained(model), Path(), "unet")
    if "open_task(" in code:
        write_pair_task(Path("my-files"), 2, category="swap").rename("my-task.json")
    held_out = load_digits("test")
    Image.fromarray(held_out.images[0]).save("three.png")
    noise_picture((30, 20), 80).save("photo.png")
    Path("prompts.csv").write_text("prompt,classname,classidx\na cat.,cat,0\na dog.,dog,1\n")
    clf = DiffusionClassifier.from_pretrained("digits")
    names = {
        "clf": clf,
        "images": held_out.images[:1],
        "labels": held_out.labels[:1],
        "x0": clf.encode(held_out.images[:1]),
        "my_noise": torch.randn(100, 1, 8, 8, generator=torch.Generator().manual_seed(0)),
        **text_conditional(),
        **annotated(),
        "load": lambda directory, **options: None,
        "MyNetwork": PatchTransformer,
    }
    if '"photos"' in code:
        write_photos()
    if '"runs/auto' in code and "evaluate(" not in code:
        finish_runs(clf)
    exec(compile(code, "<docs>", "exec"), names)
    if "halving" in code:
        assert clf(names["images"], strategy="halving")[0].n_probes.min() == 10
