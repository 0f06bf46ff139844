"""What `accelerate` saves in Diffusion Classifier's loop: `python -m bench.accelerate_loop`.

The loop is the order of the published `eval_error` (arXiv 2303.16203): prompt by prompt, every
timestep of a prompt before the next prompt, cut into batches. Weights are random: speed does not
depend on them. `--size sd` is Stable Diffusion 1.5's published shape in bf16 and one enumeration
step, 8 prompts at the same (x_t, t); it needs about 4 GB.

Plain and accelerated network take turns on a new image each time, as in a run over images with
the same prompts. Before any time is taken, their errors are compared. The expected ratio counts
FLOPs alone: of P prompts only one pays for the prefix, and none for keys and values that an earlier
image paid for. Appends one line to bench/results/accelerate_loop.jsonl.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import dive_fast
from bench.conftest import provenance
from dive_fast.models.unet import stages

RESULTS = Path(__file__).parent / "results" / "accelerate_loop.jsonl"
TOKENS = 77
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # relative, of one row's error


@dataclass(frozen=True)
class Size:
    channels: tuple[int, ...]
    text_width: int
    side: int
    prompts: int
    timesteps: int
    batch_size: int
    repeats: int
    dtype: torch.dtype


SIZES = {
    "small": Size((32, 64, 128, 128), 64, 16, 8, 6, 4, 5, torch.float32),
    "sd": Size((320, 640, 1280, 1280), 768, 64, 8, 1, 8, 3, torch.bfloat16),
}


def make_unet(size: Size) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=size.side,
        block_out_channels=size.channels,
        cross_attention_dim=size.text_width,
        attention_head_dim=8,
    )


def random_unet(size: Size) -> UNet2DConditionModel:
    default = torch.get_default_dtype()
    torch.set_default_dtype(size.dtype)  # built in place: no copy in float32
    try:
        return make_unet(size).requires_grad_(False).eval()
    finally:
        torch.set_default_dtype(default)


def eval_errors(
    unet, latent: Tensor, text: Tensor, noise: Tensor, ts: list[int], size: Size
) -> Tensor:
    """The errors [prompts, timesteps], in the order of the published loop.

    latent [1, C, h, w], text [P, L, D], noise [T, C, h, w] float32, one for each of ts.
    """
    alpha_bar = torch.linspace(0.00085**0.5, 0.012**0.5, 1000).square().neg().add(1).cumprod(0)
    rows = [(prompt, k) for prompt in range(len(text)) for k in range(len(ts))]
    errors = torch.zeros(len(text), len(ts))
    with torch.inference_mode():
        for start in range(0, len(rows), size.batch_size):
            prompt, k = (
                torch.tensor(i) for i in zip(*rows[start : start + size.batch_size], strict=True)
            )
            t = torch.tensor(ts)[k]
            a, s = (x.sqrt().view(-1, 1, 1, 1) for x in (alpha_bar[t], 1 - alpha_bar[t]))
            x_t = (a * latent + s * noise[k]).to(size.dtype)
            prediction = unet(x_t, t, encoder_hidden_states=text[prompt]).sample
            error = F.mse_loss(prediction.float(), noise[k], reduction="none")
            errors[prompt, k] = error.mean(dim=(1, 2, 3))
    return errors


def work(size: Size) -> dict[str, float]:
    """Shares of one row's FLOPs, counted on the meta device."""
    with torch.device("meta"):
        unet = make_unet(size).requires_grad_(False)
        x_t, t = torch.empty(1, 4, size.side, size.side), torch.zeros(1)
        text = torch.empty(1, TOKENS, size.text_width)

    def flops(function) -> int:
        with FlopCounterMode(display=False) as counter:
            function()
        return counter.get_total_flops()

    total = flops(lambda: unet(x_t, t, text))
    prefix = flops(lambda: stages.prefix(unet, x_t, t)) / total
    kv = flops(lambda: stages.project(unet, text)) / total
    saved = prefix * (1 - 1 / size.prompts) + kv
    return {
        "gflops_per_row": total / 1e9,
        "prefix_share": prefix,
        "kv_share": kv,
        "saved_share": saved,
        "expected_ratio": 1 / (1 - saved),
    }


def measure(size: Size, repeats: int) -> dict[str, object]:
    torch.manual_seed(0)
    unet = random_unet(size)
    fast = dive_fast.accelerate(unet)
    text = torch.randn(size.prompts, TOKENS, size.text_width).to(size.dtype)
    step = 1000 // size.timesteps
    ts = list(range(step // 2, 1000, step))[: size.timesteps]
    seconds: dict[str, list[float]] = {"plain": [], "accelerate": []}
    for picture in range(repeats + 1):
        latent = torch.randn(1, 4, size.side, size.side)
        noise = torch.randn(size.timesteps, 4, size.side, size.side)
        errors = {}
        # In turns, so that neither always comes first.
        order = ("plain", "accelerate") if picture % 2 else ("accelerate", "plain")
        for name in order:
            network = unet if name == "plain" else fast
            start = time.perf_counter()
            errors[name] = eval_errors(network, latent, text, noise, ts, size)
            if picture > 0:
                seconds[name].append(time.perf_counter() - start)
        torch.testing.assert_close(
            errors["accelerate"], errors["plain"], rtol=TOLERANCE[size.dtype], atol=0
        )
    medians = {name: sorted(times)[len(times) // 2] for name, times in seconds.items()}
    return {
        "median": medians,
        "seconds": seconds,
        "ratio": medians["plain"] / medians["accelerate"],
        "statistics": dataclasses.asdict(fast.statistics()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--repeats", type=int, help="pictures timed, after one that is not")
    parser.add_argument("--no-record", action="store_true", help="print only")
    options = parser.parse_args()
    size = SIZES[options.size]
    shares = work(size)
    result = measure(size, options.repeats or size.repeats)
    median, seen = result["median"], result["statistics"]
    print(
        f"{options.size}: {size.prompts} prompts x {size.timesteps} timesteps, "
        f"batches of {size.batch_size}, {size.dtype}, {torch.get_num_threads()} threads"
    )
    print(
        f"prefix {shares['prefix_share']:.2%} and K/V {shares['kv_share']:.2%} of "
        f"{shares['gflops_per_row']:.1f} GFLOP a row"
    )
    print(f"plain {median['plain']:.3f} s, accelerate {median['accelerate']:.3f} s an image")
    print(f"ratio {result['ratio']:.3f}, expected from FLOPs {shares['expected_ratio']:.3f}")
    print(
        f"prefixes: {seen['prefix_misses']} computed, {seen['prefix_hits']} found, "
        f"{seen['prefix_shared']} shared; {seen['nbytes'] / 2**20:.0f} MiB held"
    )
    if options.no_record:
        return
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    line = {
        "time": now,
        **provenance(),
        "threads": torch.get_num_threads(),
        "size": options.size,
        **{k: str(v) if k == "dtype" else v for k, v in dataclasses.asdict(size).items()},
        **shares,
        **result,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    with open(RESULTS, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
