"""The published loops of bench/baselines, against each other and against numbers worked by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, DiTTransformer2DModel

from bench.baselines import diffusion_classifier, dive
from bench.baselines.diffusion_classifier import (
    all_timesteps,
    eval_prob_adaptive,
    eval_prob_all,
    interval_timesteps,
    q_sample,
    stage_timesteps,
)
from bench.baselines.dive import invert, nearest_class, noise_table, predict_with_vectors, project

N_CLASSES, WIDTH, CHANNELS, SIZE = 5, 16, 2, 4
ALPHA_BAR = DDPMScheduler(beta_schedule="linear").alphas_cumprod
# The same rows in another batch: fp32 sums of a two-layer model in another order.
CLOSE = {"rtol": 1e-4, "atol": 1e-6}


def make_transformer(seed: int = 0, out_channels: int = 2 * CHANNELS) -> DiTTransformer2DModel:
    torch.manual_seed(seed)
    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=WIDTH // 2,
        in_channels=CHANNELS,
        out_channels=out_channels,
        num_layers=2,
        sample_size=SIZE,
        patch_size=2,
        num_embeds_ada_norm=N_CLASSES,
    )
    table = torch.randn(N_CLASSES + 1, WIDTH) * 0.5
    with torch.no_grad():
        for block in model.transformer_blocks:
            block.norm1.emb.class_embedder.embedding_table.weight.copy_(table)
            # Large enough that the class, which enters here, moves the loss.
            block.norm1.linear.weight.normal_(std=0.5)
    return model.eval()


@pytest.fixture(scope="module")
def transformer() -> DiTTransformer2DModel:
    return make_transformer()


@pytest.fixture(scope="module")
def x0() -> torch.Tensor:
    return torch.randn(1, CHANNELS, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def noises() -> torch.Tensor:
    return noise_table((CHANNELS, SIZE, SIZE), n=60)


@pytest.fixture(scope="module")
def errors(transformer, x0, noises) -> torch.Tensor:
    """Enumeration at 25 timesteps: [C, 25]."""
    return eval_prob_all(transformer, x0, N_CLASSES, ALPHA_BAR, noises, 40)


def label_table(transformer: DiTTransformer2DModel) -> torch.Tensor:
    return transformer.transformer_blocks[0].norm1.emb.class_embedder.embedding_table.weight.data


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
def test_enumeration_is_one_forward_per_class_and_timestep(
    transformer, x0, noises, batch_size
) -> None:
    errors = eval_prob_all(transformer, x0, N_CLASSES, ALPHA_BAR, noises, 40, batch_size=batch_size)
    expected = [
        [naive_error(transformer, x0, noises[None, k], 20 + 40 * k, c) for k in range(25)]
        for c in range(N_CLASSES)
    ]
    torch.testing.assert_close(errors, torch.tensor(expected), **CLOSE)


def test_classes_matter_in_the_test_model(errors) -> None:
    means = errors.mean(dim=1).sort().values
    assert (means.diff() > 1e-3).all()


def test_a_model_without_learned_sigma_is_read_whole(x0, noises) -> None:
    transformer = make_transformer(out_channels=CHANNELS)
    errors = eval_prob_all(transformer, x0, 1, ALPHA_BAR, noises, 500)
    expected = [
        naive_error(transformer, x0, noises[None, k], t, 0) for k, t in ((0, 250), (1, 750))
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


def test_adaptive_stages_worked_by_hand(transformer, x0, noises) -> None:
    stages = {"n_samples": (4, 10), "to_keep": (2, 1), "n_trials": 2, "batch_size": 7}
    pred, data = eval_prob_adaptive(
        transformer, x0, N_CLASSES, ALPHA_BAR, all_noise=noises, **stages
    )
    first = [150, 350, 550, 750]
    then = [50, 250, 450, 650, 850, 950]
    survivors = [c for c in data if len(data[c]["t"]) == 20]
    assert sorted(data) == list(range(N_CLASSES)) and len(survivors) == 2
    for c in range(N_CLASSES):
        order = first + then if c in survivors else first
        assert data[c]["t"].tolist() == [t for t in order for _ in range(2)]
        # The noise index counts evaluated timesteps: noise i belongs to the i-th evaluation.
        expected = [
            naive_error(transformer, x0, noises[None, i], t, c)
            for i, t in enumerate(data[c]["t"].tolist())
        ]
        torch.testing.assert_close(data[c]["pred_errors"], torch.tensor(expected), **CLOSE)
    after_first = {c: data[c]["pred_errors"][:8].mean().item() for c in data}
    assert set(survivors) == set(sorted(after_first, key=after_first.get)[:2])
    assert pred == min(survivors, key=lambda c: data[c]["pred_errors"].mean().item())


def test_one_stage_is_full_enumeration(transformer, x0, noises, errors) -> None:
    pred, data = eval_prob_adaptive(
        transformer, x0, N_CLASSES, ALPHA_BAR, n_samples=[25], to_keep=[1], all_noise=noises
    )
    stacked = torch.stack([data[c]["pred_errors"] for c in range(N_CLASSES)])
    torch.testing.assert_close(stacked, errors, **CLOSE)
    assert pred == errors.mean(dim=1).argmin()


@pytest.mark.parametrize(("loss", "function"), [("l1", F.l1_loss), ("huber", F.huber_loss)])
def test_other_losses(transformer, x0, noises, loss, function) -> None:
    _, data = eval_prob_adaptive(
        transformer, x0, 2, ALPHA_BAR, n_samples=[3], to_keep=[1], all_noise=noises, loss=loss
    )
    for c in range(2):
        expected = [
            naive_error(transformer, x0, noises[None, i], t, c, function)
            for i, t in enumerate((166, 499, 832))
        ]
        assert data[c]["t"].tolist() == [166, 499, 832]
        torch.testing.assert_close(data[c]["pred_errors"], torch.tensor(expected), **CLOSE)


def test_adaptive_noise_comes_from_the_seed(transformer, x0) -> None:
    def run(seed: int, noise: torch.Tensor | None = None) -> torch.Tensor:
        one_stage = {"n_samples": [3], "to_keep": [1], "all_noise": noise, "seed": seed}
        _, data = eval_prob_adaptive(transformer, x0, 2, ALPHA_BAR, **one_stage)
        return data[0]["pred_errors"]

    drawn = torch.randn(3, *x0.shape[1:], generator=torch.Generator().manual_seed(5))
    assert torch.equal(run(5), run(5))
    assert torch.equal(run(5), run(6, drawn))
    assert not torch.equal(run(5), run(6))


# -- inversion -----------------------------------------------------------------------------------


def small_invert(transformer, x0, noises, **settings):
    return invert(transformer, x0, ALPHA_BAR, noises, **{"t_interval": 40, **settings})


def test_a_vector_equal_to_a_table_row_is_its_label(transformer, x0) -> None:
    labels, t = torch.tensor([0, 3, N_CLASSES]), torch.tensor([2, 500, 998])
    x_t = x0.repeat(3, 1, 1, 1)
    before = [block.norm1.emb.class_embedder for block in transformer.transformer_blocks]
    vectors = label_table(transformer)[labels]
    given = predict_with_vectors(transformer, x_t, t, vectors)
    assert torch.equal(given, transformer(x_t, t, labels).sample)
    after = [block.norm1.emb.class_embedder for block in transformer.transformer_blocks]
    assert all(a is b for a, b in zip(before, after, strict=True))


def test_blocks_that_share_an_embedder_get_it_back(x0, noises) -> None:
    copied, shared = make_transformer(), make_transformer()
    # The timestep embedders must be alike before one embedder may stand for both.
    copied.transformer_blocks[1].norm1.emb.load_state_dict(
        copied.transformer_blocks[0].norm1.emb.state_dict()
    )
    shared.transformer_blocks[1].norm1.emb = shared.transformer_blocks[0].norm1.emb
    settings = {"n_loops": 1, "t_interval": 100, "batch_size": 5}
    expected = small_invert(copied, x0, noises, **settings)
    got = small_invert(shared, x0, noises, **settings)
    assert got.train_losses == expected.train_losses
    assert got.monitor_losses == expected.monitor_losses
    # Integer labels work again.
    shared(x0, torch.tensor([1]), torch.tensor([0]))


def test_the_cost_is_the_papers_and_the_weights_stay(transformer, x0, noises) -> None:
    rows = []
    hook = transformer.register_forward_hook(lambda module, args, output: rows.append(len(args[0])))
    result = small_invert(transformer, x0, noises)
    hook.remove()
    assert result.n_forward == sum(rows) == 20 * (25 + 25)
    assert result.n_backward == 20 * 25
    assert all(parameter.grad is None for parameter in transformer.parameters())
    assert len(result.train_losses) == 20
    assert len(result.monitor_losses) == len(result.nearest) == len(result.embeddings) == 20


def test_a_seed_fixes_the_run(transformer, x0, noises) -> None:
    settings = {"n_loops": 2}
    first = small_invert(transformer, x0, noises, **settings)
    second = small_invert(transformer, x0, noises, **settings)
    other = small_invert(transformer, x0, noises, **settings, seed=1)
    assert first.train_losses == second.train_losses
    assert torch.equal(first.embeddings, second.embeddings)
    assert not torch.equal(first.initial_embedding, other.initial_embedding)


def test_draws_follow_the_published_order(transformer, x0, noises, errors) -> None:
    # Without steps the class stays, so each batch's loss is a mean of known enumeration errors.
    result = small_invert(transformer, x0, noises, n_loops=3, batch_size=5, lr=0.0, seed=4)
    table = label_table(transformer)
    torch.manual_seed(4)
    initial = torch.randn(1, WIDTH) * table.std().item() + table.mean().item()
    assert torch.equal(result.initial_embedding, initial)
    c = torch.cdist(initial, table[:-1]).argmin().item()
    order, expected = torch.arange(25), []
    for _ in range(3):
        order = order[torch.randperm(25)]
        expected += [errors[c, order[i : i + 5]].mean().item() for i in range(0, 25, 5)]
    torch.testing.assert_close(torch.tensor(result.train_losses), torch.tensor(expected), **CLOSE)
    assert result.nearest == [c, c, c]
    # Equal losses: only a strictly lower one replaces the best.
    assert result.best_loop == 0 and result.pred == c


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("seed", [2, 3])
def test_monitor_is_the_enumeration_error_of_the_nearest_class(
    transformer, x0, noises, errors, metric, seed
) -> None:
    result = small_invert(
        transformer, x0, noises, n_loops=6, batch_size=5, lr=0.1, metric=metric, seed=seed
    )
    table = label_table(transformer)[:-1]
    assert result.nearest == nearest_class(result.embeddings, table, metric).tolist()
    expected = errors.mean(dim=1)[result.nearest]
    torch.testing.assert_close(torch.tensor(result.monitor_losses), expected, **CLOSE)
    assert result.best_loop == result.monitor_losses.index(min(result.monitor_losses))
    assert result.pred == result.nearest[result.best_loop]


def test_the_unconditional_row_is_no_answer(x0, noises) -> None:
    transformer = make_transformer()
    for block in transformer.transformer_blocks:
        # The origin is nearer to a random start than any random row.
        block.norm1.emb.class_embedder.embedding_table.weight.data[N_CLASSES] = 0
    result = small_invert(transformer, x0, noises, n_loops=1, lr=0.0)
    distance = torch.cdist(result.initial_embedding, label_table(transformer))
    assert distance.argmin() == N_CLASSES
    assert result.nearest == [distance[:, :-1].argmin().item()]
    expected = eval_prob_all(transformer, x0, N_CLASSES, ALPHA_BAR, noises, 40).mean(dim=1)
    assert result.monitor_losses == pytest.approx([expected[result.pred].item()], rel=1e-4)


def test_inversion_leaves_a_worse_class(transformer, x0, noises, errors) -> None:
    result = small_invert(transformer, x0, noises, n_loops=4, batch_size=5, lr=0.1, seed=3)
    table = label_table(transformer)[:-1]
    start = nearest_class(result.initial_embedding, table, "l2").item()
    means = errors.mean(dim=1)
    assert result.pred != start and means[result.pred] < means[start]


def test_first_step_is_adamw_on_the_straight_through_gradient(transformer, x0, noises) -> None:
    result = small_invert(transformer, x0, noises, n_loops=1, lr=0.05)
    v0, table = result.initial_embedding, label_table(transformer)[:-1]
    row = table[torch.cdist(v0, table).argmin()].clone().requires_grad_()
    ts = interval_timesteps(1000, 40)
    x_t = q_sample(x0.expand(25, -1, -1, -1), ts, noises[:25], ALPHA_BAR)
    prediction = predict_with_vectors(transformer, x_t, ts, row.expand(25, -1))[:, :CHANNELS]
    (gradient,) = torch.autograd.grad(F.mse_loss(prediction, noises[:25]), row)
    # AdamW's first step: the moments' bias corrections cancel, weight decay is 0.01.
    expected = v0 * (1 - 0.05 * 0.01) - 0.05 * gradient / (gradient.abs() + 1e-8)
    torch.testing.assert_close(result.embeddings, expected, rtol=1e-4, atol=1e-5)


def test_projection_is_the_row_forward_and_the_identity_backward() -> None:
    table = torch.tensor([[1.0, 0.0], [0.0, 10.0], [-3.0, -3.0]])
    v = torch.tensor([[1.0, 2.0]], requires_grad=True)
    # Nearest by distance is row 0, by angle row 1.
    assert nearest_class(v.detach(), table, "l2").tolist() == [0]
    assert nearest_class(v.detach(), table, "cosine").tolist() == [1]
    projected = project(v, table, "l2")
    torch.testing.assert_close(projected, table[:1])
    (projected * torch.tensor([[3.0, -2.0]])).sum().backward()
    assert v.grad.tolist() == [[3.0, -2.0]]


# -- what an image costs -------------------------------------------------------------------------


def test_runs_count_every_row(transformer, x0, noises, errors) -> None:
    rows = []
    hook = transformer.register_forward_hook(lambda module, args, output: rows.append(len(args[0])))
    settings = {"t_interval": 40, "n_loops": 2}
    inverted = dive.run(transformer, x0, ALPHA_BAR, noises, **settings)
    # A loop is a forward and a backward of each probe, then the monitor's forward.
    assert sum(rows) == 2 * (25 + 25) and inverted.evaluations == sum(rows) + 2 * 25
    assert inverted.answer == invert(transformer, x0, ALPHA_BAR, noises, **settings).pred
    rows.clear()
    full = diffusion_classifier.run_all(transformer, x0, N_CLASSES, ALPHA_BAR, noises, 40)
    assert full.evaluations == sum(rows) == N_CLASSES * 25
    assert full.answer == errors.mean(dim=1).argmin()
    rows.clear()
    stages = {"n_samples": (4, 10), "to_keep": (2, 1), "n_trials": 2, "all_noise": noises}
    staged = diffusion_classifier.run_adaptive(transformer, x0, N_CLASSES, ALPHA_BAR, **stages)
    assert staged.evaluations == sum(rows) == 2 * (N_CLASSES * 4 + 2 * 6)
    hook.remove()
    pred, _ = eval_prob_adaptive(transformer, x0, N_CLASSES, ALPHA_BAR, **stages)
    assert staged.answer == pred
    assert min(inverted.seconds, full.seconds, staged.seconds) > 0


# -- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 7}, "batch_size must divide the 25 probes, got 7"),
        ({"t_interval": 3}, "t_interval must divide the 1000 timesteps, got 3"),
        ({"t_interval": 4}, "expected at least 250 noises, got 60"),
        ({"metric": "dot"}, "metric must be one of .* got 'dot'"),
        ({"n_loops": 0}, "expected a finite monitor loss"),
    ],
)
def test_invert_refuses_bad_settings(transformer, x0, noises, settings, message) -> None:
    with pytest.raises(AssertionError, match=message):
        small_invert(transformer, x0, noises, **settings)


def test_invert_refuses_more_than_one_image(transformer, x0, noises) -> None:
    with pytest.raises(AssertionError, match=r"one image \[1, C, h, w\], got \[2, 2, 4, 4\]"):
        small_invert(transformer, x0.repeat(2, 1, 1, 1), noises)


def test_invert_refuses_blocks_with_different_label_tables(x0, noises) -> None:
    transformer = make_transformer()
    with torch.no_grad():
        transformer.transformer_blocks[1].norm1.emb.class_embedder.embedding_table.weight.add_(1)
    with pytest.raises(AssertionError, match="the same label table"):
        small_invert(transformer, x0, noises)


def test_training_mode_is_refused(x0, noises) -> None:
    transformer = make_transformer().train()
    with pytest.raises(AssertionError, match="must be in eval mode"):
        small_invert(transformer, x0, noises)
    with pytest.raises(AssertionError, match="must be in eval mode"):
        eval_prob_all(transformer, x0, N_CLASSES, ALPHA_BAR, noises, 40)


def test_enumeration_refuses_too_few_noises(transformer, x0, noises) -> None:
    with pytest.raises(AssertionError, match="expected at least 250 noises, got 60"):
        eval_prob_all(transformer, x0, N_CLASSES, ALPHA_BAR, noises, 4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_samples": [3, 6], "to_keep": [1]}, "must be as long, got 2 and 1"),
        ({"n_samples": [3], "to_keep": [2]}, "the last stage must keep 1 class, got 2"),
        ({"n_samples": [3], "to_keep": [1], "loss": "l3"}, "loss must be one of .* got 'l3'"),
        ({"n_samples": [100], "to_keep": [1]}, "expected 100 noises, got 60"),
    ],
)
def test_adaptive_refuses_bad_stages(transformer, x0, noises, settings, message) -> None:
    with pytest.raises(AssertionError, match=message):
        eval_prob_adaptive(transformer, x0, N_CLASSES, ALPHA_BAR, all_noise=noises, **settings)
