"""The prior over layouts: it knows what it was trained on, and its gradient is right."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cut_off import cut_off
from tiny_prior import FORMAT, TABLE, make_prior, pairs
from torch import Tensor

from dive_fast.core.layouts import LayoutFormat
from dive_fast.errors import ModelError, RunError
from dive_fast.priors import LayoutPrior, load_prior
from dive_fast.priors.layout_prior import table_digest
from dive_fast.training import prior as training
from dive_fast.training.prior import PriorTrainingConfig, train_prior

CONFIG = PriorTrainingConfig(
    width=32, layers=2, heads=2, steps=300, batch_size=64, learning_rate=1e-2, warmup_steps=20
)


def train(
    out: Path, config: PriorTrainingConfig = CONFIG, draw: Callable[[int], Tensor] = pairs
) -> tuple[LayoutPrior, float]:
    out.mkdir(exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        sizes = dict(width=config.width, layers=config.layers, heads=config.heads)
        prior = LayoutPrior.for_table(FORMAT, TABLE, pairs(0), **sizes)
    loss = train_prior(prior, TABLE, draw, pairs(10**6), config, out, progress=False)
    return prior, loss


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> LayoutPrior:
    return train(tmp_path_factory.mktemp("prior"))[0]


def mean_losses(prior: LayoutPrior, tokens: Tensor, k: int = 64) -> Tensor:
    """[N], the same probes for all."""
    generator = torch.Generator().manual_seed(3)
    timesteps = torch.linspace(100, 900, k).long()
    noises = torch.randn(k, FORMAT.n_slots, TABLE.shape[1], generator=generator)
    return prior.losses(TABLE[tokens], timesteps, noises).mean(dim=1)


def duplicate(tokens: Tensor) -> Tensor:
    tokens = tokens.clone()
    tokens[:, 6:9] = tokens[:, 0:3]
    return tokens


def sliver(tokens: Tensor) -> Tensor:
    """A third object, half as high as the first one and inside it."""
    tokens = duplicate(tokens)
    tokens[:, 8] -= FORMAT.grid
    return tokens


def swap_classes(tokens: Tensor) -> Tensor:
    tokens = tokens.clone()
    tokens[:, [0, 3]] = tokens[:, [3, 0]]
    return tokens


# About a third of what was measured: 0.073, 0.115 and 0.019.
@pytest.mark.parametrize(
    ("spoil", "margin"), [(duplicate, 0.025), (sliver, 0.04), (swap_classes, 0.006)]
)
def test_unusual_layouts_have_a_higher_loss(trained: LayoutPrior, spoil, margin: float) -> None:
    good = pairs(77)
    assert (mean_losses(trained, spoil(good)) - mean_losses(trained, good)).mean() > margin


@pytest.mark.parametrize("spoil", [duplicate, sliver, swap_classes])
def test_unusual_layouts_surprise(trained: LayoutPrior, spoil) -> None:
    good = pairs(77)
    assert (trained.surprise(spoil(good)) > trained.surprise(good)).double().mean() > 0.9


def test_unlearned_it_takes_all_tokens_for_equally_likely() -> None:
    """The noise of the mean over the tokens that a slot can hold, each as likely as v_t says."""
    prior = LayoutPrior.for_table(FORMAT, TABLE, pairs(0), width=32, layers=1, heads=2).eval()
    generator = torch.Generator().manual_seed(6)
    v, t = TABLE[pairs(2, 4)].double(), torch.tensor([1, 300, 600, 999])
    eps = torch.randn(v.shape, generator=generator, dtype=torch.float64)
    v_t = prior.noised(v, t, eps)
    with torch.no_grad():
        found = prior.double()(v_t, t)
    for b, s in ((b, s) for b in range(4) for s in range(FORMAT.n_slots)):
        start, stop = FORMAT.coordinate_range if s % 3 else FORMAT.class_range
        rows = prior.config.scale * TABLE[[*range(start, stop), FORMAT.none]].double()
        a, sigma = prior.schedule.a[t[b]].double(), prior.schedule.s[t[b]].double()
        normal = torch.distributions.Normal(a * rows, sigma)
        weights = normal.log_prob(v_t[b, s]).sum(dim=1).softmax(dim=0)
        expected = (v_t[b, s] - a * (weights @ rows)) / sigma
        torch.testing.assert_close(found[b, s], expected, rtol=1e-6, atol=1e-6)


def test_surprise_by_hand(trained: LayoutPrior) -> None:
    """Slot by slot: nothing but noise there, none elsewhere, and what is predicted there."""
    tokens = pairs(4, 3)
    tokens[1, 3] = -1  # a class that is not known
    last, v = len(trained.schedule) - 1, TABLE[tokens.clamp_min(0)]
    expected = torch.zeros(3)
    for s in range(FORMAT.n_slots):
        hidden = tokens < 0
        hidden[:, s] = True
        t = torch.where(hidden, last, 0)
        v_t = trained.noised(v, t, torch.zeros_like(v)).masked_fill(hidden[..., None], 0.0)
        classes, corners = trained.log_posteriors(v_t, t)
        of_class, of_corners = trained.positions(tokens)
        logs = corners[:, s - s // 3 - 1] if s % 3 else classes[:, s // 3]
        at = of_corners[:, s - s // 3 - 1] if s % 3 else of_class[:, s // 3]
        found = logs.gather(1, at.clamp_min(0)[:, None])[:, 0]
        expected -= torch.where(tokens[:, s] >= 0, found, 0.0)
    # The last step of the schedule still says a little, and the first hides a little.
    torch.testing.assert_close(trained.surprise(tokens), expected, rtol=2e-2, atol=2e-2)


def test_slot_times() -> None:
    """About half of the layouts have one timestep; all are in the schedule."""
    found = training.slot_times(1000, (400, 9), torch.Generator().manual_seed(0))
    assert found.shape == (400, 9) and 0 <= int(found.min()) and int(found.max()) < 1000
    same = (found == found[:, :1]).all(dim=1)
    assert 150 < int(same.sum()) < 250
    legible = (found[~same] < 250).double().mean(dim=1)
    assert legible.min() < 0.5 and legible.max() == 1


def test_objects_have_no_order() -> None:
    """Objects and their noises in another order give the same loss; noises alone do not."""
    prior, v = make_prior().double(), TABLE[pairs(1, 5)].double()
    generator = torch.Generator().manual_seed(1)
    timesteps = torch.tensor([10, 500, 990])
    noises = torch.randn(3, *v.shape[1:], generator=generator, dtype=torch.float64)
    order = torch.tensor([6, 7, 8, 0, 1, 2, 3, 4, 5])
    losses = prior.losses(v, timesteps, noises)
    torch.testing.assert_close(prior.losses(v[:, order], timesteps, noises[:, order]), losses)
    assert not torch.allclose(prior.losses(v[:, order], timesteps, noises), losses)


@pytest.mark.parametrize("crop", [False, True])
def test_gradient_is_that_of_finite_differences(crop: bool) -> None:
    form = LayoutFormat.compact(("a",), max_objects=2, grid=3, crop=crop)
    generator = torch.Generator().manual_seed(2)
    table = torch.randn(form.vocabulary_size, 4, generator=generator)
    prior = make_prior(form, table).double()
    v = torch.randn(2, form.n_slots, 4, generator=generator, dtype=torch.float64)
    noises = torch.randn(3, form.n_slots, 4, generator=generator, dtype=torch.float64)
    timesteps = torch.tensor([0, 400, 999])
    assert torch.autograd.gradcheck(
        lambda v: prior.losses(v, timesteps, noises), v.requires_grad_(True)
    )


def test_losses_by_hand() -> None:
    """Row by row, from the schedule's factors and the network's prediction."""
    prior, v = make_prior(), TABLE[pairs(1, 3)]
    noises = torch.randn(2, *v.shape[1:], generator=torch.Generator().manual_seed(4))
    timesteps = torch.tensor([50, 700])
    found = prior.losses(v, timesteps, noises)
    assert found.shape == (3, 2) and found.dtype == torch.float32
    for n in range(3):
        for k, t in enumerate(timesteps.tolist()):
            a, s = prior.schedule.a[t], prior.schedule.s[t]
            v_t = a * prior.config.scale * v[n] + s * noises[k]
            eps = prior(v_t[None], torch.tensor([t]))[0]
            torch.testing.assert_close(found[n, k], (noises[k] - eps).square().mean())


def test_embeddings_get_unit_variance() -> None:
    tokens = pairs(0)
    prior = LayoutPrior.for_table(FORMAT, 7 * TABLE, tokens, width=32, layers=1, heads=2)
    assert float((prior.config.scale * 7 * TABLE[tokens]).std()) == pytest.approx(1, rel=1e-5)


def test_no_layouts_and_no_probes() -> None:
    prior = make_prior()
    v, noises = TABLE[pairs(0, 2)], torch.zeros(3, FORMAT.n_slots, 8)
    assert prior.losses(v[:0], torch.tensor([1, 2, 3]), noises).shape == (0, 3)
    assert prior.losses(v, torch.tensor([], dtype=torch.int64), noises[:0]).shape == (2, 0)


def test_training_that_was_cut_off_goes_on(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, steps=6)
    expected, loss = train(tmp_path / "uncut", config)
    with cut_off() as ctrl_c:

        def draw(step: int) -> Tensor:
            if step == 3:
                ctrl_c()
            return pairs(step)

        train(tmp_path / "cut", config, draw)
    found, again = train(tmp_path / "cut", config)
    assert loss == again
    for name, weight in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], weight), name
    with pytest.raises(RunError, match="training run with another configuration"):
        train(tmp_path / "cut", dataclasses.replace(config, seed=1))


class TestDirectory:
    def test_round_trip(self, trained: LayoutPrior, tmp_path: Path) -> None:
        trained.save_pretrained(tmp_path)
        assert (tmp_path / "config.json").exists()
        again = load_prior(tmp_path, FORMAT, TABLE)
        assert not any(p.requires_grad for p in again.parameters())
        tokens = pairs(5)
        torch.testing.assert_close(mean_losses(again, tokens), mean_losses(trained, tokens))

    def test_of_another_model(self, tmp_path: Path) -> None:
        make_prior().save_pretrained(tmp_path)
        other = LayoutFormat.compact(("up", "down"), max_objects=3, grid=5)
        for form, table in ((other, TABLE), (FORMAT, TABLE + 0.1)):
            with pytest.raises(ModelError, match="holds a prior of another model"):
                load_prior(tmp_path, form, table)

    def test_the_table_may_be_stored_in_half_precision(self) -> None:
        assert table_digest(TABLE) == table_digest(TABLE.half().float())

    def test_nothing_there(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match="expected the folder prior"):
            load_prior(tmp_path / "prior", FORMAT, TABLE)

    def test_a_part_is_missing(self, tmp_path: Path) -> None:
        make_prior().save_pretrained(tmp_path)
        (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
        with pytest.raises(ModelError, match=r"expected weights .*\.safetensors"):
            load_prior(tmp_path, FORMAT, TABLE)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"scale": None}, "expected a positive scale in .*config.json, got None"),
            ({"scale": "abc"}, "expected a positive scale"),
            ({"scale": 0}, "expected a positive scale"),
            ({"num_train_timesteps": 1}, "expected at least 2 timesteps, got 1"),
        ],
    )
    def test_a_damaged_configuration(self, tmp_path: Path, change: dict, message: str) -> None:
        make_prior().save_pretrained(tmp_path)
        path = tmp_path / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        with pytest.raises(ModelError, match=message):
            load_prior(tmp_path, FORMAT, TABLE)


class TestBadInput:
    @pytest.mark.parametrize(
        ("v", "timesteps", "noises", "message"),
        [
            ((2, 8, 8), 1, (1, 8, 8), r"expected token embeddings \[N, 3 x objects, 8\]"),
            ((2, 9, 7), 1, (1, 9, 7), r"expected token embeddings .*got \[2, 9, 7\]"),
            ((9, 8), 1, (1, 9, 8), r"expected token embeddings .*got \[9, 8\]"),
            ((2, 9, 8), 1, (1, 6, 8), r"expected noises \[k, 9, 8\].*got \[1, 6, 8\]"),
            ((2, 9, 8), 2, (1, 9, 8), r"expected timesteps int64 of shape \[1\]"),
        ],
    )
    def test_shapes(self, v: tuple, timesteps: int, noises: tuple, message: str) -> None:
        with pytest.raises(ModelError, match=message):
            make_prior().losses(
                torch.zeros(v), torch.zeros(timesteps, dtype=torch.int64), torch.zeros(noises)
            )

    @pytest.mark.parametrize(
        "tokens", [torch.zeros(2, 8, dtype=torch.int64), torch.zeros(9).long(), torch.zeros(2, 9)]
    )
    def test_tokens(self, tokens: Tensor) -> None:
        with pytest.raises(ModelError, match=r"expected tokens int64 \[N, 9\], got"):
            make_prior().surprise(tokens)

    def test_without_its_table(self) -> None:
        bare = LayoutPrior(FORMAT.to_dict(), width=32, layers=1, heads=2)
        with pytest.raises(ModelError, match="expected a prior with its table"):
            bare.losses(torch.zeros(1, 9, 8), torch.tensor([1]), torch.zeros(1, 9, 8))

    @pytest.mark.parametrize("t", [-1, 1000])
    def test_timesteps(self, t: int) -> None:
        with pytest.raises(ModelError, match=rf"timesteps in \[0, 1000\), got {t}"):
            make_prior().losses(torch.zeros(1, 9, 8), torch.tensor([t]), torch.zeros(1, 9, 8))

    @pytest.mark.parametrize("width", [0, 33, 50])
    def test_sizes(self, width: int) -> None:
        with pytest.raises(ModelError, match=f"expected a width that 4 heads divide, got {width}"):
            LayoutPrior(FORMAT.to_dict(), width=width, heads=4)
