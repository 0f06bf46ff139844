"""What blocks give, of networks of every kind: the hook's tensors, or their part of the image."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import (
    DDPMPipeline,
    DDPMScheduler,
    DiTTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from feature_checks import answered, caught, check_features, diffusion, first, own, plain, second
from networks import SIDE, Nested, PatchTransformer, RectifiedUNet
from tiny_class_unet import make_unet, write
from tiny_layout import make_layout_model, make_layout_transformer
from torch import Tensor

from dive_fast import DiffusionClassifier, ProbeList, Schedule
from dive_fast.core.requests import Features
from dive_fast.models.layers import layer_names

UNET = {
    "down_blocks.0": first,
    "down_blocks.1": first,
    "mid_block": plain,
    "up_blocks.0": plain,
    "up_blocks.1": plain,
}
scaled_linear = partial(diffusion, start=0.00085**0.5, end=0.012**0.5, power=2)


def test_blocks_of_a_dit(dit_dir: Path) -> None:
    network = DiTTransformer2DModel.from_pretrained(dit_dir / "transformer").eval()
    check_features(
        DiffusionClassifier.from_pretrained(dit_dir),
        network,
        lambda x_t, t, c: network(x_t, torch.tensor([t]), torch.tensor([c])),
        diffusion,
        {"transformer_blocks.0": plain, "transformer_blocks.1": plain},
    )


@pytest.mark.parametrize("cache", ["off", "exact", "encoder"])
def test_blocks_of_stable_diffusion(sd: Path, cache: str) -> None:
    """The parts of a staged network call no block as a whole; features do."""
    pipeline = StableDiffusionPipeline.from_pretrained(sd)
    texts = [pipeline.encode_prompt(f"a photo of a {c}.", "cpu", 1, False)[0] for c in "ab"]
    clf = DiffusionClassifier.from_pretrained(sd, classes=["a", "b"], cache=cache)
    check_features(
        clf,
        pipeline.unet,
        lambda x_t, t, c: pipeline.unet(x_t, t, encoder_hidden_states=texts[c]),
        scaled_linear,
        UNET,
        cache=cache,
    )


def test_blocks_of_stable_diffusion_xl(sdxl: Path) -> None:
    pipeline = StableDiffusionXLPipeline.from_pretrained(sdxl, add_watermarker=False)
    ids = torch.tensor([[16, 16, 0, 0, 16, 16]])

    def ask(x_t: Tensor, t: int, c: int) -> None:
        text, _, pooled, _ = pipeline.encode_prompt(
            f"a photo of a {'ab'[c]}.", device="cpu", do_classifier_free_guidance=False
        )
        added = {"text_embeds": pooled, "time_ids": ids}
        pipeline.unet(x_t, t, encoder_hidden_states=text, added_cond_kwargs=added)

    clf = DiffusionClassifier.from_pretrained(sdxl, classes=["a", "b"])
    check_features(clf, pipeline.unet, ask, scaled_linear, UNET)


def test_blocks_of_a_unet_of_class_labels(tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = make_unet()
    write(DDPMPipeline(unet, DDPMScheduler()), tmp_path)
    clf = DiffusionClassifier.from_pretrained(tmp_path)
    ask = lambda x_t, t, c: unet(x_t, t, class_labels=torch.tensor([c]))  # noqa: E731
    check_features(clf, unet, ask, diffusion, UNET)


@pytest.mark.parametrize(
    ("make", "picks"),
    [
        (make_layout_model, UNET),
        (make_layout_transformer, dict.fromkeys(map("transformer_blocks.{}".format, "01"), second)),
    ],
)
def test_blocks_of_layout_to_image_models(make, picks) -> None:
    """A relaxed row is the embeddings of a layout."""
    model = make()
    condition = torch.randn(2, model.layout_format.n_slots * model.vocabulary.dim)
    x0, eps = torch.randn(2, *model.latent_shape), torch.randn(1, *model.latent_shape)
    a, s = diffusion(300)
    for layer, pick in picks.items():
        expected = pick(caught(model.network, layer, lambda: model.predict(
            a * x0[:1] + s * eps, torch.tensor([300]), condition[1:]
        )))  # fmt: skip
        clf = type("Engineless", (), {"model": model})
        probes = ProbeList(torch.tensor([300]), eps)
        request = Features(condition, torch.tensor([0]), layer, None)
        ((found,), _) = answered(clf, x0, probes, request)
        torch.testing.assert_close(found[1, 0], expected[0], rtol=1e-4, atol=1e-4)
    assert layer_names(model) == tuple(picks)


def test_blocks_of_a_network_of_ones_own() -> None:
    clf = own(Nested)
    network = clf.model.network
    names = ("downs.0.0", "downs.0.1", "downs.1.0", "downs.1.1", "wrapped.1.ups.0", "unused.0")
    assert clf.layers == names
    x0, eps = torch.randn(2, 1, SIDE, SIDE), torch.randn(1, 1, SIDE, SIDE)
    a, s = diffusion(123)
    probes, rows = ProbeList(torch.tensor([123]), eps), torch.tensor([3])
    for layer, pick in (("downs.1.0", first), (4, plain), ("middle", plain), ("into", plain)):
        request = Features(rows, torch.tensor([0]), layer, None)
        ((found,), _) = answered(clf, x0, probes, request)
        name = names[layer] if layer == 4 else layer
        ask = partial(network, a * x0[:1] + s * eps, torch.tensor([123]), rows)
        expected = pick(caught(network, name, ask))
        torch.testing.assert_close(found[0, 0], expected[0], rtol=1e-4, atol=1e-5)


def test_without_lists_the_parts_are_layers() -> None:
    clf = own(PatchTransformer)
    assert clf.layers == ("patches", "block", "out")
    x0 = torch.randn(2, 1, SIDE, SIDE)
    assert clf.features(latents=x0, pool=None).shape == (2, 16, 16)  # of "block"
    flow = own(
        RectifiedUNet, 3, schedule=Schedule.flow(), predicts="data - noise",
        call=lambda net, x, t, c: net({"x": x, "time": t, "class_vector": c})["velocity"],
    )  # fmt: skip
    assert flow.layers == ("down", "middle", "up", "time")
    found = flow.features(latents=torch.randn(2, 3, SIDE, SIDE), layer=1, pool=None)
    assert found.shape == (2, 10, 4, 4)
