"""What a block gives, caught by a hook of one's own on the pipeline's own network."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from networks import SIDE, RectifiedUNet
from torch import Tensor, nn

from dive_fast import DiffusionClassifier, EngineOptions, ProbeList, Schedule
from dive_fast.core.requests import Answer, Features, Request
from dive_fast.engine import Engine, Job
from dive_fast.engine.objective import Objective

Pick = Callable[[Any], Tensor]


def plain(output: Any) -> Tensor:
    return output


def first(output: Any) -> Tensor:
    return output[0]


def second(output: Any) -> Tensor:
    return output[1]


def caught(network: nn.Module, layer: str, ask: Callable[[], Any]) -> Any:
    """What one module gives while the network is asked."""
    found: list[Any] = []
    handle = network.get_submodule(layer).register_forward_hook(lambda *call: found.append(call[2]))
    try:
        with torch.no_grad():
            ask()
    finally:
        handle.remove()
    return found[0]


def answered(
    clf: DiffusionClassifier,
    latents: Tensor,
    probes: ProbeList,
    *requests: Request,
    batch_size: int = 5,
    **options: Any,
) -> list[list[Tensor]]:
    """The engine's answers to the requests, image by image."""

    def search():
        replies = []
        for request in requests:
            replies.append((yield request))
        return Answer(0, torch.zeros(1), torch.zeros(1, dtype=torch.int64), {"replies": replies})

    engine = Engine(clf.model, batch_size, options=EngineOptions(**options))
    jobs = [Job(i, x0, search()) for i, x0 in enumerate(latents)]
    found = {f.key: f for f in engine.run(jobs, probes, Objective())}
    rows = sum(r.passes * len(r.conditions) * len(r.probe_ids) for r in requests)
    assert all(f.evaluations == rows for f in found.values())
    return [found[i].answer.trace["replies"] for i in range(len(latents))]


def check_features(
    clf: DiffusionClassifier,
    network: nn.Module,
    ask: Callable[[Tensor, int, int], Any],
    factors: Callable[[int], tuple[float, float]],
    picks: dict[str, Pick],
    **options: Any,
) -> None:
    """Every block of two classes' rows, in batches in which both are.

    Args:
        network: the pipeline's own.
        ask: runs it on x_t [1, C, h, w] at t for a class, as the pipeline would.
        factors: t to a and s of x_t = a x0 + s eps.
        picks: of every block, the image's part of what it gives.
        options: of the engine.
    """
    assert clf.layers == tuple(picks)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, *clf.model.latent_shape, generator=generator)
    noise = torch.randn(2, *clf.model.latent_shape, generator=generator)
    times = [40, 700]
    probes = ProbeList(torch.tensor(times), noise)
    requests = [Features(torch.arange(2), torch.arange(2), layer, None) for layer in picks]
    found = answered(clf, latents, probes, *requests, **options)
    for layer, (name, pick) in enumerate(picks.items()):
        for image, x0 in enumerate(latents):
            for k, (t, eps) in enumerate(zip(times, noise, strict=True)):
                a, s = factors(t)
                x_t = (a * x0 + s * eps)[None]
                for c in range(2):
                    expected = pick(caught(network, name, partial(ask, x_t, t, c)))[0]
                    # Rounding is that of the largest, of up to some hundreds here.
                    atol = 1e-4 * max(1, expected.abs().max().item())
                    torch.testing.assert_close(
                        found[image][layer][c, k], expected, rtol=1e-4, atol=atol
                    )
    # The condition is seen.
    assert (found[0][-1][0] - found[0][-1][1]).abs().max() > 1e-4


def flow(t: int) -> tuple[float, float]:
    """x_t = (1 - sigma) x0 + sigma eps, sigma = (t + 1) / 1000."""
    return 1 - (t + 1) / 1000, (t + 1) / 1000


def diffusion(
    t: int, start: float = 1e-4, end: float = 0.02, power: int = 1
) -> tuple[float, float]:
    """x_t = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) eps, of betas in a line or its power."""
    betas = torch.linspace(start, end, 1000, dtype=torch.float64) ** power
    alpha_bar = torch.cumprod(1 - betas, dim=0)[t]
    return alpha_bar.sqrt().item(), (1 - alpha_bar).sqrt().item()


def own(kind: type, channels: int = 1, **options) -> DiffusionClassifier:
    """Of a network in ``networks``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = kind()
    table = network.classes if kind is RectifiedUNet else network.labels
    given = {"schedule": Schedule.linear(), "embeddings": table, "shape": (channels, SIDE, SIDE)}
    return DiffusionClassifier.from_network(network, **given | options)
