"""Networks of users' own: the losses are those of their own training, written out here."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from networks import CLASSES, SIDE, PatchTransformer, Preconditioned, RectifiedUNet

from dive_fast import DiffusionClassifier, ModelError, ProbeList, Schedule

NAMES = [f"kind {i}" for i in range(CLASSES)]
EXACT = {"rtol": 2e-5, "atol": 2e-6}


def make(kind: type) -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind()


def images(channels: int) -> np.ndarray:
    shape = (2, SIDE, SIDE, channels)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def probes(channels: int, timesteps: list[int]) -> ProbeList:
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(len(timesteps), channels, SIDE, SIDE, generator=generator)
    return ProbeList(torch.tensor(timesteps), noise, torch.arange(len(timesteps)))


def assert_losses(clf: DiffusionClassifier, pictures: np.ndarray, expected) -> None:
    """``expected(x in [0, 1], eps, t, label)`` is the training loss of one image."""
    listed = probes(pictures.shape[-1], [3, 500, 990])
    found = clf.losses(pictures, probes=listed)
    pixels = torch.tensor(pictures).permute(0, 3, 1, 2) / 255
    for b in range(len(pixels)):
        for c in range(CLASSES):
            for k, (t, eps) in enumerate(zip(listed.timesteps, listed.noise, strict=True)):
                with torch.no_grad():
                    loss = expected(pixels[b : b + 1], eps[None], int(t), c)
                torch.testing.assert_close(found[b, c, k], loss, **EXACT)
    assert found.std(dim=1).min() > 1e-4  # the class is seen


def test_a_ddpm_transformer_that_looks_labels_up() -> None:
    net = make(PatchTransformer).train()
    clf = DiffusionClassifier.from_network(
        net, schedule=Schedule.linear(), embeddings=net.labels, shape=(1, SIDE, SIDE), names=NAMES
    )
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)

    def loss(x, eps, t, label):
        a = alpha_bar[t].float()
        x_t = a.sqrt() * (2 * x - 1) + (1 - a).sqrt() * eps
        found = net(x_t, torch.tensor([t]), torch.tensor([label]))  # labels still work
        return (found[:, :1] - eps).square().mean()

    assert_losses(clf, images(1), loss)
    assert not net.training and not any(p.requires_grad for p in net.parameters())
    assert clf.names == tuple(NAMES) and len(clf.model.vocabulary) == CLASSES
    torch.testing.assert_close(clf.model.vocabulary.unconditional, net.labels.weight[-1])


@pytest.mark.parametrize("predicts", ["denoised", "edm"])
def test_an_edm_network(predicts: str) -> None:
    net = make(Preconditioned)
    schedule = Schedule.edm(sigma_data=0.6, mean=-1.0, std=1.4)
    call = (lambda net, x, t, c: net.raw(x, t, c)) if predicts == "edm" else None
    clf = DiffusionClassifier.from_network(
        net, schedule=schedule, embeddings=torch.eye(CLASSES), shape=(3, SIDE, SIDE),
        call=call, predicts=predicts,
    )  # fmt: skip

    def loss(x, eps, t, label):
        # EDM, eq. 2 and table 1: lambda(sigma) || D(x0 + sigma eps) - x0 ||^2.
        quantile = torch.distributions.Normal(-1.0, 1.4).icdf(torch.tensor((t + 0.5) / 1000))
        sigma, x0 = quantile.exp(), 2 * x - 1
        weight = (sigma**2 + 0.6**2) / (sigma * 0.6) ** 2
        one_hot = torch.eye(CLASSES)[[label]]
        return weight * (net(x0 + sigma * eps, sigma[None], one_hot) - x0).square().mean()

    assert_losses(clf, images(3), loss)


def test_a_rectified_flow_that_runs_from_noise_to_data() -> None:
    net = make(RectifiedUNet)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    clf = DiffusionClassifier.from_network(
        net, schedule=Schedule.flow(), embeddings=net.classes, shape=(3, SIDE, SIDE),
        call=lambda net, x, t, c: net({"x": x, "time": t, "class_vector": c})["velocity"],
        predicts="data - noise", pixels=(mean, std),
    )  # fmt: skip

    def loss(x, eps, t, label):
        data = (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
        time = torch.tensor([1 - (t + 1) / 1000])
        x_t = time * data + (1 - time) * eps
        vector = net.classes.weight[[label]]
        found = net({"x": x_t, "time": time, "class_vector": vector})["velocity"]
        return (found - (data - eps)).square().mean()

    assert_losses(clf, images(3), loss)


@pytest.mark.parametrize("strategy", ["auto", "race", "invert"])
def test_every_strategy_runs(strategy: str) -> None:
    net = make(PatchTransformer)
    clf = DiffusionClassifier.from_network(
        net, schedule=Schedule.cosine(), embeddings=net.labels, shape=(1, SIDE, SIDE), names=NAMES
    )
    answers = clf(images(1), strategy=strategy, probes=8)
    assert [type(a.index) for a in answers] == [int, int]


@pytest.mark.parametrize("time", ["t / T", "1000 sigma", "sigma"])
def test_other_times(time: str) -> None:
    told = []

    def call(net, x, t, c):
        told.append(t)
        return x * c.sum(dim=1).view(-1, 1, 1, 1)

    clf = DiffusionClassifier.from_network(
        torch.nn.Identity(), schedule=Schedule.flow(100), embeddings=torch.eye(3) + 1,
        shape=(1, 4, 4), call=call, time=time,
    )  # fmt: skip
    told.clear()
    clf.losses(latents=torch.zeros(1, 1, 4, 4), probes=ProbeList(
        torch.tensor([24]), torch.zeros(1, 1, 4, 4), torch.zeros(1, dtype=torch.int64)
    ))  # fmt: skip
    expected = {"t / T": 0.24, "1000 sigma": 250.0, "sigma": 0.25}[time]
    torch.testing.assert_close(told[0], torch.full_like(told[0], expected))


def test_identity_tells_weights_and_conventions_apart() -> None:
    def identity(**changes) -> str:
        net = make(RectifiedUNet)
        if changes.pop("other", False):
            net.up.bias.data += 1
        call = lambda net, x, t, c: net({"x": x, "time": t, "class_vector": c})["velocity"]  # noqa: E731
        options = {"schedule": Schedule.flow(), "embeddings": net.classes, "call": call}
        clf = DiffusionClassifier.from_network(net, shape=(3, SIDE, SIDE), **options | changes)
        return json.dumps(clf.identity())

    found = {identity(), identity(other=True), identity(pixels="[0, 1]"),
             identity(time="1 - sigma"), identity(schedule=Schedule.flow(500)),
             identity(predicts="data - noise")}  # fmt: skip
    assert len(found) == 6 and identity() in found


def broken(output) -> object:
    return lambda net, x, t, c: output(x, c)


REFUSED = {
    "no module": ({"network": 7}, "expected a torch.nn.Module as network, got int"),
    "no schedule": ({"schedule": "flow"}, "expected a dive_fast.Schedule, got str"),
    "shape": ({"shape": (3, 8)}, r"expected a shape \(channels, side, side\), got \(3, 8\)"),
    "no call": ({"call": 3}, "expected call to be a function, got int"),
    "names": ({"names": ["a"]}, "a vocabulary of 5 rows needs as many names, got 1"),
    "table": ({"embeddings": torch.zeros(5)}, r"float tensor \[C, D\], got \[5\]"),
    "table of NaN": ({"embeddings": torch.full((5, 4), math.nan)}, "expected finite embeddings"),
    "pixels": ({"pixels": "[0, 255]"}, r"expected pixels of .* got '\[0, 255\]'"),
    "means": ({"pixels": ((0.5, 0.5), (1, 1))}, "for each of 3 channels"),
    "time": ({"time": "seconds"}, "expected time to be one of t, .* got 'seconds'"),
    "another kind": ({"predicts": "noise - data"}, "schedule of the kind flow, got variance"),
    "edm": ({"schedule": Schedule.edm(), "predicts": "epsilon"}, "variance-preserving, got EDM"),
    "target": ({"predicts": "sample"}, "target 'sample', got one with 'epsilon'"),
    "raises": ({"call": lambda *a: 1 / 0}, r"cannot be called .*\[2, 3, 8, 8\].*ZeroDivision"),
    "tuple": ({"call": broken(lambda x, c: (x,))}, "got a tuple; let call pick the prediction"),
    "size": ({"call": broken(lambda x, c: x[..., 1:])}, r"to give .* got \[2, 3, 8, 7\]"),
    "NaN": ({"call": broken(lambda x, c: x * c.sum() / 0)}, "expected finite predictions"),
    "no gradient": ({"call": broken(lambda x, c: x * c.detach().sum())}, "to have a gradient"),
    "unused": ({"call": broken(lambda x, c: x + 0 * c.sum())}, "does not change what"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=list(REFUSED))
def test_what_cannot_be_used(change: dict, message: str) -> None:
    arguments = {
        "network": torch.nn.Identity(), "schedule": Schedule.linear(), "shape": (3, 8, 8),
        "embeddings": torch.eye(5), "call": broken(lambda x, c: x * c.sum(1).view(-1, 1, 1, 1)),
    } | change  # fmt: skip
    with pytest.raises(ModelError, match=message):
        DiffusionClassifier.from_network(arguments.pop("network"), **arguments)
