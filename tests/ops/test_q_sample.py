"""q_sample: accuracy, gradients, and what torch expects of an op."""

from __future__ import annotations

import pytest
import torch
from sample_inputs import (
    FLOAT_DTYPES,
    LAYOUTS,
    SHAPES,
    SMALL,
    assert_as_accurate_as,
    q_sample_inputs,
)
from torch import Tensor

from dive_fast.errors import DiveFastError
from dive_fast.ops import _q_sample, native_status, q_sample

needs_library = pytest.mark.skipif(
    not native_status()["q_sample"].native, reason=native_status()["q_sample"].reason
)


def plain(x0, image_index, noise, noise_index, a, s) -> Tensor:
    """As scripts usually write it: gather, then compute at the dtype of the images."""
    a, s = (factor.to(x0.dtype).view(-1, 1, 1, 1) for factor in (a, s))
    return a * x0[image_index] + s * noise[noise_index]


def oracle(*inputs: Tensor) -> Tensor:
    return plain(*(x.double() if x.is_floating_point() else x for x in inputs))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accuracy(shape, dtype, layout):
    inputs = q_sample_inputs(shape, dtype, layout)
    expected, usual = oracle(*inputs), plain(*inputs)
    for name, op in (("public", q_sample), ("reference", _q_sample._reference)):
        x_t = op(*inputs)
        assert x_t.dtype == dtype and x_t.is_contiguous(), name
        assert_as_accurate_as(x_t, usual, expected, name)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("a", (1.0, 1 / 3, 1e-5, 3e4))
def test_every_narrow_value_is_widened_and_rounded_as_torch_does(dtype, a):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    x0 = bits.view(dtype).view(1, 1, 256, 256)
    zero = torch.zeros(1, dtype=torch.int64)
    x_t = q_sample(x0, zero, torch.zeros_like(x0), zero, torch.tensor([a]), torch.ones(1))
    torch.testing.assert_close(x_t, (x0.float() * a).to(dtype), rtol=0, atol=0, equal_nan=True)


@needs_library
def test_poison_reaches_the_memory_that_the_library_allocates(poisoned_memory):
    inputs = q_sample_inputs(SMALL)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.ops.dive_fast.q_sample(*inputs)
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls["aten::empty"] == calls["aten::fill_"] == 1


def test_every_element_is_written(poisoned_memory):
    for shape in SHAPES:
        inputs = q_sample_inputs(shape)
        x_t = q_sample(*inputs)
        assert not x_t.isnan().any(), shape


def test_thread_count_does_not_change_the_result():
    inputs = q_sample_inputs(SHAPES[-1])
    one = q_sample(*inputs)
    torch.set_num_threads(2)
    assert torch.equal(q_sample(*inputs), one)


@pytest.mark.parametrize("wants_x0, wants_noise", ((True, True), (True, False), (False, True)))
def test_gradients(wants_x0, wants_noise):
    x0, image_index, noise, noise_index, a, s = q_sample_inputs(SMALL, torch.float64)
    x0.requires_grad_(wants_x0)
    noise.requires_grad_(wants_noise)
    inputs = (x0, image_index, noise, noise_index, a, s)
    assert torch.autograd.gradcheck(q_sample, inputs)
    assert torch.autograd.gradgradcheck(q_sample, inputs)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_gradient_accuracy_when_one_image_is_shared_by_many_rows(dtype):
    shape = SHAPES[5]
    inputs = q_sample_inputs(shape, dtype)
    weights = torch.randn(shape.rows, 1, 8, 8, generator=torch.Generator().manual_seed(8))
    gradients = []
    for function, cast in ((q_sample, dtype), (plain, dtype), (plain, torch.float64)):
        x0 = inputs[0].to(cast).requires_grad_()
        noise = inputs[2].to(cast).requires_grad_()
        x_t = function(x0, inputs[1], noise, *inputs[3:])
        gradients.append(torch.autograd.grad(x_t, (x0, noise), weights.to(cast)))
    for name, ours, usual, expected in zip(("x0", "noise"), *gradients, strict=True):
        assert ours.dtype == dtype
        # The incoming gradient itself is rounded to the dtype: 65 roundings are summed.
        assert_as_accurate_as(ours, usual, expected, name, floor=8)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(dtype, layout):
    x0, image_index, noise, noise_index, a, s = q_sample_inputs(SMALL, dtype, layout)
    op = torch.ops.dive_fast.q_sample.default
    torch.library.opcheck(op, (x0, image_index, noise, noise_index, a, s))
    torch.library.opcheck(
        op, (x0.requires_grad_(), image_index, noise.requires_grad_(), noise_index, a, s)
    )


def test_opcheck_without_rows():
    torch.library.opcheck(torch.ops.dive_fast.q_sample.default, q_sample_inputs(SHAPES[3]))


@pytest.mark.parametrize("dynamic", (False, True))
def test_compiles_into_one_graph(dynamic):
    compiled = torch.compile(q_sample, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for shape in (SMALL, SHAPES[2]):
        x0, *rest = q_sample_inputs(shape)
        eager_x0, compiled_x0 = x0.clone().requires_grad_(), x0.clone().requires_grad_()
        eager, result = q_sample(eager_x0, *rest), compiled(compiled_x0, *rest)
        torch.testing.assert_close(result, eager, rtol=0, atol=0)
        eager.square().sum().backward()
        result.square().sum().backward()
        torch.testing.assert_close(compiled_x0.grad, eager_x0.grad)


ARGUMENTS = ("x0", "image_index", "noise", "noise_index", "a", "s")


@pytest.mark.parametrize(
    "argument, value, message",
    [
        ("x0", torch.zeros(2, 2, 3), r"x0 must have shape \[rows, C, h, w\].* got \[2, 2, 3\]"),
        ("x0", torch.zeros(2, 2, 0, 3), r"x0 must .* at least 1, but got \[2, 2, 0, 3\]"),
        ("x0", torch.zeros(2, 2, 3, 3, dtype=torch.int32), "x0 must be float64 .* got int32"),
        ("x0", [[0.0]], "x0 must be a tensor, but got list"),
        ("noise", torch.zeros(3, 2, 3, 4), r"noise must have the \[C, h, w\] of x0, \[2, 3, 3\]"),
        ("noise", torch.zeros(3, 2, 3, 3).half(), "noise must be float32, but got float16"),
        ("image_index", torch.zeros(4, 1).long(), r"image_index must have shape \[M\], .*\[4, 1\]"),
        ("image_index", torch.zeros(4), "image_index must be int64, but got float32"),
        ("noise_index", torch.zeros(3).long(), r"noise_index must have shape \[4\], .*\[3\]"),
        ("a", torch.ones(5), r"a must have shape \[4\], but got \[5\]"),
        ("s", torch.ones(4).double(), "s must be float32, but got float64"),
        ("s", torch.ones(4, device="meta"), "s must be on the device of x0, cpu, but got meta"),
        ("a", torch.ones(4, requires_grad=True), "a must not require a gradient"),
    ],
)
def test_bad_arguments_are_named(argument, value, message):
    inputs = dict(zip(ARGUMENTS, q_sample_inputs(SMALL), strict=True))
    inputs[argument] = value
    with pytest.raises(DiveFastError, match=f"q_sample: {message}"):
        q_sample(**inputs)


@pytest.mark.parametrize("argument, limit", (("image_index", 2), ("noise_index", 3)))
@pytest.mark.parametrize("wrong", (-1, 2**40, None))
def test_an_index_out_of_range_is_refused(argument, limit, wrong):
    inputs = dict(zip(ARGUMENTS, q_sample_inputs(SMALL), strict=True))
    inputs[argument][2] = wrong = limit if wrong is None else wrong
    message = rf"{argument} must be in \[0, {limit}\), but got {wrong} at position 2"
    for op in (q_sample, _q_sample._reference):
        with pytest.raises(IndexError, match=message):
            op(**inputs)


@needs_library
def test_the_bare_op_cannot_be_made_to_read_out_of_bounds():
    x0, image_index, noise, noise_index, a, s = q_sample_inputs(SMALL)
    for bad in (
        (x0, image_index, noise[:, :1], noise_index, a, s),
        (x0, image_index, noise, noise_index[:1], a, s),
        (x0, image_index, noise, noise_index, a[:1], s),
        (x0, image_index, noise.double(), noise_index, a, s),
        (x0, image_index.int(), noise, noise_index, a, s),
    ):
        with pytest.raises((ValueError, RuntimeError)):
            torch.ops.dive_fast.q_sample(*bad)
