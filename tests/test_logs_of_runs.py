"""What evaluations and trainings log: figures of the records, and the losses of the log."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import log_readers
import numpy as np
import pytest
import torch
from command import assert_refused, call
from cut_off import cut_off
from PIL import Image
from torch import Tensor, nn

from dive_fast import Detections, DiffusionClassifier, DiveFastError
from dive_fast.cli import build_parser
from dive_fast.data import DataSet, Example
from dive_fast.data.coco import CocoDataset, CocoImage
from dive_fast.evaluation import evaluate, evaluate_detections
from dive_fast.training import train_annotated, train_layout_prior, train_scenes, train_zoo_model
from dive_fast.training.loop import train
from dive_fast.training.state import Course, learning_rate_at

N_IMAGES = 27


class Kept:
    """A logger that keeps what it is told."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, dict[str, float]]] = []
        self.summaries: list[dict[str, float] | None] = []

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self.steps.append((step, dict(figures)))

    def finish(self, summary: Mapping[str, float] | None) -> None:
        self.summaries.append(None if summary is None else dict(summary))


def pictures() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (8, 8), dtype=np.uint8) for _ in range(N_IMAGES)]


def noise_set(interrupt_at: int | None = None) -> DataSet:
    """Images of noise; at the one of that number comes Ctrl-C."""

    def loader(i: int, pixels: np.ndarray) -> Callable[[], np.ndarray]:
        def load() -> np.ndarray:
            if i == interrupt_at:
                raise KeyboardInterrupt
            return pixels

        return load

    examples = [Example(f"{i}.png", i % 3, loader(i, p)) for i, p in enumerate(pictures())]
    return DataSet("noise", tuple(examples), tuple("0123456789"))


def expected_figures(out: Path) -> list[tuple[int, dict[str, float]]]:
    """From the lines of the run: the means after each tenth, and at the end."""
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    found = []
    for n in sorted({*range(10, len(lines) + 1, 10), len(lines)}):
        good = [line for line in lines[:n] if "error" not in line]
        figures = {
            "accuracy": np.mean([line["index"] == line["truth"] for line in good]),
            "evaluations_per_image": np.mean([line["evaluations"] for line in good]),
            "seconds_per_image": np.mean([line["seconds"] for line in good]),
            "failed": n - len(good),
        }
        found.append((n, {name: pytest.approx(value) for name, value in figures.items()}))
    return found


@pytest.fixture
def clf(dit_dir: Path) -> DiffusionClassifier:
    return DiffusionClassifier.from_pretrained(dit_dir)


class TestEvaluate:
    def test_as_the_records_say(self, clf: DiffusionClassifier, tmp_path: Path) -> None:
        out, logger = tmp_path / "run", Kept()
        summary = evaluate(clf, noise_set(), out, strategy="enumerate", probes=2, log_to=logger)
        assert logger.steps == expected_figures(out)
        (final,) = logger.summaries
        numbers = (int, float)  # not the tables of groups, and not what no image supports
        stated = {k: v for k, v in summary.to_dict().items() if isinstance(v, numbers)}
        assert final == stated and final["n"] == N_IMAGES

    def test_cut_off_and_resumed(self, clf: DiffusionClassifier, tmp_path: Path) -> None:
        out, first, second, third = tmp_path / "run", Kept(), Kept(), Kept()
        asked = {"strategy": "enumerate", "probes": 2}
        with pytest.raises(KeyboardInterrupt):
            evaluate(clf, noise_set(interrupt_at=24), out, log_to=first, **asked)
        before = len((out / "results.jsonl").read_text().splitlines())
        assert before < N_IMAGES and first.summaries == [None]
        evaluate(clf, noise_set(), out, log_to=second, **asked)
        by_step = dict(second.steps)
        assert min(by_step) > before and max(by_step) == N_IMAGES
        assert by_step[N_IMAGES] == dict(expected_figures(out))[N_IMAGES]
        # Nothing is left to compute: nothing but the summary is logged.
        evaluate(clf, noise_set(), out, log_to=third, **asked)
        assert third.steps == [] and third.summaries[0]["accuracy"] == by_step[27]["accuracy"]

    def test_images_that_fail_are_counted_once(self, clf, tmp_path: Path) -> None:
        data = noise_set()
        (tmp_path / "bad.png").write_bytes(b"no image")
        bad = [Example(f"bad{i}", 0, lambda: tmp_path / "bad.png") for i in range(3)]
        data = dataclasses.replace(data, examples=(*bad, *data.examples))
        out = tmp_path / "run"
        for _ in range(2):
            logger = Kept()
            evaluate(clf, data, out, strategy="enumerate", probes=1, log_to=logger)
            (final,) = logger.summaries
            assert (final["failed"], final["n"]) == (3, N_IMAGES)
            assert all(figures["failed"] == 3 for _, figures in logger.steps)
        assert len((out / "results.jsonl").read_text().splitlines()) == N_IMAGES + 3

    def test_a_logger_decides_nothing(self, clf: DiffusionClassifier, tmp_path: Path) -> None:
        """A run may go on with another logger, or without one."""
        asked = {"strategy": "enumerate", "probes": 2}
        plain = evaluate(clf, noise_set(), tmp_path / "plain", **asked)
        logged = evaluate(clf, noise_set(), tmp_path / "run", log_to=Kept(), **asked)
        again = evaluate(clf, noise_set(), tmp_path / "run", **asked)
        assert plain.accuracy == logged.accuracy == again.accuracy
        assert not list((tmp_path / "plain").glob(".log*"))

    def test_refused_before_the_run_is_made(self, clf, tmp_path: Path, monkeypatch) -> None:
        with pytest.raises(DiveFastError, match="^expected to log to tensorboard or .*'mlflow'"):
            evaluate(clf, noise_set(), tmp_path / "run", log_to="mlflow")
        monkeypatch.setitem(sys.modules, "trackio", None)
        with pytest.raises(DiveFastError, match=r"pip install 'dive_fast\[trackio\]'"):
            evaluate(clf, noise_set(), tmp_path / "run", log_to="trackio")
        assert not (tmp_path / "run").exists()


class BlindDetector:
    """Finds one box in every image, at the wrong place."""

    names = ("dark",)

    def stream(self, images: Iterable[tuple[str, Image.Image]]) -> Iterator[tuple[str, Detections]]:
        for key, _ in images:
            yield key, Detections([[0, 0, 2, 2]], [0], [0.5], self.names, None, 7, 0.25)


def test_detections(tmp_path: Path) -> None:
    pytest.importorskip("pycocotools", reason="the COCO numbers come with the extra detect")
    images = []
    for i in range(11):
        Image.new("L", (20, 20)).save(tmp_path / f"{i}.png")
        boxes, ids = torch.tensor([[10.0, 10, 20, 20]]), torch.tensor([0])
        path = tmp_path / f"{i}.png"
        images.append(CocoImage(i, path, (20, 20), boxes, ids, torch.tensor([False])))
    data, logger = CocoDataset(("dark",), (1,), tuple(images), "boxes.json"), Kept()
    evaluate_detections(BlindDetector(), data, tmp_path / "run", config={"model": 1}, log_to=logger)
    figures = {
        "evaluations_per_image": 7, "seconds_per_image": 0.25, "objects_per_image": 1, "failed": 0
    }  # fmt: skip
    assert logger.steps == [(10, figures), (11, figures)]
    (summary,) = logger.summaries
    assert summary["AP"] == 0 and summary["n"] == 11
    assert "AP_per_class" not in summary and "AP_large" not in summary  # a table, and None


class TestCommandLine:
    def test_evaluate(self, dit_dir: Path, tmp_path: Path, capsys) -> None:
        pytest.importorskip("tensorboard", reason="needs the extra tensorboard")
        for i, pixels in enumerate(pictures()[:12]):
            folder = tmp_path / "pictures" / ("cat", "dog")[i % 2]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / f"{i}.png")
        model = DiffusionClassifier.from_pretrained(dit_dir)
        for name, folder in zip(model.names, ("cat", "dog"), strict=False):
            (tmp_path / "pictures" / folder).rename(tmp_path / "pictures" / name)
        out = tmp_path / "run"
        said = call(
            capsys, "evaluate", "--model", dit_dir, "--data", tmp_path / "pictures", "--out", out,
            "--probes", 2, "--strategy", "enumerate", "--log-to", "tensorboard", "--json",
        )  # fmt: skip
        assert (said.code, said.err) == (0, "")
        summary = json.loads(said.out)
        found = log_readers.tensorboard(out / "tensorboard")
        assert [step for step, _ in found["accuracy"]] == [10, 12]
        assert found["accuracy"][-1][1] == pytest.approx(summary["accuracy"])
        assert found["summary/n"] == [(12, 12)]
        stored = json.loads((out / "run.json").read_text())["config"]
        assert log_readers.tensorboard_config(out / "tensorboard").items() <= stored.items()

    @pytest.mark.parametrize(
        "command",
        [
            ["evaluate", "--data", "digits", "--out", "x"],
            ["train", "digits", "--out", "x"],
            ["train-layout", "--annotations", "x", "--images", "x", "--out", "x"],
            ["train-prior", "--annotations", "x", "--model", "x", "--out", "x"],
        ],
        ids=lambda command: command[0],
    )
    def test_commands_that_log(self, command: list[str], capsys, monkeypatch) -> None:
        pytest.importorskip("wandb", reason="needs the extra wandb")
        options = build_parser().parse_args([*command, "--log-to", "wandb:PROJECT"])
        assert options.log_to == "wandb:PROJECT"
        assert build_parser().parse_args(command).log_to is None
        said = call(capsys, *command, "--log-to", "csv")
        assert_refused(said, r"--log-to: expected to log to tensorboard or .*, got 'csv' \(see")
        monkeypatch.setitem(sys.modules, "wandb", None)
        said = call(capsys, *command, "--log-to", "wandb")
        assert_refused(said, r"wandb, which is not installed: pip install 'dive_fast\[wandb\]'")


# -- trainings -------------------------------------------------------------------------------------

COURSE = Course(steps=9, batch_size=4, learning_rate=0.05, warmup_steps=2)


def run_training(out: Path, at: Callable[[int], object] = lambda step: None, **options) -> None:
    out.mkdir(exist_ok=True)
    torch.manual_seed(0)
    net = nn.Linear(3, 1)

    def loss_of(step: int, generator: torch.Generator) -> Tensor:
        at(step)
        return net(torch.randn(4, 3, generator=generator)).square().mean()

    cadence = {"log_every": 2, "state_every": 2, "progress": False}
    train(net, loss_of, COURSE, out, held_out=lambda: {"other": 0.5}, **cadence, **options)


def training_lines(out: Path) -> dict[int, dict[str, float]]:
    lines = [json.loads(line) for line in (out / "training.jsonl").read_text().splitlines()]
    return {line.pop("step"): line for line in lines}


class TestTraining:
    def test_as_the_log_says(self, tmp_path: Path) -> None:
        logger = Kept()
        run_training(tmp_path / "out", log_to=logger)
        lines = training_lines(tmp_path / "out")
        assert [step for step, _ in logger.steps] == list(lines) == [2, 4, 6, 8, 9]
        for step, figures in logger.steps:
            assert figures.pop("learning_rate") == learning_rate_at(step - 1, COURSE)
            assert figures == pytest.approx(lines[step], abs=1e-5)
        (summary,) = logger.summaries
        assert summary.pop("seconds") > 0
        assert summary == pytest.approx(lines[9], abs=1e-5)

    def test_cut_off_and_resumed(self, tmp_path: Path) -> None:
        pytest.importorskip("tensorboard", reason="needs the extra tensorboard")
        run_training(tmp_path / "uncut", log_to="tensorboard")
        cut = tmp_path / "cut"
        with cut_off() as interrupt:
            run_training(cut, lambda step: step == 4 and interrupt(), log_to="tensorboard")
        run_training(cut, log_to="tensorboard")
        whole = log_readers.tensorboard(tmp_path / "uncut" / "tensorboard")
        found = log_readers.tensorboard(cut / "tensorboard")
        assert whole.pop("summary/seconds") and found.pop("summary/seconds")
        assert found == whole
        assert [step for step, _ in found["learning_rate"]] == [2, 4, 6, 8, 9]

    def test_refused_before_anything_is_read(self, tmp_path: Path) -> None:
        out, bad = tmp_path / "out", {"log_to": "csv"}
        trainings = (
            lambda: train_zoo_model("mnist", out, data=tmp_path / "none.npz", **bad),
            lambda: train_scenes(out, **bad),
            lambda: train_annotated(tmp_path / "none", tmp_path, out, max_objects=1, **bad),
            lambda: train_layout_prior(tmp_path / "none", tmp_path / "none", out, **bad),
        )
        for training in trainings:
            with pytest.raises(DiveFastError, match="^expected to log to"):
                training()
        assert not out.exists()
