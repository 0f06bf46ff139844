"""`accelerate` on calls and networks that it does not take apart, on DiTs, and with options."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from tiny_transformer import make_transformer
from tiny_unet import make_inputs, make_unet

from dive_fast import accelerate
from dive_fast.errors import DiveFastError, ModelError


def controlnet(unet):
    x = make_inputs(unet)
    skips = []
    handles = [
        block.register_forward_hook(lambda m, i, o: skips.extend(o[1]))
        for block in unet.down_blocks
    ]
    first = unet.conv_in.register_forward_hook(lambda m, i, o: skips.append(o))
    unet(**x)
    for handle in (*handles, first):
        handle.remove()
    return {
        "down_block_additional_residuals": tuple(0.1 * s for s in skips),
        "mid_block_additional_residual": 0.1 * skips[-1],
    }


PLAIN = {
    "argument encoder_attention_mask": lambda u: {
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 0, 0]]).expand(3, -1)
    },
    "argument cross_attention_kwargs": lambda u: {"cross_attention_kwargs": {}},
    "argument class_labels": lambda u: {"class_labels": torch.zeros(3)},
    "argument down_block": controlnet,
    "gradient of the sample": lambda u: {"sample": torch.ones(3, 4, 8, 8, requires_grad=True)},
}


@pytest.mark.parametrize("reason", PLAIN)
def test_unusual_arguments_go_to_the_network(reason):
    unet = make_unet()
    fast = accelerate(unet)
    x = {**make_inputs(unet), **PLAIN[reason](unet)}
    result = fast(**x).sample
    assert torch.equal(result, unet(**x).sample)
    assert result.requires_grad == x["sample"].requires_grad
    seen = fast.statistics()
    assert seen.plain_calls == seen.calls == 1 and reason in seen.plain_reason
    assert seen.nbytes == 0


def test_gradients_of_weights_go_to_the_network():
    unet = make_unet().requires_grad_(True)
    fast, x = accelerate(unet), make_inputs(unet)
    fast(**x).sample.sum().backward()
    assert unet.conv_in.weight.grad.abs().max() > 0
    assert "requires_grad_" in fast.statistics().plain_reason
    with torch.no_grad():
        fast(**x)
    assert fast.statistics().plain_calls == 1


def test_what_is_attached_later_goes_to_the_network():
    unet = make_unet()
    fast, x = accelerate(unet), make_inputs(unet)
    with torch.no_grad():
        fast(**x)
        unet.set_attn_processor(AttnProcessor())
        assert torch.equal(fast(**x).sample, unet(**x).sample)
    assert "AttnProcessor" in fast.statistics().plain_reason


def test_a_unet_that_cannot_be_cut_still_runs():
    unet = make_unet(mid_block_type="UNetMidBlock2D")
    with pytest.warns(UserWarning, match="Nothing will be reused.*UNetMidBlock2D"):
        fast = accelerate(unet)
    x = make_inputs(unet)
    assert torch.equal(fast(**x).sample, unet(**x).sample)


@pytest.mark.parametrize("layout", ["sd1", "sdxl"])
def test_own_autocast_and_channels_last(layout):
    unet = make_unet(layout)
    x = make_inputs(unet)
    with torch.no_grad():
        exact = unet(**x).sample
        with torch.autocast("cpu", torch.bfloat16):
            lost = (unet(**x).sample.float() - exact).abs().max()
        fast = accelerate(unet, dtype=torch.bfloat16, channels_last=True)
        for _ in range(2):
            result = fast(**x).sample
            assert result.dtype == torch.float32
            assert (result - exact).abs().max() <= 2 * lost
    assert unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert fast.statistics().plain_calls == 0


@pytest.fixture
def eager_compile(monkeypatch):
    """torch.compile without the code generator: what is traced, without the minutes."""
    compiled = []

    def compile(function):
        compiled.append(function)
        return original(function, backend="eager")

    original = torch.compile
    monkeypatch.setattr(torch, "compile", compile)
    yield compiled
    torch._dynamo.reset()


def test_compiled(eager_compile):
    unet = make_unet()
    fast, x = accelerate(unet, compile=True), make_inputs(unet)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(fast(**x).sample, unet(**x).sample)
    assert len(eager_compile) >= 3 and fast.statistics().prefix_hits == 3
    dit = make_transformer()
    x = torch.randn(2, 2, 4, 4), torch.tensor([3, 4]), torch.tensor([0, 1])
    torch.testing.assert_close(accelerate(dit, compile=True)(*x).sample, dit(*x).sample)


def dit_inputs(rows=3):
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(rows, 2, 4, 4, generator=generator),
        "timestep": torch.randint(0, 1000, (rows,), generator=generator),
        "class_labels": torch.randint(0, 5, (rows,), generator=generator),
    }


def embedder_calls(dit) -> list:
    calls = []
    for block in dit.transformer_blocks:
        block.norm1.emb.register_forward_hook(lambda *a: calls.append(1))
    return calls


def test_dit_evaluates_its_embedder_once():
    dit = make_transformer(tied=True)
    calls = embedder_calls(dit)
    fast, x = accelerate(dit), dit_inputs()
    expected = dit(**x).sample
    assert len(calls) == 3
    assert torch.equal(fast(**x).sample, expected)
    assert len(calls) == 4
    assert torch.equal(fast(*x.values(), return_dict=False)[0], expected)
    assert fast.statistics().plain_calls == 0


def test_dit_with_embedders_of_their_own():
    dit = make_transformer(tied=False)
    fast, x = accelerate(dit), dit_inputs()
    assert torch.equal(fast(**x).sample, dit(**x).sample)
    assert "no copies" in fast.statistics().plain_reason


def test_dit_whose_embedders_part():
    dit = make_transformer(tied=True)
    fast, x = accelerate(dit), dit_inputs()
    fast(**x)
    dit.transformer_blocks[1].norm1.emb.class_embedder.embedding_table.weight.mul_(2)
    assert torch.equal(fast(**x).sample, dit(**x).sample)
    assert fast.statistics().plain_calls == 1


def test_dit_in_training():
    dit = make_transformer(tied=True)
    fast, x = accelerate(dit), dit_inputs()
    fast.train()
    fast(**x)
    assert "training" in fast.statistics().plain_reason
    fast.eval().requires_grad_(True)
    fast(**x).sample.sum().backward()
    embedders = [block.norm1.emb.timestep_embedder for block in dit.transformer_blocks]
    assert all(e.linear_1.weight.grad.abs().max() > 0 for e in embedders)


def test_other_networks_run_as_they_are():
    network = torch.nn.Conv2d(2, 3, 3)
    x = torch.randn(2, 2, 5, 5)
    assert torch.equal(accelerate(network)(x), network(x))
    fast = accelerate(network, dtype=torch.bfloat16, channels_last=True)
    assert fast(x).dtype == torch.float32
    assert network.weight.is_contiguous(memory_format=torch.channels_last)
    assert accelerate(torch.nn.Embedding(3, 2), dtype=torch.float16)(torch.tensor([1])).shape


@pytest.mark.parametrize(
    ("arguments", "options", "said"),
    [
        (("unet",), {}, "torch.nn.Module.*'unet'"),
        ((accelerate(torch.nn.Linear(1, 1)),), {}, "already accelerated"),
        ((torch.nn.Linear(1, 1),), {"cache_bytes": -1}, "cache_bytes.*-1"),
        ((torch.nn.Linear(1, 1),), {"cache_bytes": 1e9}, "cache_bytes"),
        ((torch.nn.Linear(1, 1),), {"dtype": torch.float32}, "torch.bfloat16.*float32"),
        ((torch.nn.Linear(1, 1),), {"dtype": "bfloat16"}, "torch.bfloat16"),
    ],
)
def test_bad_input(arguments, options, said):
    with pytest.raises(DiveFastError, match=said) as error:
        accelerate(*arguments, **options)
    assert str(error.value).count("\n") == 0
    assert isinstance(error.value, ModelError) == (not options)
