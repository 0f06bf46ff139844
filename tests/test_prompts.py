"""Classes as prompts: how they are given, encoded and averaged."""

from __future__ import annotations

import re

import pytest
import torch
from tiny import read_json, write_json
from tiny_sd import LENGTH, write_sd

from dive_fast import DiffusionClassifier, ModelError
from dive_fast.core.probes import low_discrepancy_probes
from dive_fast.core.requests import Answer, Gradients, Losses
from dive_fast.core.vocabulary import Vocabulary
from dive_fast.engine import Engine, Job
from dive_fast.engine.objective import Objective
from dive_fast.models import load_model, resolve
from dive_fast.models.text.prompts import ClassPrompts
from dive_fast.predict.sampling import sample
from dive_fast.strategies.averaged import averaged

TEMPLATES = ("a photo of a {}.", "{}!", "a bad {}")


def latents(n: int = 2) -> torch.Tensor:
    return torch.randn(n, 4, 8, 8, generator=torch.Generator().manual_seed(2))


def test_names_and_templates():
    made = ClassPrompts.make(["cat", "{} dog"])
    assert made.prompts == (("a photo of a cat.",), ("a photo of a {} dog.",))
    made = ClassPrompts.make(("cat", "dog"), ["{}, a {}", "x{0}{}"])
    assert made.prompts[1] == ("dog, a dog", "x{0}dog")
    assert (made.names, made.average, made.parts) == (("cat", "dog"), "embedding", 1)
    made = ClassPrompts.make({"cat": "my cat", "dog": ["a dog", "hound", ""]})
    assert made.prompts == (("my cat",), ("a dog", "hound", ""))
    assert ClassPrompts.make(["cat"], ["{}", "a {}"], "loss").parts == 2


@pytest.mark.parametrize(
    ("classes", "options", "message"),
    [
        ([], {}, "classes must hold at least one text, got none"),
        ({}, {}, "classes must hold at least one text, got none"),
        ("cat,dog", {}, "classes must be a list of texts, got 'cat,dog'"),
        (3, {}, "classes must be a list of texts, got 3"),
        (["cat", " "], {}, "classes must hold texts that are not empty, got ' '"),
        (["cat", 3], {}, "classes must hold texts that are not empty, got 3"),
        (["cat", None], {}, "classes must hold texts that are not empty, got None"),
        (["cat", ["dog"]], {}, r"classes must hold texts that are not empty, got \['dog'\]"),
        (["cat", "\udcff"], {}, r"classes must hold texts that are not empty, got '\\udcff'"),
        ({"": "a cat"}, {}, "classes must hold texts that are not empty, got ''"),
        ({"cat": "\udcff"}, {}, "the class 'cat' needs a prompt or a list of them, got"),
        (["cat"], {"templates": ["a photo"]}, "a template needs {} where .* got 'a photo'"),
        (["cat"], {"templates": "a {}"}, "templates must be a list of texts, got 'a {}'"),
        (["cat"], {"templates": []}, "templates must hold at least one text"),
        ({"cat": "a"}, {"templates": ["{}"]}, "templates, or classes with their prompts, got both"),
        ({"cat": []}, {}, r"the class 'cat' needs a prompt or a list of them, got \[\]"),
        ({"cat": 3}, {}, "the class 'cat' needs a prompt or a list of them, got 3"),
        (["cat"], {"average": "logits"}, "average of embedding, loss, got 'logits'"),
        ({"a": ["x", "y"], "b": "z"}, {"average": "loss"}, "as many prompts .* got 1 to 2"),
    ],
)
def test_bad_classes(classes, options, message, sd):
    with pytest.raises(ModelError, match=message):
        DiffusionClassifier.from_pretrained(sd, classes=classes, **options)
    if not options:
        model = load_model(sd, classes=["cat"])
        with pytest.raises(ModelError, match=message):
            model.set_classes(classes)
        assert model.vocabulary.names == ("cat",)


def test_classes_are_needed(sd):
    with pytest.raises(ModelError, match=r"needs classes: classes=\['cat', 'dog'\], or --classes"):
        load_model(sd)
    with pytest.raises(ModelError, match="digits has classes of its own: templates is for text"):
        load_model("digits", templates=["{}"])
    assert resolve(sd).needs_classes and not resolve("digits").needs_classes


def test_classes_that_the_directory_states(tmp_path):
    write_sd(tmp_path)
    index = read_json(tmp_path / "model_index.json")
    write_json(tmp_path / "model_index.json", index | {"id2label": {"1": "dog", "0": "cat"}})
    assert not resolve(tmp_path).needs_classes
    assert load_model(tmp_path).vocabulary.names == ("cat", "dog")
    write_json(
        tmp_path / "dive_fast.json",
        {"classes": ["fox", "owl"], "templates": ["{}", "a {}"], "average": "loss", "beta": 7.0},
    )
    model = load_model(tmp_path)
    assert model.classes.prompts == (("fox", "a fox"), ("owl", "a owl"))
    assert (model.vocabulary.parts, model.inverse_temperature) == (2, 7.0)
    # What is asked for goes first, one by one.
    model = load_model(tmp_path, classes=["cat"], average="embedding")
    assert model.classes.prompts == (("cat", "a cat"),) and model.vocabulary.parts == 1
    write_json(tmp_path / "dive_fast.json", {"classes": {"fox": "my fox", "owl": ["a", "b"]}})
    assert load_model(tmp_path).classes.prompts == (("my fox",), ("a", "b"))
    for stated, message in (
        ({"classes": 3}, "classes must be a list of texts, got 3"),
        ({"classes": ["a"], "average": "x"}, "expected an average of"),
        ({"classes": ["a"], "templates": 1}, "templates must be a list"),
        ({"beta": -1}, "beta in .* must be above 0"),
    ):
        write_json(tmp_path / "dive_fast.json", stated)
        with pytest.raises(ModelError, match=message):
            load_model(tmp_path)
    (tmp_path / "dive_fast.json").unlink()
    equal = {"0": "crane", "1": "cat", "2": "crane"}
    write_json(tmp_path / "model_index.json", index | {"id2label": equal})
    model = load_model(tmp_path)
    assert model.vocabulary.names == ("crane (0)", "cat", "crane (2)")
    assert model.classes.prompts[0] == model.classes.prompts[2] == ("a photo of a crane.",)
    write_json(tmp_path / "model_index.json", index | {"id2label": ["a"]})
    with pytest.raises(ModelError, match="id2label must map class ids to names"):
        load_model(tmp_path)


def test_long_prompts_are_cut_with_a_warning(sd, caplog):
    """As diffusers does; the class is named."""
    name = "abcdefghijklmnopqrst"
    model = load_model(sd, classes=["cat", name], templates=["{}"])
    (line,) = caplog.messages
    assert re.search(rf"cut to the 16 tokens .* classes '{name}' \(\d+ tokens\)\.$", line)
    cut = load_model(sd, classes=["cat", name[: LENGTH - 2]], templates=["{}"])
    # The last letter of a word is another token than the same letter within one.
    head = model.vocabulary.table.view(2, LENGTH, 12)[1, : LENGTH - 2]
    torch.testing.assert_close(head, cut.vocabulary.table.view(2, LENGTH, 12)[1, : LENGTH - 2])
    caplog.clear()
    load_model(sd, classes=["cat", "dog"])
    assert not caplog.messages


@pytest.mark.parametrize("classes", [["cat", "Cat"], ["abcdefghijklmnopqrst", "abcdefghijklmnopq"]])
def test_classes_that_the_encoder_cannot_tell_apart(classes, sd):
    with pytest.raises(ModelError, match=f"'{classes[0]}' and '{classes[1]}' have the same"):
        load_model(sd, classes=classes, templates=["a {}"])


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_equal_names_are_told_apart_by_their_rows(kind, request, caplog):
    """ImageNet has "missile" twice: both stay, with the bare name in their prompts."""
    directory = request.getfixturevalue(kind)
    names = ["crane", "cat", "crane", "crane (0)"]
    clf = DiffusionClassifier.from_pretrained(directory, classes=names, templates=["a {}"])
    assert clf.names == ("crane (0) (0)", "cat", "crane (2)", "crane (0)")
    prompts = [prompt for (prompt,) in clf.model.classes.prompts]
    assert prompts == ["a crane", "a cat", "a crane", "a crane (0)"]
    (line,) = caplog.messages
    assert "'crane (0) (0)', 'crane (2)'" in line and "lowest row" in line
    caplog.clear()
    clf.model.set_classes(dict(zip(clf.names, prompts, strict=True)))  # as a file of prompts has it
    assert not caplog.messages
    with pytest.raises(ModelError, match="'cat' and 'dog' have the same prompts"):
        clf.model.set_classes({"cat": "a", "dog": "a"})


@pytest.mark.parametrize("strategy", ["enumerate", "race", "auto", "invert"])
@pytest.mark.parametrize("batch_size", [3, 7])
def test_ties_go_to_the_lowest_row(strategy, batch_size, sd):
    """Rounding, which differs with the place in the batch, does not decide."""
    names = ["cat", "dog", "crane", "fox", "owl", "crane", "cat"]
    clf = DiffusionClassifier.from_pretrained(sd, classes=names, batch_size=batch_size)
    for found in clf(latents=latents(6), strategy=strategy, probes=24):
        assert found.index == names.index(found.label.split()[0])
        assert found.top(1)[0] == {
            "label": found.label, "index": found.index, "score": found.probability
        }  # fmt: skip


def test_many_prompts_are_encoded_as_one_by_one(sd):
    """More than a batch of them."""
    names = [a + b for a in "abcdefg" for b in "abcdef"]
    together = load_model(sd, classes=names).vocabulary.table
    alone = load_model(sd, classes=names[-1:]).vocabulary.table
    torch.testing.assert_close(together[-1:], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_average_of_embeddings(kind, request):
    directory = request.getfixturevalue(kind)
    classes = {"cat": ["a cat", "cat!", "my cat"], "dog": ["a dog"]}
    table = load_model(directory, classes=classes).vocabulary.table
    for row, prompts in zip(table, classes.values(), strict=True):
        each = load_model(directory, classes={p: p for p in prompts}).vocabulary.table
        torch.testing.assert_close(row, each.mean(dim=0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_average_of_losses(kind, request):
    """Exactly the mean over the templates of the loss, whatever the batch."""
    directory = request.getfixturevalue(kind)
    options = {"classes": ["cat", "dog", "fox"]}
    x0 = latents()
    each = [
        DiffusionClassifier.from_pretrained(directory, **options, templates=[template])
        for template in TEMPLATES
    ]
    expected = torch.stack([clf.losses(latents=x0, probes=6) for clf in each]).mean(dim=0)
    for batch_size in (256, 7):
        clf = DiffusionClassifier.from_pretrained(
            directory, **options, templates=TEMPLATES, average="loss", batch_size=batch_size
        )
        vocabulary = clf.model.vocabulary
        assert vocabulary.shape[0] == vocabulary.parts == 3
        found = clf.losses(latents=x0, probes=6)
        # Another batch size alone moves single losses of the small SDXL by 8e-4.
        torch.testing.assert_close(found, expected, rtol=2e-3, atol=1e-6)
        answers = clf(latents=x0, strategy="enumerate", probes=6)
        for answer, losses in zip(answers, expected.mean(dim=2), strict=True):
            torch.testing.assert_close(answer.losses, losses, rtol=2e-3, atol=1e-6)
            assert answer.index == int(losses.argmin())
            assert answer.evaluations == 3 * 3 * 6  # forwards of the network, not rows


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_generated_images_of_a_class_take_its_prompts_in_turn(kind, request):
    directory = request.getfixturevalue(kind)
    prompts = {"cat": ["a cat", "my cat"], "dog": ["a dog", "my dog"]}
    clf = DiffusionClassifier.from_pretrained(directory, classes=prompts, average="loss")
    each = load_model(
        directory, device="cpu", classes=["a cat", "my cat", "my dog"], templates=["{}"]
    )
    settings = {"steps": 2, "guidance": 2.0, "seed": 4}
    found = sample(clf.model, [0, 0, 0], **settings)
    assert torch.equal(found, sample(each, [0, 1, 0], **settings))
    learned = clf.fit_shortlist(generate=4, probes=4)
    assert len(learned.curvature) == 2


@pytest.mark.parametrize("strategy", ["race", "auto", "invert"])
def test_other_strategies_search_over_averaged_losses(strategy, sd):
    clf = DiffusionClassifier.from_pretrained(
        sd, classes=["cat", "dog", "fox", "owl"], templates=TEMPLATES, average="loss"
    )
    full = clf(latents=latents(), strategy="enumerate", probes=24)
    found = clf(latents=latents(), strategy=strategy, probes=24)
    for answer, expected in zip(found, full, strict=True):
        complete = answer.n_probes == 24
        torch.testing.assert_close(answer.losses[complete], expected.losses[complete])
        assert strategy == "invert" or answer.index == expected.index
        assert answer.evaluations % 3 == 0


def test_gradient_of_averaged_losses(sd):
    model = load_model(
        sd, device="cpu", classes=["cat", "dog"], templates=TEMPLATES, average="loss"
    )
    probes = low_discrepancy_probes(4, 1000, model.latent_shape, seed=0)
    start, x0, got = model.vocabulary.mean(), latents(1)[0], []

    def search():
        got.append((yield Gradients(start[None], torch.arange(4))))
        return Answer(0, torch.zeros(2), torch.ones(2))

    jobs = [Job(0, x0, averaged(search(), 3))]
    (done,) = Engine(model, 5).run(jobs, probes, Objective())
    assert done.evaluations == 2 * 3 * 4
    v = start.clone().requires_grad_()
    total = 0
    for k in range(4):
        t = probes.timesteps[k].repeat(3)
        noise = probes.noise[probes.noise_index[k]]
        x_t = model.schedule.a[t[0]] * x0 + model.schedule.s[t[0]] * noise
        prediction = model.predict(x_t.expand(3, -1, -1, -1), t, v.view(3, -1))
        total = total + (prediction - noise).square().mean() / 4
    (expected,) = torch.autograd.grad(total, v)
    assert got[0].losses.shape == (1, 4)
    torch.testing.assert_close(got[0].losses.mean(), total.detach())
    torch.testing.assert_close(got[0].gradients[0], expected, rtol=1e-3, atol=1e-7)


def test_parts_are_requested_by_their_own_ids():
    def search(conditions):
        reply = yield Losses(conditions, torch.arange(4))
        return reply

    relaxed = averaged(search(torch.arange(12.0).view(2, 6)), 3).send(None)
    assert relaxed.conditions.tolist() == torch.arange(12.0).view(6, 2).tolist()
    wrapped = averaged(search(torch.tensor([5, 1])), 3)
    assert wrapped.send(None).conditions.tolist() == [15, 16, 17, 3, 4, 5]
    losses = torch.rand(6, 4)
    with pytest.raises(StopIteration) as stop:
        wrapped.send(losses)
    torch.testing.assert_close(stop.value.value, losses.view(2, 3, 4).mean(dim=1))


def test_shape_of_a_vocabulary():
    table = torch.zeros(2, 12)
    assert Vocabulary(table, "ab").shape == (12,)
    assert Vocabulary(table, "ab", shape=(3, 4), parts=3).shape == (3, 4)
    with pytest.raises(ModelError, match=r"12 values cannot have the shape \[5, 2\]"):
        Vocabulary(table, "ab", shape=(5, 2))
    with pytest.raises(ModelError, match="12 values cannot have 5 equal parts"):
        Vocabulary(table, "ab", parts=5)
