"""What share of an inversion step each op is: `python -m bench.profile_step digits|sd`.

A step is what DIVE repeats: project the embedding on the table, noise, predict, take the loss, and
go back to the embedding. `digits` is the embedded model, 25 probes. `sd` is a UNet of Stable
Diffusion 1.5's published shape with random weights in bf16 and one probe, its condition one row of
a table of 1000 x 77 x 768: speed does not depend on the values, and everything but the projection
grows with the number of probes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from dive_fast import ops

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]  # x_t, timesteps, embedding -> prediction


def digits() -> tuple[Predict, Tensor, tuple[int, ...], int]:
    from dive_fast.models import load_model

    model = load_model("digits")
    table = model.vocabulary.table

    def predict(x_t: Tensor, t: Tensor, embedding: Tensor) -> Tensor:
        return model.predict(x_t, t, embedding.expand(len(x_t), -1))

    return predict, table, tuple(model.latent_shape), 25


def sd() -> tuple[Predict, Tensor, tuple[int, ...], int]:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=64,
            block_out_channels=(320, 640, 1280, 1280),
            cross_attention_dim=768,
            attention_head_dim=8,
        ).to(torch.bfloat16)
    unet = unet.to_empty(device="cpu").requires_grad_(False).eval()
    for parameter in unet.parameters():
        parameter.uniform_(-0.01, 0.01)
    table = torch.randn(1000, 77 * 768)

    def predict(x_t: Tensor, t: Tensor, embedding: Tensor) -> Tensor:
        text = embedding.view(1, 77, 768).expand(len(x_t), -1, -1)
        return unet(x_t.bfloat16(), t, text.bfloat16()).sample

    return predict, table, (4, 64, 64), 1


def step_seconds(predict: Predict, table: Tensor, shape: tuple[int, ...], probes: int) -> dict:
    """Seconds of every part of one step."""
    seconds: dict[str, float] = {}

    def timed(name: str, function: Callable):
        start = time.perf_counter()
        result = function()
        seconds[name] = time.perf_counter() - start
        return result

    x0, noise = torch.randn(1, *shape), torch.randn(probes, *shape)
    image, probe = torch.zeros(probes, dtype=torch.int64), torch.arange(probes)
    a, s, t = torch.rand(probes), torch.rand(probes), torch.randint(0, 1000, (probes,))
    v = table.mean(dim=0, keepdim=True).requires_grad_()
    rows, _ = timed("projection (nearest_row)", lambda: ops.projection(v, table))
    x_t = timed("q_sample", lambda: ops.q_sample(x0, image, noise, probe, a, s))
    prediction = timed("network forward", lambda: predict(x_t, t, rows))
    loss = timed(
        "noise_prediction_loss forward",
        lambda: ops.noise_prediction_loss(prediction, noise, probe, x0, image, a, s),
    )
    ones = torch.full((probes,), 1 / probes)
    (grad,) = timed(
        "noise_prediction_loss backward",
        lambda: torch.autograd.grad(loss, prediction, ones),
    )
    # The graph of the loss is used up; the prediction's is not.
    timed("network backward", lambda: torch.autograd.grad(prediction, v, grad))
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=("digits", "sd"))
    parser.add_argument("--steps", type=int, help="steps timed, after one that is not")
    arguments = parser.parse_args()
    parts = {"digits": digits, "sd": sd}[arguments.model]()
    steps = arguments.steps or (50 if arguments.model == "digits" else 1)
    runs = [step_seconds(*parts) for _ in range(steps + 1)][1:]
    median = {name: sorted(run[name] for run in runs)[len(runs) // 2] for name in runs[0]}
    total = sum(median.values())
    print(f"{arguments.model}, {torch.get_num_threads()} threads, one step {1e3 * total:.2f} ms")
    for name, seconds in median.items():
        print(f"{name:32} {1e3 * seconds:10.3f} ms {seconds / total:8.2%}")


if __name__ == "__main__":
    main()
