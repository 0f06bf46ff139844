"""Features by the engine and by users' calls: the same in every batch, by their formulas."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from feature_checks import answered, caught, diffusion, own
from networks import SIDE, Nested
from tiny_transformer import make_dit
from torch import Tensor, nn

from dive_fast import DiffusionClassifier, EngineOptions
from dive_fast.core.probes import low_discrepancy_probes
from dive_fast.core.requests import Features, Gradients, Losses


def classifier(**options) -> DiffusionClassifier:
    return DiffusionClassifier(make_dit(layers=3), batch_size=7, options=EngineOptions(**options))


def latents(n: int = 3) -> Tensor:
    return torch.randn(n, 2, 4, 4, generator=torch.Generator().manual_seed(2))


# -- the engine -----------------------------------------------------------------------------------


def mixed(layer: str | int = 1) -> list:
    v = torch.randn(2, 16, generator=torch.Generator().manual_seed(4))
    return [
        Features(torch.tensor([4, 0, 2]), torch.tensor([5, 1, 1, 3]), layer, "mean"),
        Features(v, torch.arange(6), layer, None),
        Features(torch.tensor([1]), torch.arange(6), 2, "attention"),
    ]


@pytest.mark.parametrize("options", [{}, {"cache": "exact"}, {"cache": "encoder"}])
def test_answers_do_not_depend_on_the_batch(options) -> None:
    clf = classifier()
    probes = low_discrepancy_probes(6, 1000, (2, 4, 4))
    alone = [answered(clf, latents()[i : i + 1], probes, *mixed(), batch_size=1)[0] for i in (0, 1)]
    for batch_size in (2, 7, 100):
        found = answered(clf, latents(), probes, *mixed(), batch_size=batch_size, **options)
        backwards = answered(clf, latents().flip(0), probes, *mixed()[::-1], batch_size=batch_size)
        for i in (0, 1):
            torch.testing.assert_close(found[i], alone[i], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(backwards[-1 - i][::-1], alone[i], rtol=1e-4, atol=1e-4)
    shapes = [tuple(reply.shape) for reply in alone[0]]
    assert shapes == [(3, 4, 16), (2, 6, 4, 16), (1, 6, 16)]
    assert all(reply.dtype == torch.float32 and not reply.requires_grad for reply in alone[0])


def test_other_requests_beside_them_are_answered_as_ever() -> None:
    clf = classifier()
    probes = low_discrepancy_probes(6, 1000, (2, 4, 4))
    ids = torch.arange(6)
    plain = [Losses(torch.arange(5), ids), Gradients(clf.model.vocabulary.rows([1]), ids)]
    images = latents(2)
    one = answered(clf, images[:1], probes, plain[0], batch_size=4)[0]
    found = answered(clf, images, probes, mixed()[0], plain[0], mixed()[1], plain[1], batch_size=4)
    torch.testing.assert_close(found[0][1], one[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[0][3].losses, one[0][1:2], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("layer", "runs"), [(0, 1), (1, 2), (2, 3)])
def test_the_network_stops_behind_the_block(layer: int, runs: int) -> None:
    clf = classifier()
    ran: list[int] = []
    blocks = clf.model.network.transformer_blocks
    for i, block in enumerate(blocks):
        block.register_forward_pre_hook(lambda *_, i=i: ran.append(i))
    clf.features(latents=latents(), layer=layer)
    assert ran == list(range(runs))
    assert clf.last_run.evaluations == clf.last_run.rows == 3
    assert not any(block._forward_hooks for block in blocks)  # nothing stays behind
    clf.losses(latents=latents(1), probes=1)
    assert ran[runs:] == [0, 1, 2]


def test_a_network_that_handles_every_exception_goes_on() -> None:
    def call(network: nn.Module, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        try:
            return network(x, t, c)
        except:  # noqa: E722
            return x

    x0 = torch.randn(2, 1, SIDE, SIDE)
    torch.testing.assert_close(
        own(Nested, call=call).features(latents=x0), own(Nested).features(latents=x0)
    )


@pytest.mark.parametrize("options", [{"autocast": "bfloat16"}, {"compile": True}])
def test_precision_and_compilation(options, monkeypatch) -> None:
    """Compiled code would not call hooks: features run without."""
    monkeypatch.setattr(torch, "compile", lambda function: function)
    found = classifier(**options).features(latents=latents(), layer=2)
    expected = classifier().features(latents=latents(), layer=2)
    assert found.dtype == torch.float32
    tolerance = 1e-5 if "compile" in options else 0.1 * expected.std().item()
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
    assert torch.equal(found, expected) == ("compile" in options)


def test_memory_that_runs_out_halves_the_batch() -> None:
    clf = classifier()
    predict, rows = clf.model.predict, []

    def small(x_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        if len(x_t) > 3:
            raise torch.OutOfMemoryError
        rows.append(len(x_t))
        return predict(x_t, t, condition)

    clf.model.predict = small
    found = clf.features(latents=latents(5))
    assert rows == [2, 2, 1]
    torch.testing.assert_close(found, classifier().features(latents=latents(5)))


# -- what users call ------------------------------------------------------------------------------


def by_hand(clf: DiffusionClassifier, t: int, eps: Tensor, condition: Tensor, layer: int) -> Tensor:
    """[B, N, D] of a DiT's block."""
    a, s = diffusion(t)
    x_t, rows = a * latents() + s * eps, condition.expand(3, -1)
    block = f"transformer_blocks.{layer}"
    ask = partial(clf.model.predict, x_t, torch.full((3,), t), rows)
    return caught(clf.model.network, block, ask)


def drawn(n: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 4, 4, generator=generator) for _ in range(n)]


def test_pools() -> None:
    """The mean m of the positions; softmax(z_i . m / sqrt(D)) as weights; none."""
    clf = classifier()
    z = by_hand(clf, 300, drawn(1)[0], clf.model.vocabulary.table.mean(0, keepdim=True), 1)
    given = {"latents": latents(), "layer": 1, "timestep": 300}
    torch.testing.assert_close(clf.features(**given, pool=None), z, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(clf.features(**given), z.mean(dim=1), rtol=1e-4, atol=1e-5)
    expected = []
    for tokens in z.tolist():
        width = range(len(tokens[0]))
        m = [sum(token[d] for token in tokens) / len(tokens) for d in width]
        scores = torch.tensor([sum(token[d] * m[d] for d in width) / 4 for token in tokens])
        weights = (scores.exp() / scores.exp().sum()).tolist()
        expected.append(
            [sum(w * z[d] for w, z in zip(weights, tokens, strict=True)) for d in width]
        )
    found = clf.features(**given, pool="attention")
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-4, atol=1e-4)


def test_the_pools_of_feature_maps_are_over_their_pixels() -> None:
    clf = own(Nested)
    given = {"latents": torch.randn(2, 1, SIDE, SIDE), "layer": "middle"}
    maps = clf.features(**given, pool=None)
    assert maps.shape == (2, 6, SIDE, SIDE)
    torch.testing.assert_close(clf.features(**given), maps.mean(dim=(2, 3)))
    m = maps.mean(dim=(2, 3))
    weights = (torch.einsum("bdhw,bd->bhw", maps, m) / 6**0.5).flatten(1).softmax(dim=1)
    expected = torch.einsum("bdp,bp->bd", maps.flatten(2), weights)
    torch.testing.assert_close(clf.features(**given, pool="attention"), expected)


def test_defaults_are_the_middle_block_little_noise_and_the_mean_condition() -> None:
    clf = classifier()
    v0 = clf.model.vocabulary.table.mean(dim=0, keepdim=True)
    expected = by_hand(clf, 100, drawn(1)[0], v0, 1).mean(dim=1)
    torch.testing.assert_close(clf.features(latents=latents()), expected, rtol=1e-4, atol=1e-5)
    assert clf.layers == tuple(f"transformer_blocks.{i}" for i in range(3))


def test_conditions_layers_seeds_and_noises() -> None:
    clf = classifier()
    table = clf.model.vocabulary.table
    null = clf.model.vocabulary.unconditional[None]
    asked = partial(clf.features, latents=latents(), timestep=7)
    for condition, row in ((3, table[3:4]), (0, table[:1]), ("null", null)):
        expected = by_hand(clf, 7, drawn(1, 5)[0], row, 2).mean(dim=1)
        for layer in (2, -1, "transformer_blocks.2"):
            found = asked(layer=layer, condition=condition, seed=5)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    several = [by_hand(clf, 7, eps, table[3:4], 0) for eps in drawn(3)]
    found = asked(layer=0, condition=3, noises=3, pool=None)
    torch.testing.assert_close(found, torch.stack(several).mean(0), rtol=1e-4, atol=1e-5)
    assert clf.last_run.evaluations == 9
    assert asked(seed=1).ne(asked()).any() and torch.equal(asked(), asked(progress=True))


def test_images_are_encoded_and_modules_named_in_dots(dit_dir: Path) -> None:
    clf = DiffusionClassifier.from_pretrained(dit_dir)
    images = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for layer in (1, "transformer_blocks.1.attn1", "pos_embed"):
        found = clf.features(images, layer=layer)
        torch.testing.assert_close(found, clf.features(latents=clf.encode(images), layer=layer))
        assert found.shape == (2, 16)
    with torch.inference_mode():
        torch.testing.assert_close(clf.features(images, layer=layer), found)


def test_of_several_prompts_of_a_class_the_mean_is_taken(sd: Path) -> None:
    given = {"latents": torch.randn(2, 4, 8, 8), "condition": 1}
    templates = ["a photo of a {}.", "the {}"]
    both = DiffusionClassifier.from_pretrained(
        sd, classes=["cat", "dog"], templates=templates, average="loss"
    )
    each = [
        DiffusionClassifier.from_pretrained(sd, classes=["cat", "dog"], templates=[template])
        for template in templates
    ]
    expected = torch.stack([clf.features(**given) for clf in each]).mean(dim=0)
    torch.testing.assert_close(both.features(**given), expected, rtol=1e-4, atol=1e-5)
    assert both.last_run.evaluations == 4
    for condition in ("mean", "null"):
        assert both.features(**given | {"condition": condition}).isfinite().all()
