"""Generators compared: the same probes for all, runs that resume, and what cannot be compared."""

from __future__ import annotations

import csv
import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluate_inputs import write_pictures
from networks import PatchTransformer
from tiny import NAMES, read_json, write_model

from dive_fast import DiffusionClassifier, Schedule
from dive_fast.core.probes import low_discrepancy_probes
from dive_fast.data import DataSet, Example, open_dataset
from dive_fast.errors import DiveFastError, ImageError, RunError
from dive_fast.evaluation import compare_generators, read_records
from dive_fast.evaluation.comparison import compare
from dive_fast.evaluation.generator_runs import Settings, tried_classes
from dive_fast.evaluation.table import RunTable

FEW = {"probes": 5, "likelihood_probes": 8, "resamples": 200}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, functools.partial]:
    """Two small DiTs of other weights."""
    folder = tmp_path_factory.mktemp("generators")
    made = {f"dit {i}": write_model(folder / str(i), seed=i) for i in range(2)}
    load = DiffusionClassifier.from_pretrained
    return {name: functools.partial(load, path) for name, path in made.items()}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    return open_dataset(write_pictures(tmp_path_factory.mktemp("pictures")), NAMES)


def network(side: int = 8, classes: int = 4, steps: int = 1000, **changed) -> DiffusionClassifier:
    """A network of 8 x 8 pixels and classes of the small DiT's names."""
    torch.manual_seed(0)
    net = PatchTransformer()
    net.labels = torch.nn.Embedding(classes + 1, net.width)
    return DiffusionClassifier.from_network(
        net,
        **{
            "schedule": Schedule.linear(steps),
            "embeddings": net.labels,
            "shape": (1, side, side),
            "names": NAMES[:classes],
            **changed,
        },
    )


class TestMeasured:
    def test_as_the_classifier_alone(self, models, data: DataSet, tmp_path: Path) -> None:
        compare_generators(models, data, tmp_path / "out", seed=3, **FEW)
        for name, folder in (("dit 0", "dit_0"), ("dit 1", "dit_1")):
            clf = models[name]()
            for example in data.examples:
                record = read_records(tmp_path / "out" / folder)[example.id]
                image = example.load()
                (answer,) = clf(image, strategy="enumerate", probes=5, seed=3, timesteps="uniform")
                assert record["index"] == answer.index and record["truth"] == example.label
                assert record["losses"] == pytest.approx(answer.losses.tolist(), rel=1e-4)
                bound = clf.log_likelihood(image, [example.label], probes=8, seed=3)
                value, error = bound.values.item(), bound.standard_errors.item()
                assert record["log_likelihood"] == pytest.approx(value, rel=1e-4)
                assert record["log_likelihood_error"] == pytest.approx(error, rel=1e-3)
                assert record["evaluations"] == 4 * 5 + 8

    def test_other_numbers_of_timesteps_share_fractions_and_noise(self) -> None:
        one, other = (low_discrepancy_probes(20, t, (1, 2, 2), 7) for t in (1000, 50))
        assert torch.equal(one.noise, other.noise)
        assert (one.timesteps / 1000 - other.timesteps / 50).abs().max() < 1 / 50

    def test_runs_are_read_by_report_and_compare_runs(
        self, models, data: DataSet, tmp_path: Path
    ) -> None:
        found = compare_generators(models, data, tmp_path, **FEW)
        table = RunTable.read(tmp_path / "dit_0")
        assert len(table) == 12 and table.n_classes == 4
        pair = compare(tmp_path / "dit_0", tmp_path / "dit_1")
        row = found.rows[1]
        assert row.figures["accuracy"].value == pair.accuracy.b
        assert row.difference.figures["accuracy"].value == pytest.approx(pair.accuracy.difference)
        assert row.difference.mcnemar == pair.mcnemar
        assert (row.difference.reference_right_alone, row.difference.right_alone) == (
            pair.a_right,
            pair.b_right,
        )
        assert (tmp_path / "dit_0" / "summary.json").exists()

    def test_the_same_model_twice(self, models, data: DataSet, tmp_path: Path) -> None:
        same = {"one": models["dit 0"], "again": models["dit 0"]()}
        found = compare_generators(same, data, tmp_path, **FEW)
        difference = found.rows[1].difference
        assert set(difference.figures) == {"accuracy", "rank", "margin", "nll", "log_likelihood"}
        for estimate in difference.figures.values():
            assert (estimate.value, estimate.low, estimate.high) == (0, 0, 0)
        assert (difference.mcnemar, difference.right_alone) == (1, 0)
        assert found.notes == ()

    def test_files(self, models, data: DataSet, tmp_path: Path) -> None:
        found = compare_generators(
            models, data, tmp_path, steps={"dit 0": 5}, reference="dit 1", **FEW
        )
        assert read_json(tmp_path / "comparison.json")["rows"][0]["step"] == 5
        with open(tmp_path / "comparison.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        assert [row["name"] for row in rows] == ["dit 0", "dit 1"]
        assert float(rows[0]["rank"]) == found.rows[0].figures["rank"].value
        difference = found.rows[0].difference.figures["margin"].low
        assert float(rows[0]["margin_difference_low"]) == difference
        assert rows[1]["mcnemar"] == rows[1]["margin_difference"] == ""

    def test_an_image_that_cannot_be_read(self, models, data: DataSet, tmp_path: Path) -> None:
        def broken() -> np.ndarray:
            raise ImageError("broken.png: cannot be read.")

        examples = [*data.examples, Example("broken", 1, broken)]
        found = compare_generators(models, DataSet("x", examples, None), tmp_path, **FEW)
        assert (found.n, found.lacking) == (12, 1)

    def test_nothing_can_be_read(self, models, tmp_path: Path) -> None:
        def broken() -> np.ndarray:
            raise ImageError("broken.png: cannot be read.")

        examples = [Example("x", 0, broken)]
        with pytest.raises(RunError, match="no image was answered by all generators"):
            compare_generators(models, DataSet("x", examples, None), tmp_path, **FEW)

    def test_no_likelihood(self, models, data: DataSet, tmp_path: Path) -> None:
        found = compare_generators(
            models, data, tmp_path, probes=3, likelihood_probes=None, resamples=100
        )
        assert "log_likelihood" not in found.rows[0].figures
        assert found.rows[0].evaluations == 12


class TestFewClasses:
    def test_the_right_one_and_others_that_depend_on_the_image_alone(self) -> None:
        settings = Settings(5, None, 4, 0)
        seen = set()
        for key in map(str, range(60)):
            rows = tried_classes(7, 20, key, settings).tolist()
            assert len(set(rows)) == 4 and 7 in rows and set(rows) <= set(range(20))
            assert rows == tried_classes(7, 20, key, settings).tolist()
            seen.update(rows)
        assert seen == set(range(20))
        others = tried_classes(7, 20, "0", Settings(5, None, 4, 1)).tolist()
        assert others != tried_classes(7, 20, "0", settings).tolist()

    def test_losses_are_those_of_all_classes(self, models, data: DataSet, tmp_path: Path) -> None:
        compare_generators(models, data, tmp_path / "all", **FEW)
        found = compare_generators(models, data, tmp_path / "few", classes_per_image=2, **FEW)
        assert "1 random others of 4" in found.notes[0]
        whole = read_records(tmp_path / "all" / "dit_0")
        for key, record in read_records(tmp_path / "few" / "dit_0").items():
            known = [row for row, loss in enumerate(record["losses"]) if loss is not None]
            assert len(known) == 2 and record["truth"] in known
            for row in known:
                assert record["losses"][row] == pytest.approx(whole[key]["losses"][row], rel=1e-4)
            assert record["log_likelihood"] == pytest.approx(whole[key]["log_likelihood"], rel=1e-4)
        assert 1 <= found.rows[0].figures["rank"].value <= 2

    def test_as_many_as_there_are(self, models, data: DataSet, tmp_path: Path) -> None:
        found = compare_generators(models, data, tmp_path, classes_per_image=9, **FEW)
        assert found.settings.classes_per_image is None and found.notes == ()


class TestResumed:
    def test_equal_to_an_uninterrupted_one(self, models, data: DataSet, tmp_path: Path) -> None:
        whole = compare_generators(models, data, tmp_path / "whole", **FEW)
        compare_generators(models, data, tmp_path / "killed", **FEW)
        results = tmp_path / "killed" / "dit_1" / "results.jsonl"
        lines = results.read_bytes().splitlines(keepends=True)
        results.write_bytes(b"".join(lines[:5]) + lines[5][:40])  # killed within a line
        (tmp_path / "killed" / "comparison.json").unlink()
        resumed = compare_generators(models, data, tmp_path / "killed", **FEW)
        assert results.read_bytes().splitlines(keepends=True)[:5] == lines[:5]
        for one, other in zip(whole.rows, resumed.rows, strict=True):
            for name, estimate in one.figures.items():
                expected = pytest.approx(
                    (estimate.value, estimate.low, estimate.high), rel=1e-3, abs=1e-4
                )
                found = other.figures[name]
                assert (found.value, found.low, found.high) == expected
        assert (tmp_path / "killed" / "comparison.json").exists()

    def test_nothing_is_measured_again(self, models, data: DataSet, tmp_path: Path) -> None:
        first = compare_generators(models, data, tmp_path, **FEW)
        before = (tmp_path / "dit_0" / "results.jsonl").read_bytes()
        assert compare_generators(models, data, tmp_path, **FEW) == first
        assert (tmp_path / "dit_0" / "results.jsonl").read_bytes() == before

    def test_another_comparison(self, models, data: DataSet, tmp_path: Path) -> None:
        compare_generators(models, data, tmp_path, **FEW)
        with pytest.raises(RunError, match="another configuration: seed is 0 there and 1 here"):
            compare_generators(models, data, tmp_path, seed=1, **FEW)
        with pytest.raises(RunError, match=r"comparison\.classes_per_image is None there"):
            compare_generators(models, data, tmp_path, classes_per_image=2, **FEW)


class TestLikelihoods:
    def test_another_scale_of_x0_is_not_compared(self, data: DataSet, tmp_path: Path) -> None:
        both = {"ours": network(), "theirs": network(pixels="[0, 1]")}
        found = compare_generators(both, data, tmp_path, **FEW)
        assert "log_likelihood" in found.rows[1].figures
        assert "log_likelihood" not in found.rows[1].difference.figures
        assert "margin" in found.rows[1].difference.figures
        assert "theirs and ours see other x0" in found.notes[0]

    def test_a_schedule_without_a_bound(self, data: DataSet, tmp_path: Path) -> None:
        betas = torch.linspace(1e-4, 0.02, 100)
        betas[-1] = 1.0  # zero terminal SNR
        both = {
            "ours": network(),
            "ends without signal": network(schedule=Schedule.from_betas(betas)),
        }
        found = compare_generators(both, data, tmp_path, **FEW)
        assert "log_likelihood" not in found.rows[1].figures
        assert any(
            note.startswith("ends without signal has no likelihood: a ") for note in found.notes
        )

    def test_other_numbers_of_timesteps_are_told(self, data: DataSet, tmp_path: Path) -> None:
        found = compare_generators({"a": network(), "b": network(steps=50)}, data, tmp_path, **FEW)
        assert "b and a have other numbers of timesteps" in found.notes[0]


class TestRefused:
    def expect(self, match: str, generators, data, out, **changed) -> None:
        with pytest.raises(DiveFastError, match=match) as refused:
            compare_generators(generators, data, out, **{**FEW, **changed})
        assert str(refused.value).endswith(".") and "\n" not in str(refused.value)
        assert not out.exists()

    def test_arguments(self, models, data: DataSet, tmp_path: Path) -> None:
        out = tmp_path / "out"
        one = {"dit 0": models["dit 0"]}
        self.expect("at least two generators to compare, got 1", one, data, out)
        self.expect("got none", {}, data, out)
        self.expect("generators by their names", list(models.values()), data, out)
        self.expect("a DiffusionClassifier or what makes one", {**one, "b": "digits"}, data, out)
        self.expect("a reference of dit 0, dit 1, got 'x'", models, data, out, reference="x")
        self.expect("steps of generators, got one of 'x'", models, data, out, steps={"x": 1})
        self.expect("that 4 divides, got 10", models, data, out, likelihood_probes=10)
        self.expect("classes_per_image must be at least 2", models, data, out, classes_per_image=1)
        self.expect("number of probes must be at least 1", models, data, out, probes=0)
        self.expect("resamples must be at least 100", models, data, out, resamples=10)
        self.expect("seed must be at least 0", models, data, out, seed=-1)

    def test_other_classes(self, models, data: DataSet, tmp_path: Path) -> None:
        fewer = {"dit": models["dit 0"], "net": network(classes=3)}
        self.expect("same classes, got 4 in dit and 3 in net", fewer, data, tmp_path / "out")
        named = {"dit": models["dit 0"], "net": network(names=[*NAMES[:3], "ring"])}
        sentence = "got 'cross' as class 3 in dit and 'ring' in net"
        self.expect(sentence, named, data, tmp_path / "out")

    def test_images_of_another_size(
        self, models, data: DataSet, latent_dit_dir: Path, tmp_path: Path
    ) -> None:
        latent = DiffusionClassifier.from_pretrained(latent_dit_dir)
        sentence = r"the same noise suits, got x0 of \[1, 8, 8\] in dit and \[2, 4, 4\] in latent"
        both = {"dit": models["dit 0"], "latent": latent}
        self.expect(sentence, both, data, tmp_path / "out")

    def test_one_class(self, models, data: DataSet, tmp_path: Path) -> None:
        both = {"net": network(classes=1), "dit": models["dit 0"]}
        sentence = "net: expected a model of at least two classes"
        self.expect(sentence, both, data, tmp_path / "out")
