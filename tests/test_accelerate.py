"""`accelerate` gives what the network gives, and does less."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_unet import LAYOUTS, make_inputs, make_unet

import dive_fast
from dive_fast import accelerate
from dive_fast.accelerator import store

PROBES, PROMPTS = 5, 3
ORDERS = {
    # As published: prompt by prompt.
    "prompt by prompt": [(k, c) for c in range(PROMPTS) for k in range(PROBES)],
    "probe by probe": [(k, c) for k in range(PROBES) for c in range(PROMPTS)],
    "shuffled": [(i % PROBES, (7 * i) % PROMPTS) for i in range(PROBES * PROMPTS)],
    "twice": [(k, c) for _ in range(2) for c in range(PROMPTS) for k in range(PROBES)],
}


def probes(unet) -> dict:
    return make_inputs(unet, rows=PROBES)


def prompts(unet) -> dict:
    inputs = make_inputs(unet, rows=PROMPTS, seed=1)
    return {k: inputs[k] for k in ("encoder_hidden_states", "added_cond_kwargs") if k in inputs}


def batches(unet, order, batch_size=4):
    """The arguments of each call of a loop over (probe, prompt)."""
    x, c = probes(unet), prompts(unet)
    for start in range(0, len(order), batch_size):
        k, y = (torch.tensor(i) for i in zip(*order[start : start + batch_size], strict=True))
        call = {
            "sample": x["sample"][k],
            "timestep": x["timestep"][k],
            "encoder_hidden_states": c["encoder_hidden_states"][y],
        }
        if "added_cond_kwargs" in c:
            added = c["added_cond_kwargs"]
            call["added_cond_kwargs"] = {name: value[y] for name, value in added.items()}
        yield call


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_the_network(layout, order):
    unet = make_unet(layout)
    fast = accelerate(unet)
    with torch.inference_mode():
        for call in batches(unet, ORDERS[order]):
            torch.testing.assert_close(fast(**call).sample, unet(**call).sample)
    seen = fast.statistics()
    assert (seen.rows, seen.plain_calls) == (len(ORDERS[order]), 0)
    assert seen.condition_misses == PROMPTS
    rows = seen.condition_hits + seen.condition_shared + seen.condition_misses
    assert rows == seen.rows and seen.nbytes > 0
    if layout == "sdxl":  # its prefix is one convolution, which is not kept
        assert seen.prefix_misses == seen.prefix_hits == 0
    else:
        assert seen.prefix_misses == PROBES
        assert seen.prefix_hits + seen.prefix_shared == seen.rows - PROBES


def test_work_is_really_saved():
    """A prefix found again is not computed: conv_in and the first K run once per content."""
    unet = make_unet()
    fast, rows = accelerate(unet), []
    first_k = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2.to_k
    for module in (unet.conv_in, first_k):
        module.register_forward_hook(lambda m, x, y: rows.append((m, len(x[0]))))
    with torch.no_grad():
        for call in batches(unet, ORDERS["twice"]):
            fast(**call)
    assert sum(n for m, n in rows if m is unet.conv_in) == PROBES
    assert sum(n for m, n in rows if m is first_k) == PROMPTS


@pytest.mark.parametrize("as_given", [int, float, torch.tensor, lambda t: torch.tensor([t])])
def test_call_signature(as_given):
    unet = make_unet()
    fast = accelerate(unet)
    x = make_inputs(unet)
    sample, condition = x["sample"], x["encoder_hidden_states"]
    timestep = as_given(7)
    with torch.no_grad():
        expected = unet(sample, timestep, condition).sample
        torch.testing.assert_close(fast(sample, timestep, condition).sample, expected)
        named = fast(sample, encoder_hidden_states=condition, timestep=timestep, return_dict=False)
    assert type(named) is tuple
    torch.testing.assert_close(named[0], expected)
    assert fast.statistics().prefix_hits == 3
    assert type(fast(sample, timestep, condition)) is type(unet(sample, timestep, condition))


def test_stands_for_the_network():
    unet = make_unet()
    fast = accelerate(unet)
    assert fast.config is unet.config and fast.config.in_channels == 4
    assert (fast.dtype, fast.device) == (torch.float32, torch.device("cpu"))
    assert isinstance(fast, torch.nn.Module) and not fast.training
    assert len(fast.state_dict()) == len(unet.state_dict())
    assert dive_fast.accelerate is accelerate
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = fast.no_such_thing
    with pytest.raises(TypeError, match="encoder_hidden_states"):
        fast(torch.zeros(1, 4, 8, 8), 0)
    x = make_inputs(unet)
    torch.testing.assert_close(copy.deepcopy(fast)(**x).sample, unet(**x).sample)


def test_keeps_nothing_with_no_bytes():
    unet = make_unet()
    fast = accelerate(unet, cache_bytes=0)
    with torch.no_grad():
        for call in batches(unet, ORDERS["probe by probe"]):
            torch.testing.assert_close(fast(**call).sample, unet(**call).sample)
    seen = fast.statistics()
    assert seen.nbytes == seen.prefix_hits == seen.condition_hits == 0
    assert seen.prefix_shared > 0


@pytest.mark.parametrize("entries", [1, 3])
def test_the_bound_holds(entries):
    unet = make_unet()
    one = accelerate(unet)
    call = next(batches(unet, ORDERS["prompt by prompt"], batch_size=1))
    one(**call)
    limit = entries * one.statistics().nbytes
    fast = accelerate(unet, cache_bytes=limit)
    with torch.no_grad():
        for call in batches(unet, ORDERS["twice"]):
            torch.testing.assert_close(fast(**call).sample, unet(**call).sample)
            assert fast.statistics().nbytes <= limit
    assert fast.statistics().prefix_misses > PROBES


def test_colliding_hashes(monkeypatch):
    monkeypatch.setattr(store, "row_hashes", lambda parts: [0] * len(parts[0]))
    unet = make_unet()
    fast = accelerate(unet)
    with torch.no_grad():
        for order in ORDERS.values():
            for call in batches(unet, order):
                torch.testing.assert_close(fast(**call).sample, unet(**call).sample)
    seen = fast.statistics()
    assert seen.prefix_shared > 0 and seen.prefix_misses > PROBES


def test_one_bit_is_another_row():
    unet = make_unet()
    fast = accelerate(unet)
    x = make_inputs(unet, rows=1)
    other = x["sample"].clone()
    other.view(torch.int32)[0, 0, 0, 0] ^= 1
    with torch.no_grad():
        for sample in (x["sample"], other, x["sample"]):
            fast(**{**x, "sample": sample})
        fast(**{**x, "timestep": x["timestep"] + 1})
    assert (fast.statistics().prefix_misses, fast.statistics().prefix_hits) == (3, 1)


def scale(p):
    p.mul_(1.5)


def scale_data(p):
    p.data.mul_(1.5)


def replace_data(p):
    p.data = p.data * 1.5


@pytest.mark.parametrize("write", [scale, scale_data, replace_data])
@pytest.mark.parametrize("part", ["conv_in", "down_blocks.0.resnets.0", "mid_block.attentions.0"])
def test_changed_weights_are_seen(write, part):
    unet = make_unet()
    fast, x = accelerate(unet), make_inputs(unet)
    with torch.no_grad():
        before = fast(**x).sample
        for parameter in unet.get_submodule(part).parameters():
            write(parameter)
        after = fast(**x).sample
        torch.testing.assert_close(after, unet(**x).sample)
    assert (after - before).abs().max() > 1e-4


def test_replaced_weights_are_seen():
    unet = make_unet()
    fast, x = accelerate(unet), make_inputs(unet)
    with torch.no_grad():
        fast(**x)
        unet.load_state_dict(make_unet(seed=5).state_dict(), assign=True)
        torch.testing.assert_close(fast(**x).sample, unet(**x).sample)
        attention = unet.up_blocks[-1].attentions[-1].transformer_blocks[0].attn2
        attention.to_v = torch.nn.Linear(24, 16, bias=False).requires_grad_(False)
        torch.testing.assert_close(fast(**x).sample, unet(**x).sample)


def test_clear():
    unet = make_unet()
    fast, x = accelerate(unet), make_inputs(unet)
    with torch.no_grad():
        fast(**x)
        fast.clear()
        assert fast.statistics().nbytes == 0
        torch.testing.assert_close(fast(**x).sample, unet(**x).sample)
    assert fast.statistics().prefix_misses == 6


def test_changed_dtype():
    unet = make_unet()
    fast, x = accelerate(unet), make_inputs(unet)
    low = {k: v.bfloat16() if v.is_floating_point() else v for k, v in x.items()}
    with torch.no_grad():
        fast(**x)
        fast.bfloat16()
        result = fast(**low).sample
        assert result.dtype == torch.bfloat16 and unet.dtype == torch.bfloat16
        assert torch.equal(result, unet(**low).sample)
        assert fast.statistics().prefix_misses == 6


def test_autocast_outside_is_another_context():
    unet = make_unet()
    fast, x = accelerate(unet), make_inputs(unet)
    with torch.no_grad():
        fast(**x)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(fast(**x).sample, unet(**x).sample)
        torch.testing.assert_close(fast(**x).sample, unet(**x).sample)
    assert (fast.statistics().prefix_misses, fast.statistics().prefix_hits) == (6, 3)


def test_gradient_of_the_condition():
    """As in inversion: frozen weights, the same (x_t, t) at every step."""
    unet = make_unet()
    fast, x = accelerate(unet), make_inputs(unet, rows=2)
    x = {k: v[[0, 1, 1]] for k, v in x.items()}  # equal rows have gradients of their own
    weights = torch.arange(3.0).view(3, 1, 1, 1) + 1
    with torch.inference_mode():
        fast(**x)  # what inference mode stored serves autograd too
    for _ in range(2):
        gradients = []
        for network in (fast, unet):
            leaf = x["encoder_hidden_states"].clone().requires_grad_()
            loss = (network(**{**x, "encoder_hidden_states": leaf}).sample * weights).square()
            gradients.append(torch.autograd.grad(loss.sum(), leaf)[0])
        torch.testing.assert_close(*gradients)
    seen = fast.statistics()
    assert (seen.plain_calls, seen.prefix_hits, seen.condition_misses) == (0, 4, 2)


def test_gradient_of_pooled_text():
    unet = make_unet("sdxl")
    fast, x = accelerate(unet), make_inputs(unet)
    gradients = []
    for network in (fast, unet):
        pooled = x["added_cond_kwargs"]["text_embeds"].clone().requires_grad_()
        added = {**x["added_cond_kwargs"], "text_embeds": pooled}
        sample = network(**{**x, "added_cond_kwargs": added}).sample
        gradients.append(torch.autograd.grad(sample.square().sum(), pooled)[0])
    torch.testing.assert_close(*gradients)
    assert fast.statistics().plain_calls == 0
