"""Diffusion Classifier's published loop against ``dive_fast.compat``: same call, another import.

    python -m bench.compat_loop --images 40

First it trains a small text-conditional UNet on scikit-learn's digits, with one learned sequence of
embeddings per digit as its prompt (under two minutes on one core). A digit is 8 x 8; its latent
is the 4 x 4 x 4 of ``pixel_unshuffle``. Then three functions get the same arguments for every held
out digit: the published loop, written plainly (``bench/baselines/text_to_image.py``), and ours with
``mode="paper"`` and with its default, the race. No figure is printed unless paper mode gave the
published answers and errors. Appends to bench/results/compat_loop.jsonl.
"""

from __future__ import annotations

import argparse
import time
from argparse import Namespace
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from diffusers import EulerDiscreteScheduler, UNet2DConditionModel
from torch import Tensor
from tqdm import tqdm

from bench.baselines import text_to_image as published
from bench.records import append
from dive_fast import DiffusionClassifier, compat
from dive_fast.core.schedule import Schedule
from dive_fast.data.digits import NAMES, load_digits
from dive_fast.models.unet.wrapped import wrap_unet

SHAPE = (4, 4, 4)
LENGTH, WIDTH = 4, 32


def make_scheduler() -> EulerDiscreteScheduler:
    """Stable Diffusion's."""
    return EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def load_latents(part: str) -> tuple[Tensor, Tensor]:
    """Latents float32 [N, 4, 4, 4] in [-1, 1], and labels [N]."""
    digits = load_digits(part)
    pixels = torch.from_numpy(digits.images).float()[:, None] / 127.5 - 1
    return F.pixel_unshuffle(pixels, 2), torch.from_numpy(digits.labels)


def train(steps: int, batch_size: int = 128) -> tuple[UNet2DConditionModel, Tensor]:
    """A UNet of 0.2 M parameters and its prompts' embeddings [10, L, D], both frozen."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=4,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    text = torch.nn.Parameter(torch.randn(len(NAMES), LENGTH, WIDTH))
    x0, labels = load_latents("train")
    alpha_bar = make_scheduler().alphas_cumprod
    optimizer = torch.optim.AdamW([*unet.parameters(), text], lr=2e-3)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    for _ in tqdm(range(steps), desc="training", mininterval=5):
        picked = torch.randint(len(x0), (batch_size,))
        t, eps = torch.randint(len(alpha_bar), (batch_size,)), torch.randn(batch_size, *SHAPE)
        a, s = alpha_bar[t].sqrt().view(-1, 1, 1, 1), (1 - alpha_bar[t]).sqrt().view(-1, 1, 1, 1)
        prompts = text[labels[picked]]
        prediction = unet(a * x0[picked] + s * eps, t, encoder_hidden_states=prompts).sample
        F.mse_loss(prediction, eps).backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        rate.step()
    return unet.eval().requires_grad_(False), text.detach()


def assert_published(result: tuple, expected: tuple) -> None:
    """The gate: paper mode is the published loop."""
    (pred, data), (expected_pred, expected_data) = result, expected
    assert pred == expected_pred and list(data) == list(expected_data)
    for i, measured in expected_data.items():
        assert torch.equal(data[i]["t"], measured["t"])
        torch.testing.assert_close(
            data[i]["pred_errors"], measured["pred_errors"], rtol=0, atol=1e-5
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=40, help="held-out digits (default: 40)")
    parser.add_argument("--steps", type=int, default=800, help="of training (default: 800)")
    parser.add_argument("--n_samples", type=int, nargs="+", default=[50, 500])
    parser.add_argument("--to_keep", type=int, nargs="+", default=[5, 1])
    parser.add_argument("--batch_size", type=int, default=32)
    options = parser.parse_args()
    unet, text = train(options.steps)
    args = Namespace(
        n_samples=options.n_samples,
        to_keep=options.to_keep,
        batch_size=options.batch_size,
        n_trials=1,
        dtype="float32",
        loss="l2",
        version="2-0",
    )
    functions: dict[str, Callable] = {
        "published": published.eval_prob_adaptive,
        "paper": partial(compat.eval_prob_adaptive, mode="paper"),
        "race": compat.eval_prob_adaptive,
    }
    x0, labels = load_latents("test")
    x0, labels = x0[: options.images], labels[: options.images]
    answers: dict[str, list[int]] = {name: [] for name in functions}
    evaluations = dict.fromkeys(functions, 0)
    seconds = dict.fromkeys(functions, 0.0)
    for i, latent in enumerate(tqdm(x0.split(1), desc="images", mininterval=5)):
        results = {}
        for name, function in functions.items():
            torch.manual_seed(i)
            start = time.perf_counter()
            pred, data = function(unet, latent, text, make_scheduler(), args, latent_size=SHAPE[1])
            seconds[name] += time.perf_counter() - start
            # The same for both: what was measured is what data holds.
            evaluations[name] += sum(len(measured["t"]) for measured in data.values())
            answers[name].append(pred)
            results[name] = (pred, data)
        assert_published(results["paper"], results["published"])

    n, row = len(x0), {}
    for name in functions:
        row[name] = {
            "accuracy": (torch.tensor(answers[name]) == labels).double().mean().item(),
            "agreement": sum(map(int.__eq__, answers[name], answers["published"])) / n,
            "evaluations_per_image": evaluations[name] / n,
            "seconds_per_image": seconds[name] / n,
        }
    print(f"{n} held-out digits, {vars(args)}, {torch.get_num_threads()} threads")
    print("function   accuracy  agreement  evaluations  ratio  seconds  ratio")
    base = row["published"]
    for name, figures in row.items():
        rarer = base["evaluations_per_image"] / figures["evaluations_per_image"]
        faster = base["seconds_per_image"] / figures["seconds_per_image"]
        print(
            f"{name:9} {figures['accuracy']:9.1%} {figures['agreement']:10.1%} "
            f"{figures['evaluations_per_image']:12,.0f} {rarer:6.1f} "
            f"{figures['seconds_per_image']:8.3f} {faster:6.1f}"
        )
    schedule = Schedule.from_alpha_bar(make_scheduler().alphas_cumprod)
    model = wrap_unet(unet, text, schedule, SHAPE)
    classifier = DiffusionClassifier(model, batch_size=options.batch_size)
    append("compat_loop", {"n": n, "args": vars(args), **row}, classifier)


if __name__ == "__main__":
    main()
