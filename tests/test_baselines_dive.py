"""The published inversion of bench/baselines, against enumeration and numbers worked by hand."""

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
    WIDTH,
    X0,
    label_table,
    make_transformer,
    small_invert,
)

from bench.baselines.diffusion_classifier import (
    eval_prob_all,
    interval_timesteps,
    q_sample,
)
from bench.baselines.dive import nearest_class, predict_with_vectors, project


def test_a_vector_equal_to_a_table_row_is_its_label(small_dit) -> None:
    labels, t = torch.tensor([0, 3, N_CLASSES]), torch.tensor([2, 500, 998])
    x_t = X0.repeat(3, 1, 1, 1)
    before = [block.norm1.emb.class_embedder for block in small_dit.transformer_blocks]
    vectors = label_table(small_dit)[labels]
    given = predict_with_vectors(small_dit, x_t, t, vectors)
    assert torch.equal(given, small_dit(x_t, t, labels).sample)
    after = [block.norm1.emb.class_embedder for block in small_dit.transformer_blocks]
    assert all(a is b for a, b in zip(before, after, strict=True))


def test_blocks_that_share_an_embedder_get_it_back() -> None:
    copied, shared = make_transformer(), make_transformer()
    # The timestep embedders must be alike before one embedder may stand for both.
    copied.transformer_blocks[1].norm1.emb.load_state_dict(
        copied.transformer_blocks[0].norm1.emb.state_dict()
    )
    shared.transformer_blocks[1].norm1.emb = shared.transformer_blocks[0].norm1.emb
    settings = {"n_loops": 1, "t_interval": 100, "batch_size": 5}
    expected = small_invert(copied, X0, NOISES, **settings)
    got = small_invert(shared, X0, NOISES, **settings)
    assert got.train_losses == expected.train_losses
    assert got.monitor_losses == expected.monitor_losses
    # Integer labels work again.
    shared(X0, torch.tensor([1]), torch.tensor([0]))


def test_the_cost_is_the_papers_and_the_weights_stay(small_dit) -> None:
    rows = []
    hook = small_dit.register_forward_hook(lambda module, args, output: rows.append(len(args[0])))
    result = small_invert(small_dit, X0, NOISES)
    hook.remove()
    assert result.n_forward == sum(rows) == 20 * (25 + 25)
    assert result.n_backward == 20 * 25
    assert all(parameter.grad is None for parameter in small_dit.parameters())
    assert len(result.train_losses) == 20
    assert len(result.monitor_losses) == len(result.nearest) == len(result.embeddings) == 20


def test_a_seed_fixes_the_run(small_dit) -> None:
    settings = {"n_loops": 2}
    first = small_invert(small_dit, X0, NOISES, **settings)
    second = small_invert(small_dit, X0, NOISES, **settings)
    other = small_invert(small_dit, X0, NOISES, **settings, seed=1)
    assert first.train_losses == second.train_losses
    assert torch.equal(first.embeddings, second.embeddings)
    assert not torch.equal(first.initial_embedding, other.initial_embedding)


def test_draws_follow_the_published_order(small_dit, dit_errors) -> None:
    # Without steps the class stays, so each batch's loss is a mean of known enumeration errors.
    result = small_invert(small_dit, X0, NOISES, n_loops=3, batch_size=5, lr=0.0, seed=4)
    table = label_table(small_dit)
    torch.manual_seed(4)
    initial = torch.randn(1, WIDTH) * table.std().item() + table.mean().item()
    assert torch.equal(result.initial_embedding, initial)
    c = torch.cdist(initial, table[:-1]).argmin().item()
    order, expected = torch.arange(25), []
    for _ in range(3):
        order = order[torch.randperm(25)]
        expected += [dit_errors[c, order[i : i + 5]].mean().item() for i in range(0, 25, 5)]
    torch.testing.assert_close(torch.tensor(result.train_losses), torch.tensor(expected), **CLOSE)
    assert result.nearest == [c, c, c]
    # Equal losses: only a strictly lower one replaces the best.
    assert result.best_loop == 0 and result.pred == c


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("seed", [2, 3])
def test_monitor_is_the_enumeration_error_of_the_nearest_class(
    small_dit, dit_errors, metric, seed
) -> None:
    result = small_invert(
        small_dit, X0, NOISES, n_loops=6, batch_size=5, lr=0.1, metric=metric, seed=seed
    )
    table = label_table(small_dit)[:-1]
    assert result.nearest == nearest_class(result.embeddings, table, metric).tolist()
    expected = dit_errors.mean(dim=1)[result.nearest]
    torch.testing.assert_close(torch.tensor(result.monitor_losses), expected, **CLOSE)
    assert result.best_loop == result.monitor_losses.index(min(result.monitor_losses))
    assert result.pred == result.nearest[result.best_loop]


def test_the_unconditional_row_is_no_answer() -> None:
    transformer = make_transformer()
    for block in transformer.transformer_blocks:
        # The origin is nearer to a random start than any random row.
        block.norm1.emb.class_embedder.embedding_table.weight.data[N_CLASSES] = 0
    result = small_invert(transformer, X0, NOISES, n_loops=1, lr=0.0)
    distance = torch.cdist(result.initial_embedding, label_table(transformer))
    assert distance.argmin() == N_CLASSES
    assert result.nearest == [distance[:, :-1].argmin().item()]
    expected = eval_prob_all(transformer, X0, N_CLASSES, ALPHA_BAR, NOISES, 40).mean(dim=1)
    assert result.monitor_losses == pytest.approx([expected[result.pred].item()], rel=1e-4)


def test_inversion_leaves_a_worse_class(small_dit, dit_errors) -> None:
    result = small_invert(small_dit, X0, NOISES, n_loops=4, batch_size=5, lr=0.1, seed=3)
    table = label_table(small_dit)[:-1]
    start = nearest_class(result.initial_embedding, table, "l2").item()
    means = dit_errors.mean(dim=1)
    assert result.pred != start and means[result.pred] < means[start]


def test_first_step_is_adamw_on_the_straight_through_gradient(small_dit) -> None:
    result = small_invert(small_dit, X0, NOISES, n_loops=1, lr=0.05)
    v0, table = result.initial_embedding, label_table(small_dit)[:-1]
    row = table[torch.cdist(v0, table).argmin()].clone().requires_grad_()
    ts = interval_timesteps(1000, 40)
    x_t = q_sample(X0.expand(25, -1, -1, -1), ts, NOISES[:25], ALPHA_BAR)
    prediction = predict_with_vectors(small_dit, x_t, ts, row.expand(25, -1))[:, :CHANNELS]
    (gradient,) = torch.autograd.grad(F.mse_loss(prediction, NOISES[:25]), row)
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
def test_invert_refuses_bad_settings(small_dit, settings, message) -> None:
    with pytest.raises(AssertionError, match=message):
        small_invert(small_dit, X0, NOISES, **settings)


def test_invert_refuses_more_than_one_image(small_dit) -> None:
    with pytest.raises(AssertionError, match=r"one image \[1, C, h, w\], got \[2, 2, 4, 4\]"):
        small_invert(small_dit, X0.repeat(2, 1, 1, 1), NOISES)


def test_invert_refuses_blocks_with_different_label_tables() -> None:
    transformer = make_transformer()
    with torch.no_grad():
        transformer.transformer_blocks[1].norm1.emb.class_embedder.embedding_table.weight.add_(1)
    with pytest.raises(AssertionError, match="the same label table"):
        small_invert(transformer, X0, NOISES)
