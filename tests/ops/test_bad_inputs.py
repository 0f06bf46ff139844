"""What no op can take: one sentence from every public function, and from direct calls."""

from __future__ import annotations

import warnings

import device_checks
import numpy as np
import pytest
import torch
from sample_inputs import (
    SMALL,
    loss_inputs,
    q_sample_inputs,
    search_inputs,
    special_searches,
    special_values,
    vector,
)
from torch import Tensor

from dive_fast import ops
from dive_fast.errors import DiveFastError
from dive_fast.ops import _nearest_box, _nearest_row, _noise_prediction_loss

NAMESPACE = torch.ops.dive_fast
LOSS_NAMES = ("prediction", "noise", "noise_index", "x0", "image_index", "a", "s")


def public_calls() -> list[tuple]:
    """Every public function with good arguments by name, and the fp32 tensors among these."""
    q_sample = ("x0", "image_index", "noise", "noise_index", "a", "s")
    loss = dict(zip(LOSS_NAMES, loss_inputs(SMALL), strict=True)) | {"weight": vector(SMALL.rows)}
    search = dict(zip(("v", "table", "allowed", "extra"), search_inputs(4, 5, 3), strict=True))
    calls = [
        (ops.q_sample, dict(zip(q_sample, q_sample_inputs(SMALL), strict=True))),
        (ops.noise_prediction_loss, loss),
        (ops.noise_prediction_error_map, loss),
        (ops.nearest_row, search),
        (ops.projection, search),
        (ops.nearest_box, {"cost_tl": torch.zeros(1, 3, 3), "cost_br": torch.zeros(1, 3, 3)}),
        (ops.snap_boxes, {"boxes": torch.rand(2, 4), "grid": 5}),
    ]
    return [
        pytest.param(function, arguments, name, id=f"{function.__name__}-{name}")
        for function, arguments in calls
        for name, value in arguments.items()
        if isinstance(value, Tensor)
    ]


def masked(x: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.masked.masked_tensor(x, torch.ones_like(x, dtype=torch.bool))


def nested(x: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([x])


KINDS = {
    "numpy": (lambda x: x.numpy(), "must be a tensor, but got ndarray"),
    "list": (lambda x: x.tolist(), "must be a tensor, but got list"),
    "sparse": (lambda x: x.to_sparse(), "must be a dense tensor, but got a sparse_coo one"),
    "nested": (nested, "must be a dense tensor, but got a nested one"),
    "masked": (masked, "must be a plain tensor, but got a MaskedTensor"),
    "quantised": (
        lambda x: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8),
        "must be .*, but got qint8",
    ),
    "complex": (lambda x: x.to(torch.complex64), "must be .*, but got complex64"),
    "bool": (lambda x: x > 0, "must be .*, but got bool"),
    "scalar": (lambda x: torch.tensor(1).to(x.dtype), r"must have shape .*, but got \[\]"),
}


@pytest.mark.parametrize(("function", "arguments", "name"), public_calls())
def test_no_tensor_of_ours(function, arguments: dict, name: str) -> None:
    function(**arguments)
    for kind, (make, message) in KINDS.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, of prototypes
            bad = {**arguments, name: make(arguments[name])}
        with pytest.raises(DiveFastError, match=f"{function.__name__}: {name} {message}") as caught:
            function(**bad)
        assert "\n" not in str(caught.value), kind


def test_subclasses_that_are_plain_memory_are_taken() -> None:
    x0, image, noise, probe, a, s = q_sample_inputs(SMALL)
    expected = ops.q_sample(x0, image, noise, probe, a, s)

    class Mine(Tensor):
        pass

    for x in (torch.nn.Parameter(x0), x0.as_subclass(Mine), (-x0)._neg_view()):
        assert torch.equal(ops.q_sample(x, image, noise, probe, a, s).as_subclass(Tensor), expected)


@pytest.mark.parametrize(
    "value",
    [True, False, np.bool_(True), (1, True), (1, 2, 3), [1, 2], "1", None, 1.0, -1, 3, 2**70,
     10**5000, (10**5000, 1), torch.tensor(1)],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_min_size(value: object) -> None:
    costs = torch.zeros(1, 3, 3)
    for call in (
        lambda: ops.nearest_box(costs, costs, value),
        lambda: ops.snap_boxes(torch.zeros(1, 4), 3, value),
    ):
        with pytest.raises(DiveFastError, match=r"min_size must be one or two ints in \[0, 3\)"):
            call()


@pytest.mark.parametrize(
    "value", [True, 1, 0, -5, 2.0, "5", None, np.int64(5), 2**31 + 1, 2**70, 10**5000],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_grid(value: object) -> None:
    with pytest.raises(DiveFastError, match="snap_boxes: grid must be"):
        ops.snap_boxes(torch.zeros(1, 4), value)


@pytest.mark.parametrize(
    "value", [None, 0, True, "L2", ["l2"], np.array(["l2", "l1"]), torch.ones(2)]
)
def test_names(value: object) -> None:
    inputs = loss_inputs(SMALL)
    for name in ("norm", "target"):
        with pytest.raises(DiveFastError, match=f"{name} must be one of"):
            ops.noise_prediction_loss(*inputs, **{name: value})
    with pytest.raises(DiveFastError, match="metric must be one of"):
        ops.nearest_row(torch.zeros(1, 2), torch.zeros(1, 2), metric=value)


class TestDirectCalls:
    """Of torch.ops.dive_fast.*, by codes: compiled, reference, and fake."""

    @pytest.mark.parametrize("device", ["cpu", "meta"])
    def test_target_and_norm(self, device: str) -> None:
        pair = NAMESPACE.noise_prediction_loss, NAMESPACE.noise_prediction_loss_backward
        device_checks.check_unknown_codes_are_refused(*pair, device)
        error_map = NAMESPACE.noise_prediction_error_map
        device_checks.check_unknown_codes_are_refused(error_map, pair[1], device)

    def test_target_and_norm_of_the_references(self) -> None:
        module = _noise_prediction_loss
        for loss in (module._loss_reference, module._error_map_reference):
            device_checks.check_unknown_codes_are_refused(loss, module._backward_reference, "cpu")

    @pytest.mark.parametrize("code", [2, 7, -1])
    def test_metric(self, code: int) -> None:
        v, table, allowed, extra = search_inputs(4, 5, 3)
        meta = [x.to("meta") for x in (v, table, allowed, extra)]
        for call in (
            lambda: NAMESPACE.nearest_row(v, table, allowed, extra, code),
            lambda: NAMESPACE.nearest_row(*meta, code),
            lambda: _nearest_row._reference(v, table, allowed, extra, code),
        ):
            with pytest.raises(ValueError, match=rf"metric must be in \[0, 2\), but got {code}"):
                call()

    @pytest.mark.parametrize("sizes", [(3, 1), (1, 3), (-1, 1), (1, -1), (2**62, 0)])
    def test_min_size(self, sizes: tuple[int, int]) -> None:
        costs = torch.zeros(1, 3, 3)
        for call in (
            lambda: NAMESPACE.nearest_box(costs, costs, *sizes),
            lambda: NAMESPACE.nearest_box(costs.to("meta"), costs.to("meta"), *sizes),
            lambda: _nearest_box._reference(costs, costs, *sizes),
        ):
            with pytest.raises(ValueError, match=r"min_size must be in \[0, 3\), but got \("):
                call()


class TestNumbersThatAreNone:
    """NaN and infinities: compiled and reference agree, and on what the page says."""

    @staticmethod
    def far_or_distance(q: list[float], r: list[float], metric: str) -> float:
        """In Python, one number at a time; infinity for what is no finite distance."""
        if metric == "l2":
            found = sum((a - b) ** 2 for a, b in zip(q, r, strict=True))
        else:
            length = sum(b * b for b in r) ** 0.5
            dot = sum(a * b for a, b in zip(q, r, strict=True))
            found = 0 * dot if length == 0 else -dot / length
            found = found if np.isfinite(length) else np.inf
        return found if np.isfinite(found) else np.inf

    @pytest.mark.parametrize("metric", ops.METRICS)
    def test_nearest_row(self, metric: str) -> None:
        for case, (v, table, allowed, extra) in enumerate(special_searches(400)):
            code = ops.METRICS.index(metric)
            index, distance = ops.nearest_row(v, table, allowed=allowed, extra=extra, metric=metric)
            reference = _nearest_row._reference(v, table, allowed, extra, code)
            assert torch.equal(index, reference[0]), case
            torch.testing.assert_close(distance, reference[1], equal_nan=True)
            for n, found in enumerate(index.tolist()):
                rows = range(len(table)) if allowed is None else range(*allowed[n].tolist())
                rows = sorted({*rows, *(() if extra is None else extra.tolist())})
                far = [self.far_or_distance(v[n].tolist(), table[r].tolist(), metric) for r in rows]
                best = min(far)
                nearest = [
                    r for r, x in zip(rows, far, strict=True) if x - best < 1e-6 or x == best
                ]
                assert found in nearest, (case, n)
                if best == np.inf:
                    assert found == rows[0], (case, n)

    def test_an_infinite_query_is_far_from_all(self) -> None:
        """Its cosine with a row is no number; the sign of the infinity must not decide."""
        table = torch.tensor([[0.0, 1.0], [-1.0, 0.0], [1.0, 0.0]])
        v = torch.tensor([[torch.inf, 1.0], [-torch.inf, 1.0]])
        index, distance = ops.nearest_row(v, table, metric="cosine")
        assert index.tolist() == [0, 0] and distance.isnan().all()

    def test_nearest_box(self) -> None:
        generator = torch.Generator().manual_seed(0)
        for case in range(400):
            grid = 1 + case % 6
            height, width = case % grid, case // 7 % grid
            dtype = (torch.float32, torch.float64)[case % 2]
            pair = [
                special_values(3, grid, grid, generator=generator, share=0.4).to(dtype)
                for _ in range(2)
            ]
            found = ops.nearest_box(*pair, (height, width))
            expected = _nearest_box._reference(*pair, height, width)
            assert all(torch.equal(*both) for both in zip(found, expected, strict=True)), case
            tl, br = (torch.where(x.isnan(), torch.inf, x).flatten(1).tolist() for x in pair)
            for n in range(3):
                best = min(
                    cost if (cost := tl[n][i] + br[n][j]) == cost else np.inf
                    for i in range(grid**2)
                    for j in range(grid**2)
                    if j // grid - i // grid >= height and j % grid - i % grid >= width
                )
                assert found[2][n] == best, (case, n)

    def test_noise_prediction_loss(self) -> None:
        generator, nans = torch.Generator().manual_seed(0), 0
        names = ("noise_prediction_loss", "noise_prediction_loss_backward")
        references = (
            _noise_prediction_loss._loss_reference, _noise_prediction_loss._backward_reference,
        )  # fmt: skip
        for case in range(24):
            inputs = list(loss_inputs(SMALL, learned_sigma=bool(case % 2)))
            for i in (0, 1, 3, 5, 6):
                special = special_values(*inputs[i].shape, generator=generator, share=0.1).float()
                inputs[i] = torch.where(special.isfinite(), inputs[i], special)
            codes = case % 4, case % 3
            for name, reference, grad in zip(
                names, references, ((), (vector(SMALL.rows),)), strict=True
            ):
                found = getattr(NAMESPACE, name)(*grad, *inputs, None, *codes)
                expected = reference(*grad, *inputs, None, *codes)
                torch.testing.assert_close(found, expected, equal_nan=True)
                nans += int(expected.isnan().sum())
        assert nans > 20

    def test_snap_boxes(self) -> None:
        inf, nan = torch.inf, torch.nan
        boxes = torch.tensor(
            [[-inf, 0.5, inf, inf], [inf, 0.0, -inf, 1.0], [nan, 0.0, 1.0, inf]],
            requires_grad=True,
        )
        snapped = ops.snap_boxes(boxes, 5)
        expected = torch.tensor([[0, 0.5, 1, 1], [0, 0, 0.25, 1], [nan, 0, nan, 1]])
        torch.testing.assert_close(snapped.detach(), expected, equal_nan=True)
        (gradient,) = torch.autograd.grad(snapped, boxes, torch.ones_like(boxes))
        assert torch.equal(gradient, (~boxes.isinf()).float())
