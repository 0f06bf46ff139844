"""Which step's weights a training ends with."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from cut_off import cut_off
from loop_runs import Crash, crash_at, lines, run, same
from torch import Tensor, nn

from dive_fast.training.loop import Finished


class TestLowest:
    """The weights of the logged step whose held-out loss was the lowest."""

    LOSSES = (3.0, math.nan, 1.0, 2.0, 1.0)  # after steps 2, 4, 6, 8 and 9

    def trained(
        self, out: Path, losses: tuple[float, ...] = LOSSES, **options
    ) -> tuple[nn.Module, Finished]:
        by_step = dict(zip((2, 4, 6, 8, 9), losses, strict=True))
        done = [0]

        def held_out() -> dict[str, float]:
            return {"step": float(done[0]), "elsewhere": by_step[done[0]]}

        at = options.pop("at", lambda step: None)

        def note(step: int) -> None:
            done[0] = step + 1
            at(step)

        options = {"log_every": 2, "lowest": "elsewhere", **options}
        if (out / "training.pt").exists():
            done[0] = torch.load(out / "training.pt", weights_only=True)["step"]
        return run(out, at=note, held_out=held_out, **options)

    def test_is_what_the_model_ends_with(self, tmp_path: Path) -> None:
        """The averages of step 6, the first of two as low; statistics of the batch norm, too."""
        net, found = self.trained(tmp_path / "best")
        kept: dict[int, list[Tensor]] = {}
        with pytest.raises(Crash):
            run(tmp_path / "cut", at=crash_at(6), state_every=6)
        state = torch.load(tmp_path / "cut" / "training.pt", weights_only=True)
        kept[6] = state["ema"]["shadow_params"]
        tensors = [x for x in (*net.parameters(), *net.buffers()) if x.is_floating_point()]
        assert all(torch.equal(a, b) for a, b in zip(tensors, kept[6], strict=True))
        assert found.step == 6 and found.held_out == {"step": 6.0, "elsewhere": 1.0}
        assert not net.training
        assert [row["elsewhere"] for row in lines(tmp_path / "best")][2:] == [1.0, 2.0, 1.0]

    def test_the_last_step_may_be_it(self, tmp_path: Path) -> None:
        plain, last = run(tmp_path / "plain")
        found, finished = self.trained(tmp_path / "falling", (5.0, 4.0, 3.0, 2.0, 1.0))
        assert same(found, plain) and finished.step == last.step == 9
        found, finished = self.trained(tmp_path / "lost", (math.nan,) * 5)
        assert same(found, plain) and finished.step == 9

    @pytest.mark.parametrize("cut", [6, 7, 8])
    @pytest.mark.parametrize("state_every", [3, 6])
    def test_of_a_run_that_was_cut_off(self, cut: int, state_every: int, tmp_path: Path) -> None:
        uncut, expected = self.trained(tmp_path / "uncut")
        with pytest.raises(Crash):
            self.trained(tmp_path / "cut", at=crash_at(cut), state_every=state_every)
        net, found = self.trained(tmp_path / "cut", state_every=state_every)
        assert same(net, uncut)
        assert (found.step, found.held_out) == (expected.step, expected.held_out)

    def test_after_ctrl_c_at_that_step(self, tmp_path: Path) -> None:
        uncut, _ = self.trained(tmp_path / "uncut")
        with cut_off() as ctrl_c:
            self.trained(tmp_path / "cut", at=lambda step: ctrl_c() if step == 5 else None)
        net, found = self.trained(tmp_path / "cut")
        assert same(net, uncut) and found.step == 6

    def test_of_a_run_that_was_finished(self, tmp_path: Path) -> None:
        first, expected = self.trained(tmp_path)
        again, found = self.trained(tmp_path)
        assert same(again, first) and found.step == expected.step == 6

    def test_of_a_state_of_an_earlier_version(self, tmp_path: Path) -> None:
        """It goes on, and knows of no step before."""
        with pytest.raises(Crash):
            self.trained(tmp_path, at=crash_at(7), state_every=7)
        saved = torch.load(tmp_path / "training.pt", weights_only=True)
        del saved["best"]
        torch.save(saved, tmp_path / "training.pt")
        _, found = self.trained(tmp_path)
        assert found.step == 9
