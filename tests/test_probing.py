"""Heads learned on features: their training, their choice, and what a search reads of them."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from toy_model import ToyModel

from dive_fast import DiffusionClassifier, DiveFastError, ModelError, RunError
from dive_fast.core.head import Head
from dive_fast.core.probes import ProbeList
from dive_fast.core.requests import Answer
from dive_fast.data import open_dataset
from dive_fast.evaluation import evaluate
from dive_fast.predict import probing
from dive_fast.predict.chunks import Chunks
from dive_fast.strategies import DefaultProbes
from dive_fast.strategies.looking import look


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def brightness(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """x0 [n, 1, 8, 8] whose quarter ``label`` is bright; labels [n] of 0 to 3."""
    labels = torch.arange(n) % 4
    x0 = 0.1 * torch.randn(n, 1, 8, 8, generator=generator(seed)) - 0.5
    for i, label in enumerate(labels.tolist()):
        row, column = 4 * (label // 2), 4 * (label % 2)
        x0[i, 0, row : row + 4, column : column + 4] += 1
    return x0, labels


@pytest.fixture
def classifier(dit_dir: Path) -> DiffusionClassifier:
    return DiffusionClassifier.from_pretrained(dit_dir)


@pytest.fixture(scope="module")
def fitted(dit_dir: Path) -> probing.FittedHead:
    x0, labels = brightness(40)
    return DiffusionClassifier.from_pretrained(dit_dir).fit_head(latents=x0, labels=labels)


# -- training -------------------------------------------------------------------------------------


def test_a_linear_head_tells_bright_quarters(classifier, fitted) -> None:
    assert fitted.held_out == 8 and fitted.score == 1.0
    assert len(fitted.trials) == len(classifier.layers) * 5 + 2
    assert fitted.head.kind == "linear" and fitted.head.layer in classifier.layers
    x0, labels = brightness(30, seed=5)
    assert torch.equal(classifier.head_scores(fitted.head, latents=x0).argmax(dim=1), labels)
    assert len(fitted.head.recall) == 4 and fitted.head.recall[-1] == 1.0


def test_an_attention_head_is_learned_too(classifier) -> None:
    x0, labels = brightness(40)
    made = classifier.fit_head(latents=x0, labels=labels, head="attention", timestep=20)
    assert made.head.grid is None and made.score > 0.5
    scores = classifier.head_scores(made.head, latents=x0)
    assert scores.shape == (40, 4)


def test_a_head_of_losses_ranks_as_enumeration_does(classifier) -> None:
    x0, _ = brightness(60)
    made = classifier.fit_head(latents=x0, head="losses", layer=0, timestep=20, probes=8)
    losses = classifier.losses(latents=x0, probes=classifier.probe_list(probing.Auto(), 8)).mean(
        dim=2
    )
    centred = losses - losses.mean(dim=1, keepdim=True)
    scores = classifier.head_scores(made.head, latents=x0, seed=0)
    left = (-scores - centred).square().mean() / centred.square().mean()
    assert left < 0.5
    assert made.head.recall[-1] == 1.0


def test_the_first_image_meets_the_first_noise(classifier) -> None:
    x0, _ = brightness(3)
    layer = classifier.layers[1]
    found = classifier._features(x0, layer, 30, 1, seed=4, chunks=Chunks())
    expected = classifier.features(latents=x0[:1], layer=layer, timestep=30, seed=4)
    torch.testing.assert_close(found[:1], expected, rtol=1e-5, atol=1e-6)
    others = classifier.features(latents=x0[1:], layer=layer, timestep=30, seed=4)
    assert (found[1:] - others).abs().max() > 1e-3  # other noises


def test_the_mean_of_the_cells_is_the_mean_of_all(classifier) -> None:
    x0, _ = brightness(3)
    one, two = (
        classifier._features(x0, classifier.layers[0], 30, g, seed=0, chunks=Chunks())
        for g in (1, 2)
    )
    torch.testing.assert_close(two.unflatten(1, (4, -1)).mean(dim=1), one, rtol=1e-4, atol=1e-5)


def test_what_was_computed_is_not_computed_again(classifier, tmp_path: Path) -> None:
    x0, labels = brightness(24)
    given = {"latents": x0, "labels": labels, "layer": 1, "cache": tmp_path}
    predict, calls = classifier.model.predict, []

    def counted(x_t: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        calls.append(len(x_t))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return predict(x_t, *rest)

    classifier.model.predict = counted
    with pytest.raises(KeyboardInterrupt):
        classifier.fit_head(**given)
    first = classifier.fit_head(**given)
    spent = sum(calls)
    again = classifier.fit_head(**given)
    assert sum(calls) == spent
    assert again.head.digest() == first.head.digest()
    # Other images, or another seed, are others.
    classifier.fit_head(**{**given, "seed": 1})
    assert sum(calls) > spent


def test_large_features_are_refused_before_they_fill_the_memory(classifier, monkeypatch) -> None:
    monkeypatch.setattr(probing, "MOST_BYTES", 1000)
    x0, labels = brightness(20)
    with pytest.raises(DiveFastError, match="the features of 20 images would take"):
        classifier.fit_head(latents=x0, labels=labels)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head": "deep"}, "expected a head of linear, losses, attention, got 'deep'"),
        ({"head": None}, "expected a head of"),
        ({"head": "losses"}, "'losses' is learned without labels"),
        ({"labels": None}, "'linear' is learned from labels"),
        ({"labels": [0, 1]}, "labels"),
        ({"labels": [9] * 12}, "labels"),
        ({"labels": [0] * 12}, "2 classes or more"),
        ({"validation": 0}, "validation must lie between 0 and 1, got 0"),
        ({"validation": 1.0}, "validation must lie between"),
        ({"validation": "x"}, "validation must lie between"),
        ({"layer": "nowhere"}, "expected a layer of"),
        ({"layer": 99}, "expected a layer of"),
        ({"timestep": 1000}, "timestep must be at most 999"),
        ({"timestep": 0.5}, "timestep must be a whole number"),
        ({"grid": 0}, "grid must be at least 1"),
        ({"probes": 0}, "number of probes must be at least 1"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"cache": 3}, "expected cache to be a folder, got 3"),
        ({"latents": torch.zeros(12, 2, 8, 8)}, "latents must have shape"),
        ({"latents": None}, "either images or latents"),
    ],
)
def test_bad_input_is_refused(classifier, changes: dict, message: str) -> None:
    x0, labels = brightness(12)
    given = {"latents": x0, "labels": labels, "layer": 0, "timestep": 20, "grid": 1}
    with pytest.raises(DiveFastError, match=message):
        classifier.fit_head(**{**given, **changes})


def test_without_scikit_learn_it_says_what_to_install(classifier, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    x0, labels = brightness(12)
    with pytest.raises(DiveFastError, match=r"pip install 'dive_fast\[probe\]'"):
        classifier.fit_head(latents=x0, labels=labels)


def test_a_model_without_a_network_has_no_features() -> None:
    toy = DiffusionClassifier(ToyModel())
    with pytest.raises(ModelError, match="attribute 'network'"):
        toy.fit_head(latents=torch.zeros(5, 2, 3, 3), labels=[0, 1, 0, 1, 0])


# -- a head in a search ---------------------------------------------------------------------------


@dataclass(frozen=True)
class OneLook(DefaultProbes):
    """The class that the head puts first."""

    name: ClassVar[str] = "one-look"
    uses_head: ClassVar[bool] = True
    loss: str = "l2"

    def search(self, task):
        scores = yield from look(task)
        n = torch.ones(len(scores), dtype=torch.int64)
        return Answer(int(scores.argmax()), -scores, n, {"scores": scores})


def by_hand(classifier, head: Head, x0: torch.Tensor, probes: ProbeList) -> Iterator[torch.Tensor]:
    """Scores from a forward of the model on the probe whose timestep is nearest to the head's."""
    k = min(range(len(probes)), key=lambda k: abs(int(probes.timesteps[k]) - head.timestep))
    t, model, caught = probes.timesteps[k], classifier.model, []
    block = dict(model.network.named_modules())[head.layer]
    handle = block.register_forward_hook(lambda module, inputs, output: caught.append(output))
    for x in x0:
        noised = model.schedule.a[t] * x + model.schedule.s[t] * probes.noise[k]
        model.predict(noised[None], t[None], model.vocabulary.mean()[None])
        yield head.read(caught.pop() if head.pool is None else caught.pop().mean(dim=1))[0]
    handle.remove()


@pytest.mark.parametrize("grid", [1, 2])
def test_a_search_reads_the_head_for_one_evaluation(classifier, grid: int) -> None:
    x0, labels = brightness(20)
    head = classifier.fit_head(latents=x0, labels=labels, layer=1, timestep=33, grid=grid).head
    answers = classifier(latents=x0[:5], strategy=OneLook(), head=head, trace=True, probes=20)
    probes = classifier.probe_list(OneLook(), 20)
    with torch.no_grad():
        expected = list(by_hand(classifier, head, x0[:5], probes))
    for answer, scores in zip(answers, expected, strict=True):
        assert answer.evaluations == 1
        torch.testing.assert_close(answer.trace["scores"], scores, rtol=1e-4, atol=1e-4)


def test_a_head_comes_from_its_file_too(classifier, fitted, tmp_path: Path) -> None:
    path, x0 = tmp_path / "head.safetensors", brightness(3)[0]
    fitted.head.save(path)
    one, two = (
        classifier(latents=x0, strategy=OneLook(), head=head) for head in (fitted.head, str(path))
    )
    assert [a.index for a in one] == [a.index for a in two]
    told = classifier.identity(strategy=OneLook(), head=path)
    assert told["head"] == fitted.head.digest()
    assert "head" not in classifier.identity(strategy=OneLook())


def test_a_run_records_its_head(classifier, fitted, tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", images=np.zeros((3, 8, 8), np.uint8), labels=np.arange(3))
    data = open_dataset(tmp_path / "data.npz", classifier.names)
    given = {"strategy": OneLook(), "head": fitted.head}
    assert evaluate(classifier, data, tmp_path / "run", **given).evaluations_per_image == 1
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["config"]["head"] == fitted.head.digest()
    other = replace(fitted.head, bias=fitted.head.bias + 1)
    with pytest.raises(RunError, match="another configuration: head is"):
        evaluate(classifier, data, tmp_path / "run", strategy=OneLook(), head=other)


def test_heads_that_are_none_of_this_model_are_refused(classifier, fitted, tmp_path: Path) -> None:
    x0, head = brightness(2)[0], fitted.head
    for bad, message in (
        (3, "expected a head, got 3"),
        (replace(head, classes="others"), "learned for other classes"),
        (replace(head, timestep=5000), "reads timestep 5000, but .* has 1000"),
        (replace(head, layer="nowhere"), "expected a layer of"),
    ):
        with pytest.raises(DiveFastError, match=message):
            classifier(latents=x0, strategy=OneLook(), head=bad)
        with pytest.raises(DiveFastError, match=message):
            classifier.head_scores(bad, latents=x0)
    with pytest.raises(ModelError, match="there is none"):
        classifier(latents=x0, strategy=OneLook(), head=tmp_path / "none")
    with pytest.raises(DiveFastError, match="'enumerate' does not use a head"):
        classifier(latents=x0, strategy="enumerate", head=head)
    narrow = Head("transformer_blocks.0", 5, 1, "linear", torch.zeros(4, 2), torch.zeros(4),
                  torch.zeros(2), torch.ones(2), head.classes)  # fmt: skip
    with pytest.raises(DiveFastError, match=r"expected features .* D = 2"):
        classifier.head_scores(narrow, latents=x0)
    with pytest.raises(DiveFastError, match="seed must be"):
        classifier.head_scores(head, latents=x0, seed=-1)


# -- families -------------------------------------------------------------------------------------


def test_a_model_with_a_vae(latent_dit_dir: Path) -> None:
    classifier = DiffusionClassifier.from_pretrained(latent_dit_dir)
    images = np.random.default_rng(0).integers(0, 80, (16, 8, 8, 3), dtype=np.uint8)
    labels = np.arange(16) % 2
    images[labels == 1, :4] += 150
    made = classifier.fit_head(images, labels, timestep=20)
    assert classifier.head_scores(made.head, images[:3]).shape == (3, 4)
    assert classifier(images[:2], strategy=OneLook(), head=made.head)[0].evaluations == 1


@pytest.mark.parametrize("average", ["embedding", "loss"])
def test_a_unet_of_prompts(sd: Path, average: str) -> None:
    """Feature maps in the place of tokens; with "loss" a row of the vocabulary is two prompts."""
    given = {"classes": ["cat", "dog"], "templates": ["a {}", "the {}"], "average": average}
    classifier = DiffusionClassifier.from_pretrained(sd, **given)
    side = classifier.model.image_shape[1]
    images = np.random.default_rng(0).integers(0, 80, (12, side, side, 3), dtype=np.uint8)
    labels = np.arange(12) % 2
    images[labels == 1] += 150
    layer = classifier.layers[0]
    made = classifier.fit_head(images, labels, layer=layer, timestep=50, grid=2)
    read = classifier(images[:2], strategy=OneLook(), head=made.head, trace=True)
    assert [answer.evaluations for answer in read] == [2 if average == "loss" else 1] * 2
    assert read[0].trace["scores"].shape == (2,)
