"""What a pipeline's own ``__call__`` asks its network, and text parts that many pipelines share."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from dive_fast import DiffusionClassifier


class Asked(NamedTuple):
    """One call of the network: what it was given by name, and what it gave."""

    given: dict[str, Any]
    output: Tensor


def intercept(pipeline: Any, network: nn.Module, **call: Any) -> list[Asked]:
    """Runs the pipeline and notes every call of its network."""
    asked: list[Asked] = []
    names = list(inspect.signature(type(network).forward).parameters)[1:]

    def noted(module, args, kwargs, output):
        given = dict(zip(names, args, strict=False)) | kwargs
        asked.append(Asked(given, output[0] if isinstance(output, tuple) else output.sample))

    handle = network.register_forward_hook(noted, with_kwargs=True)
    try:
        pipeline.set_progress_bar_config(disable=True)
        pipeline(**{"output_type": "latent"} | call)
    finally:
        handle.remove()
    return asked


def make_t5_tokenizer(length: int = 24) -> T5Tokenizer:
    """Letters, and the words of "a photo of a"."""
    letters = [*"abcdefghijklmnopqrstuvwxyz.,'!"]
    words = ["▁", *(f"▁{c}" for c in letters), "▁photo", "▁of"]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0)]
    scored = [(word, -2.0) for word in words] + [(c, -3.0) for c in letters]
    return T5Tokenizer(vocab=special + scored, extra_ids=0, model_max_length=length)


def make_t5(tokenizer: T5Tokenizer, width: int = 16) -> T5EncoderModel:
    """Two layers; the weights scaled so that the prompt moves the result."""
    config = T5Config(
        vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=2,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    model = T5EncoderModel(config).eval()
    with torch.no_grad():
        model.shared.weight.mul_(3)
    return model


def make_gemma_tokenizer() -> GemmaTokenizer:
    """The letters of "a photo of a cat, dog or bird.": long instructions become few tokens."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    words = [*special, *"\u2581abcdfghioprt.", "ph"]
    vocab = {word: i for i, word in enumerate(words)}
    return GemmaTokenizer(vocab=vocab, merges=[("p", "h")], add_bos_token=True)


def make_gemma(tokenizer: GemmaTokenizer, width: int = 16) -> Gemma2Model:
    """Two layers."""
    config = Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, query_pre_attn_scalar=8,
        pad_token_id=0, eos_token_id=1, bos_token_id=2,
    )  # fmt: skip
    model = Gemma2Model(config).eval()
    with torch.no_grad():
        model.embed_tokens.weight.mul_(20)
    return model


def change_json(path: Path, **changes: Any) -> None:
    """Of the object in it, these entries."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def save(make: Callable[[], Any], directory: Path, seed: int = 0) -> Path:
    """Builds a pipeline with seeded weights and writes it as its ``save_pretrained`` does."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = make()
    pipeline.save_pretrained(directory)
    return directory


def check_gradient(model: Any, t: int = 500) -> None:
    """d(loss)/d(condition) in float64 is what finite differences say, but for the constants.

    Networks take some steps in float32 whatever they compute in: hence the step and the tolerance.
    """
    model.to(torch.device("cpu"), torch.float64)
    generator = torch.Generator().manual_seed(0)
    row = model.vocabulary.table[:1].double().requires_grad_()
    x_t = torch.randn(1, *model.latent_shape, generator=generator, dtype=torch.float64)

    def loss(row: Tensor) -> Tensor:
        return model.predict(x_t, torch.tensor([t]), row)[:, : x_t.shape[1]].square().mean()

    gradient = torch.autograd.grad(loss(row), row)[0]
    # Along the gradient: most of a random direction would be rounding.
    direction, step = gradient / gradient.norm(), 1e-2
    with torch.no_grad():
        difference = (loss(row + step * direction) - loss(row - step * direction)) / (2 * step)
    torch.testing.assert_close((gradient * direction).sum(), difference, rtol=2e-3, atol=0)
    assert gradient.norm() > 0


def check_half_precision(directory: Path, images: Any, classes: list[str]) -> None:
    """Losses in bfloat16 and float16 are near those of float32, by what these can tell apart."""
    found = {
        dtype: DiffusionClassifier.from_pretrained(directory, classes=classes, dtype=dtype).losses(
            images, probes=3
        )
        for dtype in ("float32", "bfloat16", "float16")
    }
    for dtype, tolerance in (("bfloat16", 2e-2), ("float16", 4e-3)):
        torch.testing.assert_close(found[dtype], found["float32"], rtol=tolerance, atol=0)
