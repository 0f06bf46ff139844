"""The training loop: averages, precision, what is logged, and resuming to the same weights."""

from __future__ import annotations

import dataclasses
import math
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cut_off import cut_off
from loop_runs import COURSE, Crash, Net, crash_at, lines, run, same
from torch import Tensor, nn

from dive_fast.errors import RunError
from dive_fast.training.loop import Keep, doubling_steps, train
from dive_fast.training.state import learning_rate_at


def test_the_average_is_the_one_of_the_docstring(tmp_path: Path) -> None:
    """Step by step, of the weights that every step began with."""
    seen: list = []
    net, _ = run(tmp_path, seen=seen)
    # No step begins with the last weights; the state holds them.
    state = torch.load(tmp_path / "training.pt", weights_only=True)["model"]
    weights = [each for _, each in seen[1:]]
    weights.append([state[name] for name, _ in net.named_parameters()])
    average = weights[0]
    for k in range(1, COURSE.steps):
        d = min(COURSE.ema_decay, (1 + k) / (10 + k))
        average = [d * a + (1 - d) * w for a, w in zip(average, weights[k], strict=True)]
    for found, expected in zip(net.parameters(), average, strict=True):
        torch.testing.assert_close(found, expected)
    assert not torch.equal(average[0], weights[-1][0])


def test_the_statistics_of_a_batch_norm_are_averaged_too(tmp_path: Path) -> None:
    net, _ = run(tmp_path)
    last = torch.load(tmp_path / "training.pt", weights_only=True)["model"]
    assert not torch.equal(net.layers[1].running_mean, last["layers.1.running_mean"])


def test_the_learning_rate() -> None:
    course = dataclasses.replace(COURSE, steps=100, warmup_steps=10, learning_rate=2.0)
    assert learning_rate_at(0, course) == pytest.approx(0.2)
    assert learning_rate_at(50, course) == pytest.approx(1.0)
    assert learning_rate_at(4, course) == pytest.approx((1 + math.cos(math.pi * 0.04)) / 2)
    assert learning_rate_at(99, course) < 1e-3


class TestCheckpoints:
    def keep(self, kept: dict[int, dict], nets: list[nn.Module]) -> Callable[[int], None]:
        def write(step: int) -> None:
            assert not nets[-1].training and not torch.is_grad_enabled()
            state = nets[-1].state_dict()
            kept.setdefault(step, {n: v.clone() for n, v in state.items()})

        return write

    def test_averages_of_then_and_nothing_else_changes(self, tmp_path: Path, monkeypatch) -> None:
        plain, _ = run(tmp_path / "plain")
        nets: list[nn.Module] = []
        made = Net.__init__

        def note(net: Net) -> None:
            made(net)
            nets.append(net)

        monkeypatch.setattr(Net, "__init__", note)
        kept: dict[int, dict] = {}
        keep = Keep((2, 5, 9), self.keep(kept, nets))
        found, _ = run(tmp_path / "kept", keep=keep)
        assert list(kept) == [2, 5, 9] and same(found, plain)
        weight = "layers.0.weight"
        assert torch.equal(kept[9][weight], plain.state_dict()[weight])
        with pytest.raises(Crash):
            run(tmp_path / "cut", at=crash_at(5), state_every=5)
        state = torch.load(tmp_path / "cut" / "training.pt", weights_only=True)
        assert torch.equal(kept[5][weight], state["ema"]["shadow_params"][0])
        # Cut off behind the checkpoint: it is written again, before the run goes on.
        again: dict[int, dict] = {}
        with pytest.raises(Crash):
            run(tmp_path / "late", at=crash_at(6), state_every=4)
        run(tmp_path / "late", keep=Keep((2, 5), self.keep(again, nets)))
        assert list(again) == [5] and torch.equal(again[5][weight], kept[5][weight])

    def test_doubling(self) -> None:
        assert doubling_steps(4, 6400) == (800, 1600, 3200, 6400)
        assert doubling_steps(3, 7) == (2, 4, 7)
        assert doubling_steps(1, 9) == (9,) and doubling_steps(0, 9) == ()
        assert doubling_steps(9, 3) == (1, 2, 3)


class TestResuming:
    def test_after_a_crash(self, tmp_path: Path) -> None:
        """From the last state that was written, two steps before."""
        uncut, _ = run(tmp_path / "uncut")
        with pytest.raises(Crash):
            run(tmp_path / "cut", at=crash_at(6), state_every=4)
        steps: list[int] = []
        found, _ = run(tmp_path / "cut", at=steps.append, state_every=4)
        assert steps == [4, 5, 6, 7, 8]
        assert same(found, uncut) and not same(found, Net())

    def test_after_ctrl_c(self, tmp_path: Path) -> None:
        """No step is lost: not the one that it fell into either."""
        uncut, whole = run(tmp_path / "uncut")
        with cut_off() as ctrl_c:
            run(tmp_path / "cut", at=lambda step: ctrl_c() if step == 6 else None)
        steps: list[int] = []
        found, resumed = run(tmp_path / "cut", at=steps.append)
        assert steps == [7, 8]
        assert same(found, uncut)
        assert lines(tmp_path / "cut")[-1] == lines(tmp_path / "uncut")[-1]

    def test_a_second_ctrl_c_does_not_wait(self, tmp_path: Path) -> None:
        steps: list[int] = []

        def twice(step: int) -> None:
            steps.append(step)
            ctrl_c()
            ctrl_c()

        with cut_off() as ctrl_c:
            run(tmp_path, at=twice)
        assert steps == [0] and not (tmp_path / "training.pt").exists()

    def test_where_ctrl_c_means_something_else(self, tmp_path: Path) -> None:
        asked: list[int] = []
        before = signal.signal(signal.SIGINT, lambda *_: asked.append(1))
        try:
            run(tmp_path, at=lambda step: signal.raise_signal(signal.SIGINT))
        finally:
            signal.signal(signal.SIGINT, before)
        assert len(asked) == COURSE.steps

    def test_in_a_thread(self, tmp_path: Path) -> None:
        found: list = []
        thread = threading.Thread(target=lambda: found.append(run(tmp_path)))
        thread.start()
        thread.join()
        assert len(found) == 1

    def test_of_a_run_that_was_finished(self, tmp_path: Path) -> None:
        first, _ = run(tmp_path)
        steps: list[int] = []
        again, _ = run(tmp_path, at=steps.append)
        assert steps == [] and same(again, first)

    def test_time_of_all_sittings(self, tmp_path: Path) -> None:
        _, first = run(tmp_path)
        saved = torch.load(tmp_path / "training.pt", weights_only=True)
        torch.save({**saved, "seconds": 1000.0, "cpu_seconds": 500.0}, tmp_path / "training.pt")
        _, again = run(tmp_path)
        assert 0 < first.cpu_seconds and 0 < first.seconds < 1000 < again.seconds
        assert 500 < again.cpu_seconds

    @pytest.mark.parametrize(
        "change", [{"steps": 10}, {"seed": 1}, {"bf16": True}, {"learning_rate": 0.1}], ids=str
    )
    def test_of_another_course(self, change: dict, tmp_path: Path) -> None:
        run(tmp_path)
        with pytest.raises(RunError, match="another configuration or other data; choose another"):
            run(tmp_path, dataclasses.replace(COURSE, **change))

    def test_of_other_data(self, tmp_path: Path) -> None:
        run(tmp_path, identity={"data": [1, 2]})
        run(tmp_path, identity={"data": [1, 2]})
        with pytest.raises(RunError, match="another configuration or other data"):
            run(tmp_path, identity={"data": [1, 3]})

    @pytest.mark.parametrize("content", [b"", b"not a state", {"step": 3}])
    def test_of_a_damaged_state(self, content: object, tmp_path: Path) -> None:
        path = tmp_path / "training.pt"
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        with pytest.raises(RunError, match=r"training\.pt is damaged and cannot be resumed from"):
            run(tmp_path)

    def test_of_another_model(self, tmp_path: Path) -> None:
        run(tmp_path)
        path = tmp_path / "training.pt"
        saved = torch.load(path, weights_only=True)
        del saved["model"]["layers.0.bias"]
        torch.save(saved, path)
        with pytest.raises(RunError, match="is damaged"):
            run(tmp_path)

    def test_a_state_that_cannot_be_written(self, tmp_path: Path) -> None:
        with pytest.raises(RunError, match=r"training\.pt cannot be written: is the disk full"):
            run(tmp_path, at=lambda step: (tmp_path / "training.pt").mkdir(exist_ok=True))
        assert [p.name for p in tmp_path.iterdir() if p.suffix == ".tmp"] == []


class TestBf16:
    def test_only_the_forward(self, tmp_path: Path) -> None:
        """Predictions are bfloat16 and weights never; it learns all the same."""
        course = dataclasses.replace(COURSE, steps=80)
        seen: list = []
        half, _ = run(tmp_path / "half", dataclasses.replace(course, bf16=True), seen=seen)
        full, _ = run(tmp_path / "full", course)
        assert {dtype for dtype, _ in seen} == {torch.bfloat16}
        assert {p.dtype for p in half.parameters()} == {torch.float32}
        assert not same(half, full)
        x = torch.randn(200, 3, generator=torch.Generator().manual_seed(1))
        for net in (half, full):
            with torch.no_grad():
                error = (net(x) - x.sum(dim=1, keepdim=True)).square().mean()
            assert error < 0.3  # of 3, the variance of the sum

    def test_resuming(self, tmp_path: Path) -> None:
        course = dataclasses.replace(COURSE, bf16=True)
        uncut, _ = run(tmp_path / "uncut", course)
        with pytest.raises(Crash):
            run(tmp_path / "cut", course, crash_at(6), state_every=3)
        assert same(run(tmp_path / "cut", course)[0], uncut)

    def test_off_by_default(self, tmp_path: Path) -> None:
        seen: list = []
        run(tmp_path, seen=seen)
        assert {dtype for dtype, _ in seen} == {torch.float32}


class TestHeldOut:
    def test_is_of_the_averaged_weights(self, tmp_path: Path) -> None:
        """In eval mode and without gradients; training goes on as if nothing had been measured."""
        plain, _ = run(tmp_path / "plain")
        net = Net()
        said: list[float] = []

        def held_out() -> dict[str, float]:
            assert not net.training and not torch.is_grad_enabled()
            said.append(net(torch.ones(1, 3)).item())
            return {"ones": said[-1]}

        def loss_of(step: int, generator: torch.Generator) -> Tensor:
            assert net.training and torch.is_grad_enabled()
            x = torch.randn(COURSE.batch_size, 3, generator=generator)
            return (net(x) - x.sum(dim=1, keepdim=True)).square().mean()

        out = tmp_path / "measured"
        out.mkdir()
        found = train(
            net.train(), loss_of, COURSE, out, held_out=held_out, log_every=4, progress=False
        )
        assert same(net, plain) and not net.training
        assert found.held_out == {"ones": said[-1]} and len(said) == 3
        assert said[-1] == net(torch.ones(1, 3)).item()
        rows = lines(out)
        assert [row["step"] for row in rows] == [4, 8, 9]
        assert [row["ones"] for row in rows] == [round(value, 5) for value in said]

    def test_the_logged_loss_is_a_running_mean(self, tmp_path: Path) -> None:
        """Also of a run that was cut off."""
        run(tmp_path / "uncut", log_every=1)
        with pytest.raises(Crash):
            run(tmp_path / "cut", at=crash_at(6), log_every=1, state_every=6)
        run(tmp_path / "cut", log_every=1)
        assert lines(tmp_path / "cut") == lines(tmp_path / "uncut")
        assert [row["step"] for row in lines(tmp_path / "cut")] == list(range(1, 10))
        first, second = lines(tmp_path / "cut")[:2]
        single, _ = run(tmp_path / "single", dataclasses.replace(COURSE, steps=1))
        assert lines(tmp_path / "single") == [first]
        assert abs(second["loss"] - first["loss"]) < 0.05 * first["loss"]


def test_the_bar_shows_losses_and_what_is_left(tmp_path: Path, capsys) -> None:
    net = Net()
    train(
        net,
        lambda step, generator: net(torch.randn(4, 3, generator=generator)).square().mean(),
        COURSE,
        tmp_path,
        held_out=lambda: {"elsewhere": 0.25},
        log_every=2,
    )
    shown = capsys.readouterr().err
    assert "9/9 [" in shown and "loss=" in shown and "elsewhere=0.2500" in shown
