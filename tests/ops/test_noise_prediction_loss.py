"""noise_prediction_loss, its gradient and its map: accuracy, and what torch expects of an op."""

from __future__ import annotations

import pytest
import torch
from sample_inputs import (
    FLOAT_DTYPES,
    LAYOUTS,
    SHAPES,
    SMALL,
    assert_as_accurate_as,
    loss_inputs,
    vector,
)
from torch import Tensor
from torch.nn import functional

from dive_fast.errors import DiveFastError
from dive_fast.ops import (
    NORMS,
    TARGETS,
    _noise_prediction_loss,
    noise_prediction_error_map,
    noise_prediction_loss,
)

ELEMENTWISE = {"l2": functional.mse_loss, "l1": functional.l1_loss, "huber": functional.huber_loss}
NARROW = (torch.bfloat16, torch.float16)


def plain_map(prediction, noise, noise_index, x0, image_index, a, s, target, norm) -> Tensor:
    """As scripts usually write it, at the dtype of the prediction, before the mean over pixels."""
    dtype = prediction.dtype
    eps, images = noise[noise_index].to(dtype), x0[image_index].to(dtype)
    a, s = (factor.to(dtype).view(-1, 1, 1, 1) for factor in (a, s))
    aim = {
        "epsilon": eps,
        "v_prediction": a * eps - s * images,
        "sample": images,
        "flow": eps - images,
    }[target]
    predicted, _unread = prediction.split(
        [noise.shape[1], prediction.shape[1] - noise.shape[1]], dim=1
    )
    return ELEMENTWISE[norm](predicted, aim, reduction="none")


def plain_loss(*arguments) -> Tensor:
    return plain_map(*arguments).mean(dim=(1, 2, 3))


def to_double(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.double() if x.is_floating_point() else x for x in inputs)


def gradient(loss_function, inputs, grad: Tensor) -> Tensor:
    prediction = inputs[0].detach().requires_grad_()
    loss = loss_function(prediction, *inputs[1:])
    return torch.autograd.grad(loss, prediction, grad.to(loss.dtype))[0]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "dtype, data_dtype",
    [(dtype, dtype) for dtype in FLOAT_DTYPES] + [(dtype, torch.float32) for dtype in NARROW],
    ids=lambda dtype: str(dtype).removeprefix("torch."),
)
def test_accuracy(dtype, data_dtype, target, norm):
    loss_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    for shape in SHAPES:
        for layout in LAYOUTS:
            inputs = loss_inputs(
                shape, dtype, layout, learned_sigma=layout != "contiguous", data_dtype=data_dtype
            )
            named = {"target": target, "norm": norm}
            grad = vector(shape.rows, loss_dtype, seed=9)
            wide = to_double(inputs)
            name = f"{shape} {layout}"

            loss = noise_prediction_loss(*inputs, **named)
            assert loss.dtype == loss_dtype
            usual, expected = (plain_loss(*x, target, norm) for x in (inputs, wide))
            assert_as_accurate_as(loss, usual, expected, f"loss {name}")

            error_map = noise_prediction_error_map(*inputs, **named)
            assert error_map.dtype == loss_dtype and error_map.is_contiguous()
            usual, expected = (plain_map(*x, target, norm).mean(dim=1) for x in (inputs, wide))
            assert_as_accurate_as(error_map, usual, expected, f"map {name}")

            ours = gradient(lambda *x, n=named: noise_prediction_loss(*x, **n), inputs, grad)
            assert ours.dtype == dtype and ours.is_contiguous()
            usual, expected = (
                gradient(lambda *x: plain_loss(*x, target, norm), x, grad) for x in (inputs, wide)
            )
            assert_as_accurate_as(ours, usual, expected, f"gradient {name}")
            assert not ours[:, shape.channels :].any(), name


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("target", TARGETS)
def test_library_and_reference_agree(target, norm):
    """Also when the library is what the public function runs, the reference is tested."""
    codes = TARGETS.index(target), NORMS.index(norm)
    for shape in SHAPES:
        inputs = (*loss_inputs(shape, torch.float64, "sliced", learned_sigma=True), None, *codes)
        grad = vector(shape.rows, torch.float64)
        for name, arguments in (
            ("noise_prediction_loss", inputs),
            ("noise_prediction_loss_backward", (grad, *inputs)),
            ("noise_prediction_error_map", inputs),
        ):
            reference = {
                "noise_prediction_loss": _noise_prediction_loss._loss_reference,
                "noise_prediction_loss_backward": _noise_prediction_loss._backward_reference,
                "noise_prediction_error_map": _noise_prediction_loss._error_map_reference,
            }[name]
            result = getattr(torch.ops.dive_fast, name)(*arguments)
            expected = reference(*arguments)
            torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-14, msg=name)


def test_weight_scales_each_row():
    inputs = loss_inputs(SMALL)
    weight = vector(SMALL.rows, seed=11)
    named = {"target": "flow", "norm": "huber"}
    torch.testing.assert_close(
        noise_prediction_loss(*inputs, **named, weight=weight),
        weight * noise_prediction_loss(*inputs, **named),
    )
    torch.testing.assert_close(
        noise_prediction_error_map(*inputs, **named, weight=weight).mean(dim=(1, 2)),
        weight * noise_prediction_loss(*inputs, **named),
    )
    ones = torch.ones(SMALL.rows)
    torch.testing.assert_close(
        gradient(lambda *x: noise_prediction_loss(*x, **named, weight=weight), inputs, ones),
        gradient(lambda *x: noise_prediction_loss(*x, **named), inputs, weight),
    )


def test_channels_of_sigma_are_not_read():
    prediction, *rest = loss_inputs(SMALL, learned_sigma=True)
    loss = noise_prediction_loss(prediction, *rest)
    prediction[:, SMALL.channels :] = float("nan")
    assert torch.equal(noise_prediction_loss(prediction, *rest), loss)


def test_not_a_number_is_passed_on():
    prediction, *rest = loss_inputs(SMALL)
    prediction[1, 0, 0, 0] = float("nan")
    for norm in NORMS:
        loss = noise_prediction_loss(prediction, *rest, norm=norm)
        assert loss.isnan().tolist() == [False, True, False, False], norm


@pytest.mark.parametrize("learned_sigma", (False, True))
def test_every_element_is_written(poisoned_memory, learned_sigma):
    for shape in SHAPES:
        inputs = loss_inputs(shape, learned_sigma=learned_sigma)
        grad = torch.ones(shape.rows)
        assert not noise_prediction_loss(*inputs).isnan().any(), shape
        assert not noise_prediction_error_map(*inputs).isnan().any(), shape
        assert not gradient(noise_prediction_loss, inputs, grad).isnan().any(), shape


def test_thread_count_does_not_change_the_result():
    inputs = loss_inputs(SHAPES[-1], learned_sigma=True)
    grad = vector(SHAPES[-1].rows)

    def results() -> tuple[Tensor, ...]:
        return (
            noise_prediction_loss(*inputs),
            gradient(noise_prediction_loss, inputs, grad),
            noise_prediction_error_map(*inputs),
        )

    alone = results()
    torch.set_num_threads(2)
    for one, two in zip(alone, results(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("learned_sigma", (False, True))
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("target", TARGETS)
def test_gradcheck(target, norm, learned_sigma):
    prediction, *rest = loss_inputs(SMALL, torch.float64, learned_sigma=learned_sigma)
    weight = vector(SMALL.rows, torch.float64)
    assert torch.autograd.gradcheck(
        lambda p: noise_prediction_loss(p, *rest, target=target, norm=norm, weight=weight),
        (prediction.requires_grad_(),),
    )


def test_double_backward_is_refused():
    prediction, *rest = loss_inputs(SMALL)
    prediction.requires_grad_()
    loss = noise_prediction_loss(prediction, *rest).sum()
    (first,) = torch.autograd.grad(loss, prediction, create_graph=True)
    with pytest.raises(DiveFastError, match="expected a single backward, but got a double one"):
        first.sum().backward()


OPS = ("noise_prediction_loss", "noise_prediction_loss_backward", "noise_prediction_error_map")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OPS)
def test_opcheck(name, layout):
    op = getattr(torch.ops.dive_fast, name).default
    for dtype, learned_sigma in ((torch.float64, True), (torch.bfloat16, False)):
        factor = torch.float64 if dtype == torch.float64 else torch.float32
        inputs = loss_inputs(SMALL, dtype, layout, learned_sigma=learned_sigma)
        weight = vector(SMALL.rows, factor)
        grad = (weight,) if name.endswith("backward") else ()
        torch.library.opcheck(op, (*grad, *inputs, weight, 1, 2))
        if name == "noise_prediction_loss":
            torch.library.opcheck(op, (inputs[0].requires_grad_(), *inputs[1:], None, 0, 0))


@pytest.mark.parametrize("name", OPS)
def test_opcheck_without_rows(name):
    inputs = loss_inputs(SHAPES[3], learned_sigma=True)
    grad = (torch.ones(0),) if name.endswith("backward") else ()
    op = getattr(torch.ops.dive_fast, name).default
    torch.library.opcheck(op, (*grad, *inputs, None, 0, 0))


def check_compiled(compiled, shape) -> None:
    prediction, *rest = loss_inputs(shape, learned_sigma=True)
    eager, traced = (prediction.clone().requires_grad_() for _ in range(2))
    loss = noise_prediction_loss(eager, *rest)
    result = compiled(traced, *rest)
    torch.testing.assert_close(result, loss, rtol=0, atol=0)
    loss.square().sum().backward()
    result.square().sum().backward()
    torch.testing.assert_close(traced.grad, eager.grad)


@pytest.mark.parametrize("dynamic", (False, True))
def test_compiles_into_one_graph(dynamic):
    compiled = torch.compile(
        noise_prediction_loss, backend="aot_eager", fullgraph=True, dynamic=dynamic
    )
    for shape in (SMALL, SHAPES[2]):
        check_compiled(compiled, shape)


def test_compiles_with_inductor():
    compiled = torch.compile(noise_prediction_loss, fullgraph=True)
    check_compiled(compiled, SMALL)


ARGUMENTS = ("prediction", "noise", "noise_index", "x0", "image_index", "a", "s")


@pytest.mark.parametrize(
    "argument, value, message",
    [
        ("prediction", torch.zeros(4, 2, 3), r"prediction must have shape \[rows, C, h, w\]"),
        (
            "prediction",
            torch.zeros(4, 3, 3, 3),
            r"prediction must have shape \[M, 2 or 4, 3, 3\] .* but got \[4, 3, 3, 3\]",
        ),
        ("prediction", None, "prediction must be a tensor, but got NoneType"),
        ("noise", torch.zeros(3, 2, 3, 3).half(), "noise must be float32, but got float16"),
        ("x0", torch.zeros(2, 1, 3, 3), r"x0 must have the \[C, h, w\] of noise, \[2, 3, 3\]"),
        ("x0", torch.zeros(2, 2, 3, 3).double(), "x0 must be float32, but got float64"),
        ("noise_index", torch.zeros(5).long(), r"noise_index must have shape \[4\], .*\[5\]"),
        ("image_index", torch.zeros(4).int(), "image_index must be int64, but got int32"),
        ("a", torch.ones(4, 1), r"a must have shape \[4\], but got \[4, 1\]"),
        ("s", torch.ones(4).bfloat16(), "s must be float32, but got bfloat16"),
        ("weight", torch.ones(1), r"weight must have shape \[4\], but got \[1\]"),
        ("a", torch.ones(4, device="meta"), "a must be on the device of prediction, cpu"),
        ("noise", torch.zeros(3, 2, 3, 3, requires_grad=True), "noise must not require a gradient"),
        ("target", "eps", "target must be one of epsilon, .*, but got 'eps'"),
        ("norm", "l3", "norm must be one of l2, l1, huber, but got 'l3'"),
    ],
)
@pytest.mark.parametrize("function", (noise_prediction_loss, noise_prediction_error_map))
def test_bad_arguments_are_named(function, argument, value, message):
    inputs = dict(zip(ARGUMENTS, loss_inputs(SMALL), strict=True))
    inputs[argument] = value
    with pytest.raises(DiveFastError, match=f"{function.__name__}: {message}"):
        function(**inputs)


@pytest.mark.parametrize("norm", ("l2", "l1", "huber"))
@pytest.mark.parametrize("target", ("epsilon", "v_prediction", "sample", "flow"))
def test_the_map_has_the_gradient_of_its_definition(target, norm):
    prediction, noise, noise_index, x0, image_index, a, s = loss_inputs(
        SMALL, torch.float64, learned_sigma=True
    )
    eps, images, channels = noise[noise_index], x0[image_index], noise.shape[1]
    v = a.view(-1, 1, 1, 1) * eps - s.view(-1, 1, 1, 1) * images
    wanted = {"epsilon": eps, "v_prediction": v, "sample": images, "flow": eps - images}[target]
    weight, grad = vector(SMALL.rows, torch.float64), torch.rand(SMALL.rows, *noise.shape[2:])
    kinds = {
        "l2": lambda r: r.square(),
        "l1": lambda r: r.abs(),
        "huber": lambda r: torch.nn.functional.huber_loss(r, torch.zeros_like(r), reduction="none"),
    }
    one, other = (prediction.clone().requires_grad_() for _ in range(2))
    found = noise_prediction_error_map(
        one, noise, noise_index, x0, image_index, a, s, target=target, norm=norm, weight=weight
    )
    expected = kinds[norm](wanted - other[:, :channels]).mean(dim=1) * weight.view(-1, 1, 1)
    (found * grad).sum().backward()
    (expected * grad).sum().backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize("argument, limit", (("image_index", 2), ("noise_index", 3)))
@pytest.mark.parametrize("wrong", (-1, 2**40, None))
def test_an_index_out_of_range_is_refused(argument, limit, wrong):
    inputs = dict(zip(ARGUMENTS, loss_inputs(SMALL), strict=True))
    inputs[argument][2] = wrong = limit if wrong is None else wrong
    message = rf"{argument} must be in \[0, {limit}\), but got {wrong} at position 2"
    for function in (noise_prediction_loss, noise_prediction_error_map):
        with pytest.raises(IndexError, match=message):
            function(**inputs)
    with pytest.raises(IndexError, match=message):
        _noise_prediction_loss._loss_reference(*inputs.values(), None, 0, 0)
