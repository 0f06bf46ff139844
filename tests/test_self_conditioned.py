"""A DiT whose later blocks are conditioned on its own features, beside diffusers' own DiT."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from command import assert_refused, call
from cut_off import cut_off
from diffusers import DDPMScheduler, DiTTransformer2DModel
from safetensors.torch import load_file, save_file
from tiny_classes import NAMES, TINY, train, weights, write_colours
from tiny_transformer import CHANNELS, N_CLASSES, SIZE, make_transformer
from torch import Tensor, nn

from dive_fast import DiffusionClassifier, ModelError, accelerate
from dive_fast.core.probes import ProbeList
from dive_fast.core.schedule import Schedule, make_betas
from dive_fast.models import load_model
from dive_fast.models.dit.model import DiT
from dive_fast.models.dit.self_conditioned import SelfConditionedDiT
from dive_fast.training import classes_learner as learning
from dive_fast.training.classes_learner import spread_timesteps
from dive_fast.training.dit import build_transformer, write_model

# The same fp32 operations, summed in another order.
ROUNDING = {"rtol": 1e-5, "atol": 1e-5}
WEIGHTS = Path("transformer") / "diffusion_pytorch_model.safetensors"
LETTERS = tuple("abcde")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_colours(tmp_path_factory.mktemp("pictures"))


def make(layers: int = 4, **options) -> SelfConditionedDiT:
    """Of 16 numbers a token; its features matter."""
    options = {"learned_sigma": False, **options}
    network = make_transformer(kind=SelfConditionedDiT, layers=layers, **options)
    network.rerouting.weight.normal_()
    network.rerouting.bias.normal_()
    return network


def inputs(m: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(m, CHANNELS, SIZE, SIZE, generator=generator)
    return x_t, torch.arange(m) * 150 + 7, torch.arange(m) % N_CLASSES


class _Adding(nn.Module):
    """An embedder to whose result something is added, from some of its calls on."""

    def __init__(self, embedder: nn.Module, after: int) -> None:
        super().__init__()
        self.embedder, self.after, self.calls = embedder, after, 0
        self.added: Tensor | None = None

    def forward(self, timestep, class_labels, hidden_dtype=None) -> Tensor:
        found = self.embedder(timestep, class_labels, hidden_dtype=hidden_dtype)
        self.calls += 1
        return found + self.added if self.calls > self.after else found


def reference(network: SelfConditionedDiT, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    """diffusers' own forward with its embedders wrapped; the features by their definition."""
    state = {k: v for k, v in network.state_dict().items() if not k.startswith("rerouting")}
    plain = DiTTransformer2DModel.from_config(network.config)
    plain.load_state_dict(state)
    blocks, middle = plain.eval().transformer_blocks, max(1, len(network.transformer_blocks) // 2)
    # The first block's embedder serves the output layer as well, by its second call.
    wrapped = [_Adding(blocks[0].norm1.emb, 1)]
    wrapped += [_Adding(block.norm1.emb, 0) for block in blocks[middle:]]
    for place, embedder in zip([blocks[0], *blocks[middle:]], wrapped, strict=True):
        place.norm1.emb = embedder

    def pool(module, given, tokens: Tensor) -> None:
        mean = tokens.sum(dim=1) / tokens.shape[1]
        centred = mean - mean.mean(dim=1, keepdim=True)
        normed = centred / (centred.square().mean(dim=1, keepdim=True) + 1e-5).sqrt()
        for embedder in wrapped:
            embedder.added = normed @ network.rerouting.weight.T + network.rerouting.bias

    blocks[middle - 1].register_forward_hook(pool)
    return plain(x_t, timestep=t, class_labels=labels).sample


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("layers", [1, 2, 3, 4])
def test_the_forward_is_the_definition(layers: int, tied: bool) -> None:
    network = make(layers, tied=tied)
    x_t, t, labels = inputs()
    expected = reference(network, x_t, t, labels)
    torch.testing.assert_close(network(x_t, t, labels).sample, expected, **ROUNDING)
    (found,) = network(x_t, timestep=t, class_labels=labels, return_dict=False)
    torch.testing.assert_close(found, expected, **ROUNDING)
    assert found.shape == x_t.shape


def test_it_starts_as_the_plain_network() -> None:
    config = dataclasses.replace(TINY, sample_size=8, num_classes=3, in_channels=3, layers=4)
    torch.manual_seed(0)
    plain = build_transformer(config)
    torch.manual_seed(0)
    network = build_transformer(config, self_condition=True)
    state = network.state_dict()
    assert not state.pop("rerouting.weight").any() and not state.pop("rerouting.bias").any()
    assert state.keys() == plain.state_dict().keys()
    assert all(torch.equal(state[name], w) for name, w in plain.state_dict().items())
    with torch.no_grad():  # fresh blocks and outputs are zero
        for part in (plain, network):
            torch.manual_seed(1)
            for parameter in part.transformer_blocks.parameters():
                parameter.normal_(std=0.3)
            part.proj_out_2.weight.normal_()
    x_t = torch.randn(4, 3, 8, 8)
    t, labels = torch.tensor([0, 5, 500, 999]), torch.tensor([0, 1, 2, 3])
    found, expected = network(x_t, t, labels).sample, plain(x_t, t, labels).sample
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(found, expected, **ROUNDING)


def test_features_reach_the_later_blocks_and_the_output_and_no_others() -> None:
    """Of four blocks the third is the first to see them."""
    network = make()
    seen: dict[str, Tensor] = {}
    for name, module in network.named_modules():
        if name in ("proj_out_2", *(f"transformer_blocks.{i}" for i in range(4))):
            module.register_forward_hook(lambda m, a, found, name=name: seen.update({name: found}))
    network(*inputs())
    before = dict(seen)
    network.rerouting.weight.mul_(-1)
    network(*inputs())
    changed = {name for name in seen if not torch.equal(seen[name], before[name])}
    assert changed == {"transformer_blocks.2", "transformer_blocks.3", "proj_out_2"}
    # The output layer takes them by itself as well.
    network = make(layers=1)
    first = network(*inputs()).sample
    network.rerouting.bias.mul_(-1)
    assert not torch.allclose(network(*inputs()).sample, first, atol=1e-3)


def test_the_zeros_that_it_starts_with_have_a_gradient() -> None:
    config = dataclasses.replace(TINY, sample_size=8, num_classes=3, in_channels=3, layers=4)
    network = build_transformer(config, self_condition=True)
    nn.init.normal_(network.proj_out_2.weight)
    network(
        torch.randn(2, 3, 8, 8), torch.tensor([1, 2]), torch.tensor([0, 1])
    ).sample.sum().backward()
    assert network.rerouting.weight.grad.abs().max() > 0
    assert network.rerouting.bias.grad.abs().max() > 0


@pytest.mark.parametrize("tied", [True, False])
def test_the_family_gives_what_the_network_gives(tied: bool) -> None:
    network = make(tied=tied)
    x_t, t, labels = inputs()
    expected = network(x_t, t, labels).sample
    model = make_model(network, tied)
    found = model.predict(x_t, t, model.vocabulary.table[labels])
    torch.testing.assert_close(found, expected, **ROUNDING)


def make_model(network: SelfConditionedDiT, tied: bool = True) -> DiT:
    """It takes the embedders out of the network."""
    schedule = Schedule.from_betas(make_betas("linear", 1000))
    return DiT(network, None, schedule, LETTERS, tied=tied)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("blocks", [0, 1, 2, 3, 4])
def test_the_parts_together_are_the_network(blocks: int, tied: bool) -> None:
    """Wherever it is cut: before the features are made, and behind."""
    model = make_model(make(tied=tied), tied)
    assert model.encoder_blocks == 2
    model.encoder_blocks = blocks
    x_t, t, labels = inputs(7)
    condition = model.vocabulary.table[labels].requires_grad_()
    projected = model.project(condition)
    encoded = model.encoder(model.prefix(x_t, t), projected)
    assert len(encoded) == (3 if blocks >= 2 else 2)
    found, expected = model.decoder(encoded, projected), model.predict(x_t, t, condition)
    torch.testing.assert_close(found, expected, **ROUNDING)
    gradients = [torch.autograd.grad(x.square().sum(), condition)[0] for x in (found, expected)]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-3)


def test_the_gradient_of_the_condition_goes_through_the_features() -> None:
    model = make_model(make().double())
    x_t, t, labels = inputs(2)
    condition = model.vocabulary.table[labels].double().requires_grad_()

    def predict(v: Tensor) -> Tensor:
        return model.predict(x_t.double(), t, v)

    assert torch.autograd.gradcheck(predict, condition)
    whole = torch.autograd.grad(predict(condition).sum(), condition)[0]
    with torch.no_grad():  # all but the constant part of the features
        model.transformer.rerouting.weight.zero_()
    assert not torch.allclose(torch.autograd.grad(predict(condition).sum(), condition)[0], whole)


def test_accelerate_leaves_the_features_alone() -> None:
    """Its one embedder for all blocks is not what the features are added to."""
    network = make()
    x = inputs()
    expected = network(*x).sample
    fast = accelerate(network)
    assert torch.equal(fast(*x).sample, expected) and fast.statistics().plain_calls == 0


@pytest.fixture
def saved(tmp_path: Path) -> tuple[SelfConditionedDiT, Path]:
    network = make()
    (tmp_path / "model").mkdir()
    write_model(tmp_path / "model", network, LETTERS)
    return network, tmp_path / "model"


def test_saved_and_loaded(saved) -> None:
    network, directory = saved
    index = json.loads((directory / "model_index.json").read_text())
    module, name = index["transformer"]
    assert (module, name) == (SelfConditionedDiT.__module__, "SelfConditionedDiT")
    expected = network(*inputs()).sample
    for again in (
        SelfConditionedDiT.from_pretrained(directory / "transformer"),
        SelfConditionedDiT.from_config(network.config),
    ):
        again.load_state_dict(network.state_dict())
        assert torch.equal(again.eval()(*inputs()).sample, expected)
    loaded = SelfConditionedDiT.from_pretrained(directory / "transformer").eval()
    assert torch.equal(loaded(*inputs()).sample, expected)
    model = load_model(directory, device="cpu")
    x_t, t, labels = inputs()
    found = model.predict(x_t, t, model.vocabulary.table[labels])
    torch.testing.assert_close(found, expected, **ROUNDING)
    half = load_model(directory, device="cpu", dtype="bfloat16")
    assert half.transformer.rerouting.weight.dtype == torch.bfloat16
    found = half.predict(x_t, t, half.vocabulary.table[labels]).float()
    assert (found - expected).square().mean() < 0.01 * expected.square().mean()


@pytest.mark.parametrize("cache", ["off", "exact", "encoder"])
def test_the_losses_of_the_classifier(cache: str, saved) -> None:
    """|| eps - eps_theta(x_t, t, y) ||^2 / dim by the plain module's forward."""
    _, directory = saved
    network = SelfConditionedDiT.from_pretrained(directory / "transformer").eval()
    generator = torch.Generator().manual_seed(5)
    x0 = torch.randn(2, CHANNELS, SIZE, SIZE, generator=generator)
    eps, t = torch.randn(3, CHANNELS, SIZE, SIZE, generator=generator), torch.tensor([900, 20, 400])
    alpha_bar = DDPMScheduler(beta_schedule="linear").alphas_cumprod[t][:, None, None, None]
    expected = torch.empty(2, N_CLASSES, 3)
    with torch.no_grad():
        for i, c in ((i, c) for i in range(2) for c in range(N_CLASSES)):
            x_t = alpha_bar.sqrt() * x0[i] + (1 - alpha_bar).sqrt() * eps
            found = network(x_t, t, torch.full((3,), c)).sample
            expected[i, c] = (eps - found).square().mean(dim=(1, 2, 3))
    classifier = DiffusionClassifier.from_pretrained(directory, device="cpu", cache=cache)
    found = classifier.losses(latents=x0, probes=ProbeList(t, eps, torch.arange(3)))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strategy", ["enumerate", "race", "invert", "auto"])
def test_every_strategy_answers_alike_with_and_without_the_cache(strategy: str, saved) -> None:
    _, directory = saved
    x0 = torch.randn(2, CHANNELS, SIZE, SIZE)
    answers = [
        DiffusionClassifier.from_pretrained(directory, device="cpu", cache=cache)(
            latents=x0, strategy=strategy, probes=20
        )
        for cache in ("off", "exact")
    ]
    for a, b in zip(*answers, strict=True):
        assert (a.index, a.evaluations) == (b.index, b.evaluations)


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
def test_checkpoints_that_do_not_fit(change: str, saved, folder: Path, capsys) -> None:
    _, directory = saved
    state = load_file(directory / WEIGHTS)
    message = "1 missing keys, the first is rerouting.weight"
    if change == "missing":
        del state["rerouting.weight"]
    elif change == "shape":
        state["rerouting.weight"] = torch.zeros(3, 3)
        message = r"size mismatch for rerouting.weight: \[3, 3\], expected \[16, 16\]"
    else:  # it would be another network without them
        index = json.loads((directory / "model_index.json").read_text())
        index["transformer"] = ["diffusers", "DiTTransformer2DModel"]
        (directory / "model_index.json").write_text(json.dumps(index))
        message = "2 unexpected keys, the first is rerouting.bias"
    save_file(state, directory / WEIGHTS)
    with pytest.raises(ModelError, match=message):
        load_model(directory)
    said = call(capsys, "classify", folder / "red" / "0.png", "--model", directory)
    assert_refused(said, message)


def test_the_command(folder: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "model"
    sizes = ["--size", 8, "--patch-size", 4, "--width", 16, "--heads", 2, "--layers", 2]
    course = ["--held-out", 0.5, "--batch-size", 6, "--steps", 6, "--samples-every", 3]
    said = call(
        capsys, "train-classes", "--data", folder, "--out", out, "--self-condition", *sizes,
        *course, "--readers", 0, "--bf16", "--checkpoints", 2, "--learning-rate", 0.01,
    )  # fmt: skip
    assert said.code == 0, said.err
    assert json.loads((out / "dive_fast.json").read_text())["config"]["self_condition"] is True
    state = weights(out)
    assert state["rerouting.weight"].abs().max() > 0
    assert (out / "samples" / "000006.png").exists()
    classifier = DiffusionClassifier.from_pretrained(out)
    assert isinstance(classifier.model.transformer, SelfConditionedDiT)
    picture = folder / "red" / "0.png"
    said = call(capsys, "classify", picture, "--model", out, "--probes", 4)
    assert said.code == 0 and said.out.split()[1] in NAMES
    run = ["--data", folder, "--model", out, "--probes", 4, "--out", tmp_path / "run"]
    assert call(capsys, "evaluate", *run).code == 0
    assert call(capsys, "fit", "--data", folder, "--model", out, "--limit", 6).code == 0
    others = tmp_path / "others"
    shutil.copytree(folder, others)
    for path in list(others.rglob("*.png")):
        path.rename(path.with_stem(f"other-{path.stem}"))
    probe = ["--data", folder, "--test", others, "--limit", 4, "--out", tmp_path / "probe"]
    probe += ["--layer", "transformer_blocks.1", "--timestep", 100, "--grid", 1, "--probes", 4]
    said = call(capsys, "probe", *probe, "--model", out)
    assert said.code == 0, said.err
    shutil.rmtree(out)
    said = call(capsys, "train-classes", "--data", folder, "--out", out, *sizes, *course)
    assert said.code == 0 and "rerouting.weight" not in weights(out)


def test_training_that_was_cut_off_goes_on(folder: Path, tmp_path: Path, monkeypatch) -> None:
    """To the same weights bit for bit; another choice is another training."""
    config = dataclasses.replace(TINY, layers=2, self_condition=True, learning_rate=1e-2)
    expected = train(folder, tmp_path / "uncut", config)
    with cut_off() as ctrl_c, monkeypatch.context() as patch:
        steps: list[int] = []

        def spread(n: int, *arguments) -> Tensor:
            steps.extend([n] if n == TINY.batch_size else [])
            if len(steps) == 3:
                ctrl_c()
            return spread_timesteps(n, *arguments)

        patch.setattr(learning, "spread_timesteps", spread)
        train(folder, tmp_path / "cut", config)
    assert not (tmp_path / "cut" / "model_index.json").exists()
    found = train(folder, tmp_path / "cut", config)
    assert found.losses == expected.losses
    state = weights(tmp_path / "uncut")
    assert state["rerouting.weight"].any()
    for name, weight in weights(tmp_path / "cut").items():
        assert torch.equal(state[name], weight), name
