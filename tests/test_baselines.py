"""The published loops that enumerate, against numbers worked by hand; what all of them cost."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from baseline_inputs import (
    ALPHA_BAR,
    CHANNELS,
    CLOSE,
    N_CLASSES,
    NOISES,
    X0,
    make_transformer,
    small_invert,
)

from bench.baselines import diffusion_classifier, dive
from bench.baselines.diffusion_classifier import (
    all_timesteps,
    eval_prob_adaptive,
    eval_prob_all,
    interval_timesteps,
    q_sample,
    stage_timesteps,
)
from bench.baselines.dive import invert, noise_table

# -- enumeration ---------------------------------------------------------------------------------


def test_the_paper_has_250_timesteps() -> None:
    ts = interval_timesteps(1000, 4)
    assert len(ts) == 250 and ts[:3].tolist() == [2, 6, 10] and ts[-1] == 998


def test_noise_table_is_the_published_one() -> None:
    torch.manual_seed(42)
    expected = torch.randn(1024, 1, 3, 5)
    assert torch.equal(noise_table((1, 3, 5)), expected)


def test_q_sample_at_a_worked_example() -> None:
    alphas_cumprod = torch.tensor([0.64, 0.36])
    x0, eps = torch.ones(2, 1, 1, 1), torch.full((2, 1, 1, 1), 2.0)
    x_t = q_sample(x0, torch.tensor([0, 1]), eps, alphas_cumprod)
    # 0.8 * 1 + 0.6 * 2 and 0.6 * 1 + 0.8 * 2
    torch.testing.assert_close(x_t.flatten(), torch.tensor([2.0, 2.2]))


def naive_error(transformer, x0, eps, t: int, label: int, loss=F.mse_loss) -> float:
    x_t = ALPHA_BAR[t].sqrt() * x0 + (1 - ALPHA_BAR[t]).sqrt() * eps
    with torch.no_grad():
        output = transformer(x_t, torch.tensor([t]), torch.tensor([label])).sample
    return loss(output[:, :CHANNELS], eps).item()


@pytest.mark.parametrize("batch_size", [7, 25])
def test_enumeration_is_one_forward_per_class_and_timestep(small_dit, batch_size) -> None:
    errors = eval_prob_all(small_dit, X0, N_CLASSES, ALPHA_BAR, NOISES, 40, batch_size=batch_size)
    expected = [
        [naive_error(small_dit, X0, NOISES[None, k], 20 + 40 * k, c) for k in range(25)]
        for c in range(N_CLASSES)
    ]
    torch.testing.assert_close(errors, torch.tensor(expected), **CLOSE)


def test_classes_matter_in_the_test_model(dit_errors) -> None:
    means = dit_errors.mean(dim=1).sort().values
    assert (means.diff() > 1e-3).all()


def test_a_model_without_learned_sigma_is_read_whole() -> None:
    transformer = make_transformer(out_channels=CHANNELS)
    errors = eval_prob_all(transformer, X0, 1, ALPHA_BAR, NOISES, 500)
    expected = [
        naive_error(transformer, X0, NOISES[None, k], t, 0) for k, t in ((0, 250), (1, 750))
    ]
    torch.testing.assert_close(errors[0], torch.tensor(expected), **CLOSE)


# -- adaptive stages -----------------------------------------------------------------------------


def test_stage_timesteps_worked_by_hand() -> None:
    t_to_eval = all_timesteps(1000, 10)
    assert t_to_eval == [50, 150, 250, 350, 450, 550, 650, 750, 850, 950]
    assert stage_timesteps(t_to_eval, 4) == [150, 350, 550, 750]
    assert stage_timesteps(t_to_eval, 10) == t_to_eval
    # 1000 // 60 = 16 leaves a rest; the list is cut to 60.
    assert all_timesteps(1000, 60)[:2] == [8, 24] and len(all_timesteps(1000, 60)) == 60


def test_adaptive_stages_worked_by_hand(small_dit) -> None:
    stages = {"n_samples": (4, 10), "to_keep": (2, 1), "n_trials": 2, "batch_size": 7}
    pred, data = eval_prob_adaptive(small_dit, X0, N_CLASSES, ALPHA_BAR, all_noise=NOISES, **stages)
    first = [150, 350, 550, 750]
    then = [50, 250, 450, 650, 850, 950]
    survivors = [c for c in data if len(data[c]["t"]) == 20]
    assert sorted(data) == list(range(N_CLASSES)) and len(survivors) == 2
    for c in range(N_CLASSES):
        order = first + then if c in survivors else first
        assert data[c]["t"].tolist() == [t for t in order for _ in range(2)]
        # The noise index counts evaluated timesteps: noise i belongs to the i-th evaluation.
        expected = [
            naive_error(small_dit, X0, NOISES[None, i], t, c)
            for i, t in enumerate(data[c]["t"].tolist())
        ]
        torch.testing.assert_close(data[c]["pred_errors"], torch.tensor(expected), **CLOSE)
    after_first = {c: data[c]["pred_errors"][:8].mean().item() for c in data}
    assert set(survivors) == set(sorted(after_first, key=after_first.get)[:2])
    assert pred == min(survivors, key=lambda c: data[c]["pred_errors"].mean().item())


def test_one_stage_is_full_enumeration(small_dit, dit_errors) -> None:
    pred, data = eval_prob_adaptive(
        small_dit, X0, N_CLASSES, ALPHA_BAR, n_samples=[25], to_keep=[1], all_noise=NOISES
    )
    stacked = torch.stack([data[c]["pred_errors"] for c in range(N_CLASSES)])
    torch.testing.assert_close(stacked, dit_errors, **CLOSE)
    assert pred == dit_errors.mean(dim=1).argmin()


@pytest.mark.parametrize(("loss", "function"), [("l1", F.l1_loss), ("huber", F.huber_loss)])
def test_other_losses(small_dit, loss, function) -> None:
    _, data = eval_prob_adaptive(
        small_dit, X0, 2, ALPHA_BAR, n_samples=[3], to_keep=[1], all_noise=NOISES, loss=loss
    )
    for c in range(2):
        expected = [
            naive_error(small_dit, X0, NOISES[None, i], t, c, function)
            for i, t in enumerate((166, 499, 832))
        ]
        assert data[c]["t"].tolist() == [166, 499, 832]
        torch.testing.assert_close(data[c]["pred_errors"], torch.tensor(expected), **CLOSE)


def test_adaptive_noise_comes_from_the_seed(small_dit) -> None:
    def run(seed: int, noise: torch.Tensor | None = None) -> torch.Tensor:
        one_stage = {"n_samples": [3], "to_keep": [1], "all_noise": noise, "seed": seed}
        _, data = eval_prob_adaptive(small_dit, X0, 2, ALPHA_BAR, **one_stage)
        return data[0]["pred_errors"]

    drawn = torch.randn(3, *X0.shape[1:], generator=torch.Generator().manual_seed(5))
    assert torch.equal(run(5), run(5))
    assert torch.equal(run(5), run(6, drawn))
    assert not torch.equal(run(5), run(6))


# -- what an image costs -------------------------------------------------------------------------


def test_runs_count_every_row(small_dit, dit_errors) -> None:
    rows = []
    hook = small_dit.register_forward_hook(lambda module, args, output: rows.append(len(args[0])))
    settings = {"t_interval": 40, "n_loops": 2}
    inverted = dive.run(small_dit, X0, ALPHA_BAR, NOISES, **settings)
    # A loop is a forward and a backward of each probe, then the monitor's forward.
    assert sum(rows) == 2 * (25 + 25) and inverted.evaluations == sum(rows) + 2 * 25
    assert inverted.answer == invert(small_dit, X0, ALPHA_BAR, NOISES, **settings).pred
    rows.clear()
    full = diffusion_classifier.run_all(small_dit, X0, N_CLASSES, ALPHA_BAR, NOISES, 40)
    assert full.evaluations == sum(rows) == N_CLASSES * 25
    assert full.answer == dit_errors.mean(dim=1).argmin()
    rows.clear()
    stages = {"n_samples": (4, 10), "to_keep": (2, 1), "n_trials": 2, "all_noise": NOISES}
    staged = diffusion_classifier.run_adaptive(small_dit, X0, N_CLASSES, ALPHA_BAR, **stages)
    assert staged.evaluations == sum(rows) == 2 * (N_CLASSES * 4 + 2 * 6)
    hook.remove()
    pred, _ = eval_prob_adaptive(small_dit, X0, N_CLASSES, ALPHA_BAR, **stages)
    assert staged.answer == pred
    assert min(inverted.seconds, full.seconds, staged.seconds) > 0


# -- bad input -----------------------------------------------------------------------------------


def test_training_mode_is_refused() -> None:
    transformer = make_transformer().train()
    with pytest.raises(AssertionError, match="must be in eval mode"):
        small_invert(transformer, X0, NOISES)
    with pytest.raises(AssertionError, match="must be in eval mode"):
        eval_prob_all(transformer, X0, N_CLASSES, ALPHA_BAR, NOISES, 40)


def test_enumeration_refuses_too_few_noises(small_dit) -> None:
    with pytest.raises(AssertionError, match="expected at least 250 noises, got 60"):
        eval_prob_all(small_dit, X0, N_CLASSES, ALPHA_BAR, NOISES, 4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_samples": [3, 6], "to_keep": [1]}, "must be as long, got 2 and 1"),
        ({"n_samples": [3], "to_keep": [2]}, "the last stage must keep 1 class, got 2"),
        ({"n_samples": [3], "to_keep": [1], "loss": "l3"}, "loss must be one of .* got 'l3'"),
        ({"n_samples": [100], "to_keep": [1]}, "expected 100 noises, got 60"),
    ],
)
def test_adaptive_refuses_bad_stages(small_dit, settings, message) -> None:
    with pytest.raises(AssertionError, match=message):
        eval_prob_adaptive(small_dit, X0, N_CLASSES, ALPHA_BAR, all_noise=NOISES, **settings)
