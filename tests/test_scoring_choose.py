"""Each item's own candidates: as one item after the other with them as its classes."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from direct_scores import Direct, colour_picture
from tiny_lora import write_flux
from tiny_pixart import write_pixart
from tiny_sd3 import write_sd3

from dive_fast import DiffusionClassifier, ImageTextScorer
from dive_fast.core.probes import low_discrepancy_probes
from dive_fast.core.requests import ErrorMaps, Gradients, Losses
from dive_fast.engine import Engine, Job
from dive_fast.engine.objective import Objective
from dive_fast.errors import DiveFastError, ImageError, ModelError

PICTURES = [colour_picture((16, 16), seed) for seed in range(5)]
TEXTS = ("a cat", "two dogs", "of")
CANDIDATES = [
    ("a cat", "two dogs"),
    ("a dog eats a cat", "a cat", "of", "a red cat", "photo"),
    ("two dogs", "a cat", "photo of a cat"),
    ("a cat", "A DOG"),  # and the last of another item, which differs in case
    tuple(f"{a} {b}" for a in "abcd" for b in "efgh"),
]
ITEMS = [(f"item {i}", p, c) for i, (p, c) in enumerate(zip(PICTURES, CANDIDATES, strict=True))]
ITEMS[0] = (*ITEMS[0][:2], ["a cat", "a dog"])


@pytest.fixture(scope="module")
def scorer(sd: Path) -> ImageTextScorer:
    return ImageTextScorer.from_pretrained(sd, device="cpu", batch_size=50)


def alone(directory: Path, texts, picture, **asked):
    """The item by itself, by a classifier whose classes are its candidates."""
    classes = {text: text for text in texts}
    clf = DiffusionClassifier.from_pretrained(directory, classes=classes, device="cpu")
    return clf(picture, **asked)[0]


def check_alike(directory: Path, items, found, **asked) -> None:
    assert found.keys() == {key for key, *_ in items}
    for key, picture, texts in items:
        choice, expected = found[key], alone(directory, texts, picture, **asked)
        assert choice.texts == tuple(texts) and choice.index == expected.index
        assert choice.text == texts[expected.index]
        assert torch.equal(choice.n_probes, expected.n_probes)
        assert choice.evaluations == expected.evaluations
        torch.testing.assert_close(
            choice.losses, expected.losses, rtol=1e-4, atol=1e-5, equal_nan=True
        )
        torch.testing.assert_close(
            choice.log_posterior, expected.log_posterior, rtol=1e-3, atol=5e-3
        )
        best, second = expected.log_posterior.sort(descending=True).values[:2].tolist()
        if expected.log_posterior.argmax() == choice.index:
            assert choice.margin == pytest.approx(best - second, abs=1e-2)


STRATEGIES = [
    ("enumerate", {}),
    ("race", {"error": 0.3, "min_probes": 4, "round_probes": 4}),
    ("auto", {}),
    ("auto", {"budget": 12}),
    ("invert", {}),
]


@pytest.mark.parametrize("strategy, settings", STRATEGIES)
def test_as_each_item_alone(sd, scorer, strategy, settings):
    asked = {"strategy": strategy, "probes": 16, "seed": 3, **settings}
    check_alike(sd, ITEMS, dict(scorer.choose(iter(ITEMS), **asked)), **asked)


def test_the_default_is_a_race(scorer):
    plain, race = (dict(scorer.choose(ITEMS, **asked)) for asked in ({}, {"strategy": "race"}))
    for key in race:
        assert plain[key].index == race[key].index
        assert plain[key].evaluations == race[key].evaluations
    assert plain["item 4"].evaluations < 16 * 100


def test_two_towers(sdxl):
    scorer = ImageTextScorer.from_pretrained(sdxl, device="cpu")
    asked = {"strategy": "enumerate", "probes": 6}
    check_alike(sdxl, ITEMS[:3], dict(scorer.choose(ITEMS[:3], **asked)), **asked)


@pytest.mark.parametrize("write", [write_pixart, write_sd3, write_flux])
def test_other_families(write, tmp_path, monkeypatch):
    """Masks of the prompt; pooled embeddings beside the tokens; several text encoders."""
    monkeypatch.setenv("DIVE_FAST_CACHE", str(tmp_path / "cache"))
    directory = write(tmp_path / "model")
    scorer = ImageTextScorer.from_pretrained(directory, device="cpu")
    texts = [("cat", "big dog"), ("a big cat", "a dog", "a photo of a dog", "photo")]
    items = list(zip("pq", PICTURES, texts, strict=False))
    for strategy in ("enumerate", "auto"):
        asked = {"strategy": strategy, "probes": 6}
        check_alike(directory, items, dict(scorer.choose(items, **asked)), **asked)
    kept = sorted((tmp_path / "cache" / "prompts").iterdir())
    assert len(kept) == 7  # each prompt, and the empty one
    # Blanks at the end are nothing to the tokenizers.
    with pytest.raises(DiveFastError, match="'cat' and 'cat ', which are the same to it"):
        list(scorer.choose([("p", PICTURES[0], ("cat", "dog", "cat "))], probes=4))


def test_chunks(scorer, monkeypatch):
    asked = {"strategy": "enumerate", "probes": 4}
    together = dict(scorer.choose(ITEMS, **asked))
    read = []

    def items():
        for item in ITEMS:
            read.append(item[0])
            yield item

    monkeypatch.setattr("dive_fast.predict.items.CHUNK_ITEMS", 2)
    stream = scorer.choose(items(), **asked)
    found = dict([next(stream)])
    assert len(read) == 3  # of the next chunk only what closed this one
    found |= dict(stream)
    monkeypatch.setattr("dive_fast.predict.items.texts_at_once", lambda dim: 4)
    narrow = dict(scorer.choose(ITEMS, **asked))
    for key, choice in together.items():
        for other in (found[key], narrow[key]):
            torch.testing.assert_close(other.losses, choice.losses, rtol=1e-4, atol=1e-5)
            assert other.index == choice.index


def test_two_streams_at_once(scorer):
    asked = {"strategy": "race", "probes": 8}
    expected = dict(scorer.choose(ITEMS, **asked))
    one, other = scorer.choose(ITEMS, **asked), scorer.choose(ITEMS[::-1], **asked)
    found, also = {}, {}
    for (key, choice), (second, its) in zip(one, other, strict=True):
        found[key], also[second] = choice, its
    for key, choice in expected.items():
        for way in (found, also):
            torch.testing.assert_close(way[key].losses, choice.losses, rtol=1e-4, atol=1e-5)


def test_no_items(scorer):
    assert list(scorer.choose([])) == []


# -- weights of pixels -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights() -> torch.Tensor:
    return torch.rand(8, 8, generator=torch.Generator().manual_seed(1)).round(decimals=1)


def test_weights_of_an_item(sd, scorer, weights):
    direct, probes = Direct(sd), low_discrepancy_probes(6, 1000, (4, 8, 8), seed=0)
    large = weights.repeat_interleave(2, 0).repeat_interleave(2, 1).numpy()
    items = [(*ITEMS[0], None), (*ITEMS[1], large), ITEMS[2]]
    found = dict(scorer.choose(items, strategy="enumerate", probes=6))
    plain = dict(scorer.choose(ITEMS[:3], strategy="enumerate", probes=6))
    for key in ("item 0", "item 2"):
        torch.testing.assert_close(found[key].losses, plain[key].losses, rtol=1e-4, atol=1e-5)
    maps = torch.stack([direct.maps(PICTURES[1], text, probes) for text in CANDIDATES[1]])
    expected = (maps.mean(dim=1) * weights).sum(dim=(1, 2)) / weights.sum()
    torch.testing.assert_close(found["item 1"].losses, expected, rtol=1e-4, atol=1e-5)
    assert (found["item 1"].losses - plain["item 1"].losses).abs().max() > 1e-3


@pytest.mark.parametrize("cache", ["off", "exact"])
def test_what_the_engine_gives(sd, scorer, weights, cache):
    """Losses, gradients and error maps of weighted pixels; plain ones in the same batch."""
    from dive_fast.core.requests import Answer
    from dive_fast.engine import EngineOptions

    direct, probes = Direct(sd), low_discrepancy_probes(4, 1000, (4, 8, 8), seed=0)
    texts, every = ["a cat", "two dogs", "of"], torch.arange(4)
    vocabulary = scorer.model.vocabulary_of(texts)
    rows = torch.tensor([2, 0])

    def search():
        named = torch.tensor([0, 1])
        losses = yield Losses(named, every)
        gradients = yield Gradients(named, every)
        maps = yield ErrorMaps(named, every)
        relaxed = yield Gradients(vocabulary.table[rows], every)
        return Answer(0, losses, losses, {"all": (losses, gradients, maps, relaxed)})

    x0 = direct.x0(PICTURES[0])
    jobs = [Job(i, x0[0].clone(), search(), rows, w) for i, w in enumerate((weights, None))]
    engine = Engine(scorer.model, 11, options=EngineOptions(cache=cache))
    found = {f.key: f.answer.trace["all"] for f in
             engine.run(jobs, probes, Objective(), vocabulary)}  # fmt: skip
    for key, w in ((0, weights), (1, torch.ones(8, 8))):
        losses, gradients, maps, relaxed = found[key]
        for i, row in enumerate(rows):
            states = direct.condition(texts[row])[0].detach().requires_grad_()
            error = direct.maps_of(x0, states, {}, probes) * w / w.mean()
            gradient = torch.autograd.grad(error.mean(), states)[0].flatten()
            close = {"rtol": 1e-3, "atol": 2e-5}
            torch.testing.assert_close(losses[i], error.mean(dim=(1, 2)).detach(), **close)
            torch.testing.assert_close(maps[i], error.mean(dim=0).detach(), **close)
            torch.testing.assert_close(gradients.gradients[i], gradient, **close)
            torch.testing.assert_close(relaxed.gradients[i], gradient, **close)
            assert gradient.abs().max() > 1e-3


# -- bad items -------------------------------------------------------------------------------------

LONG = "a b c d e f g h i j k l m n o p"  # the encoder reads 16 tokens, of which two are its own
BAD = [
    (("a cat", "A  Cat"), DiveFastError, "'a cat' and 'A  Cat', which are the same to it"),
    ((LONG + " q", "of", LONG + " r"), DiveFastError, "tells apart"),
    (("a cat",), DiveFastError, "at least 2 texts, got 1"),
    (("a cat", "of", "a cat"), DiveFastError, "that differ, got 'a cat' twice"),
    ("a cat", DiveFastError, "at least 2 texts, got 1"),
    (("a cat", ""), DiveFastError, "not empty, got ''"),
    (None, DiveFastError, "texts as a list, got None"),
]


@pytest.mark.parametrize("texts, kind, message", BAD)
def test_bad_candidates(scorer, texts, kind, message):
    items = [ITEMS[0], ("bad", PICTURES[0], texts), ITEMS[1]]
    with pytest.raises(kind, match=f"item 'bad': .*{message}"):
        list(scorer.choose(items, probes=4))
    found = dict(scorer.choose(items, probes=4, keep_going=True))
    assert message in str(found.pop("bad")) and set(found) == {"item 0", "item 1"}


def test_bad_images_and_weights(scorer, tmp_path):
    bad = [
        ("away", tmp_path / "away.png", CANDIDATES[1]),
        ("small", PICTURES[0], CANDIDATES[1], np.ones((4, 4))),
        ("zero", PICTURES[0], CANDIDATES[1], np.zeros((16, 16))),
    ]
    for entry in bad:
        with pytest.raises(ImageError, match=f"item '{entry[0]}': "):
            list(scorer.choose([entry], probes=4))
    found = list(scorer.choose([*bad, ITEMS[0], *bad], probes=4, keep_going=True))
    assert [key for key, _ in found].count("away") == 2 and len(found) == 7
    assert dict(found)["item 0"].index in (0, 1)
    assert all(isinstance(dict(found)[key], ImageError) for key in ("away", "small", "zero"))


def test_bad_arguments(scorer):
    for items in (7, "ab", [("key", PICTURES[0])], [3], [([], PICTURES[0], ("a", "b"))]):
        with pytest.raises(DiveFastError, match="expected items as"):
            list(scorer.choose(items, probes=4, keep_going=True))
    for changes, message in (
        ({"strategy": "best"}, "expected a strategy of"),
        ({"eror": 0.1}, "unknown setting 'eror'"),
        ({"probes": -1}, "at least 1"),
        ({"progress": "yes"}, "progress must be"),
        ({"timesteps": "learned"}, "no learned timesteps"),
    ):
        with pytest.raises(DiveFastError, match=message):
            next(scorer.choose(ITEMS, **changes))


def test_a_strategy_that_names_no_candidate(scorer):
    """Rows beyond the item's own would be those of another item."""
    from dataclasses import dataclass

    from dive_fast.strategies import DefaultProbes

    @dataclass(frozen=True)
    class Beyond(DefaultProbes):
        name = "beyond"
        loss: str = "l2"
        row: int = 2

        def search(self, task):
            yield Losses(torch.tensor([self.row]), torch.arange(2))

    for row in (2, -1):
        with pytest.raises(DiveFastError, match=r"\[0, 2\)"):
            list(scorer.choose(ITEMS[:2], strategy=Beyond(row=row), probes=4))


def test_a_network_that_fails(sd):
    scorer = ImageTextScorer.from_pretrained(sd, device="cpu")
    for parameter in scorer.model.network.parameters():
        parameter.data.fill_(math.nan)
    with pytest.raises(ModelError, match="finite"):
        list(scorer.choose(ITEMS, probes=4, keep_going=True))


def test_what_identifies_a_run(sd):
    scorer = ImageTextScorer.from_pretrained(sd, device="cpu")
    own = DiffusionClassifier.from_pretrained(sd, classes=["cat", "dog"], device="cpu").model
    assert ImageTextScorer(own).identity() == scorer.identity()
    assert "no text" not in str(scorer.identity())
    assert scorer.identity(strategy="auto") != scorer.identity()
    assert scorer.identity(error=0.1) != scorer.identity()


def test_the_bar(scorer, capsys):
    list(scorer.choose(ITEMS, probes=4, progress=len(ITEMS)))
    assert "5/5" in capsys.readouterr().err
    list(scorer.choose(ITEMS, probes=4))
    assert capsys.readouterr().err == ""


def test_what_was_fitted(sd, tmp_path, caplog):
    """Beta and timesteps count; a shortlist is of other classes."""
    import shutil

    directory = shutil.copytree(sd, tmp_path / "sd")
    clf = DiffusionClassifier.from_pretrained(directory, classes=["cat", "dog"], device="cpu")
    clf.model.inverse_temperature = 7.0
    clf.save_fitted()
    caplog.set_level(logging.WARNING)
    scorer = ImageTextScorer.from_pretrained(directory, device="cpu")
    assert not caplog.records
    _, found = next(scorer.choose(ITEMS, strategy="enumerate", probes=4))
    expected = (-7.0 * found.losses).log_softmax(dim=0)
    torch.testing.assert_close(found.log_posterior, expected, rtol=1e-3, atol=1e-4)


def test_the_record_is_of_all_chunks(sd, monkeypatch):
    scorer = ImageTextScorer.from_pretrained(sd, device="cpu", cache="exact")
    monkeypatch.setattr("dive_fast.predict.items.CHUNK_ITEMS", 2)
    found = dict(scorer.choose(ITEMS, strategy="enumerate", probes=4))
    record = scorer.last_run
    assert record.evaluations == sum(choice.evaluations for choice in found.values()) == 112
    assert record.rows == 112 and record.batches >= 3
    # Each text is projected once a chunk, each picture's prefix once a probe.
    texts = [{t for _, _, c in ITEMS[i : i + 2] for t in c} for i in (0, 2, 4)]
    assert record.cache_misses == sum(map(len, texts)) + 5 * 4


def test_learned_weights(sd):
    """w(t) of two bins, as asked for, with a beta of their own; not unless asked for."""
    from dive_fast.core.loss_weights import LossWeights

    weights = LossWeights(1000, (1.5, 0.5), beta=3.0)
    scorer = ImageTextScorer.from_pretrained(sd, device="cpu")
    scorer.model.loss_weights = weights
    plain = scorer.score(PICTURES, TEXTS, probes=6)
    assert plain.beta == 128
    for asked in ("learned", weights):
        found = scorer.score(PICTURES, TEXTS, probes=6, weights=asked)
        assert found.beta == 3.0 and not torch.allclose(found.losses, plain.losses)
        expected = (-3.0 * found.losses.double()).log_softmax(dim=1).float()
        torch.testing.assert_close(found.log_posterior, expected)
        items = [(i, picture, TEXTS) for i, picture in enumerate(PICTURES)]
        chosen = dict(scorer.choose(items, strategy="enumerate", probes=6, weights=asked))
        for i in range(len(PICTURES)):
            torch.testing.assert_close(chosen[i].losses, found.losses[i], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(chosen[i].log_posterior, expected[i], rtol=1e-3, atol=1e-3)
    classes = {text: text for text in TEXTS}
    clf = DiffusionClassifier.from_pretrained(sd, classes=classes, device="cpu")
    (answer,) = clf(PICTURES[0], strategy="enumerate", probes=6, weights=weights)
    torch.testing.assert_close(found.losses[0], answer.losses, rtol=1e-4, atol=1e-5)
    assert scorer.identity(weights="learned") != scorer.identity()
    with pytest.raises(DiveFastError, match="expected weights 'learned'"):
        scorer.score(PICTURES, TEXTS, weights="own")
