"""Runs on a real Ray cluster of this machine: the same records, whoever dies."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from command import assert_refused, call
from networks import CLASSES, PatchTransformer
from ray_images import Rows, die, die_once, digits, fail, unreadable

from dive_fast import DiffusionClassifier, DiveFastError
from dive_fast.core.schedule import Schedule
from dive_fast.data import DataSet
from dive_fast.data.streams import StreamedExamples
from dive_fast.evaluation import RayOptions, evaluate, read_records
from dive_fast.evaluation.on_ray.handout import Handout

pytest.importorskip("ray", reason="needs the extra ray")
psutil = pytest.importorskip("psutil", reason="looks for processes that stay behind")

pytestmark = pytest.mark.xdist_group("ray")
ASKED = {"strategy": "enumerate", "probes": 4}


@pytest.fixture(scope="module")
def cluster():
    """Two cores, whatever the machine has, and little memory."""
    import ray

    tests = Path(__file__).parent
    search = os.pathsep.join([str(tests.parent), str(tests), os.environ.get("PYTHONPATH", "")])
    patch = pytest.MonkeyPatch()
    patch.setenv("PYTHONPATH", search)  # the workers read the images of ray_images
    patch.setenv("RAY_worker_niceness", "0")  # they are waited for, also on a busy machine
    patch.delenv("RAY_ADDRESS", raising=False)
    ray.init(
        address="local",
        num_cpus=2,
        object_store_memory=100 << 20,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    patch.undo()
    yield ray
    ray.shutdown()


@pytest.fixture(scope="module")
def clf() -> DiffusionClassifier:
    return DiffusionClassifier.from_pretrained("digits", device="cpu", batch_size=40)


def answers(out: Path) -> dict[str, tuple]:
    return {key: (r["index"], tuple(r["losses"])) for key, r in read_records(out).items()}


def name(process: psutil.Process) -> str:
    """Of a process that may have ended meanwhile."""
    try:
        return process.name()
    except psutil.Error:
        return ""


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def plain(clf, tmp_path_factory) -> dict[str, tuple]:
    """What a run without Ray finds for the first 60 digits."""
    out = tmp_path_factory.mktemp("plain") / "run"
    evaluate(clf, digits(60), out, **ASKED)
    return answers(out)


def test_the_same_records_as_without(cluster, clf, plain, tmp_path) -> None:
    """Also after three kinds of trouble, each of which costs its own image at most."""
    odd = {7: partial(die_once, tmp_path / "mark"), 20: unreadable, 33: die}
    load = partial(DiffusionClassifier.from_pretrained, "digits", device="cpu", batch_size=40)
    ray = RayOptions(piece=3, load=load)  # as many workers as there is room for
    summary = evaluate(clf, digits(60, odd), tmp_path / "run", **ASKED, ray=ray)
    assert (summary.n, summary.failed) == (58, 2)
    assert 0.5 < summary.fill_rate <= 1
    found = lines(tmp_path / "run")
    assert sorted(r["id"] for r in found) == sorted(plain)
    errors = {r["id"]: r for r in found if "error" in r}
    assert errors["020"]["error"] == "the image: truncated or damaged."
    assert errors["033"]["error"] == "3 workers died with this image in flight"
    right = digits(60).examples
    assert {key: errors[key]["truth"] for key in errors} == {
        key: right[int(key)].label for key in ("020", "033")
    }
    good = {r["id"]: (r["index"], tuple(r["losses"])) for r in found if "error" not in r}
    assert good == {key: plain[key] for key in plain if key not in errors}
    # Run again, the images that failed are tried again, and nothing else.
    again = evaluate(clf, digits(60), tmp_path / "run", **ASKED, ray=RayOptions(workers=1))
    assert (again.n, again.failed) == (60, 0)
    assert answers(tmp_path / "run") == plain
    # There is nothing to do, and nobody is asked.
    nobody = RayOptions("127.0.0.1:1", workers=1)
    assert evaluate(clf, digits(60), tmp_path / "run", **ASKED, ray=nobody).n == 60


def test_a_network_of_ones_own_is_sent(cluster, tmp_path) -> None:
    torch.manual_seed(0)
    network = PatchTransformer()
    clf = DiffusionClassifier.from_network(
        network,
        schedule=Schedule.linear(),
        embeddings=network.labels,
        names=[str(label) for label in range(CLASSES)],
        shape=(1, 8, 8),
    )
    few = digits(40)
    few = few.take([i for i, example in enumerate(few.examples) if example.label < CLASSES])
    evaluate(clf, few, tmp_path / "plain", **ASKED)
    evaluate(clf, few, tmp_path / "ray", **ASKED, ray=RayOptions(workers=1))
    assert answers(tmp_path / "ray") == answers(tmp_path / "plain")


def test_a_stream(cluster, clf, plain, tmp_path) -> None:
    """Each worker goes through it by itself, also back to what another one left."""
    data = DataSet("stream", StreamedExamples(Rows(12, tmp_path / "mark"), range(12)), None, "rows")
    summary = evaluate(clf, data, tmp_path / "run", **ASKED, ray=RayOptions(workers=1, piece=2))
    assert (summary.n, summary.failed) == (12, 0)
    assert {int(key): value for key, value in answers(tmp_path / "run").items()} == {
        i: plain[f"{i:03}"] for i in range(12)
    }


def test_what_a_worker_meets_reaches_the_caller(cluster, clf, tmp_path) -> None:
    def evaluated(n: int, odd: dict, **options) -> None:
        evaluate(clf, digits(n, odd), tmp_path / "run", **ASKED, ray=RayOptions(**options))

    with pytest.raises(ZeroDivisionError, match="a bug in the reader"):
        evaluated(4, {2: fail}, workers=1)
    other = partial(DiffusionClassifier.from_pretrained, "digits", dtype="bfloat16")
    with pytest.raises(DiveFastError, match="theirs differs in model.dtype"):
        evaluated(4, {}, workers=1, load=other)
    with pytest.raises(DiveFastError, match="3 workers died while they loaded the model"):
        evaluated(4, {}, workers=1, load=die)
    with pytest.raises(DiveFastError, match="room for 3 workers of 1 CPUs .* the cluster has 2"):
        evaluated(4, {}, workers=3)
    with pytest.raises(DiveFastError, match="room for 1 workers of 1 CPUs and 0.5 GPUs"):
        evaluated(4, {}, workers=1, gpus_per_worker=0.5)
    with pytest.raises(DiveFastError, match="cannot be sent to the workers"):
        evaluated(4, {2: threading.Lock()}, workers=1)
    with pytest.raises(DiveFastError, match="connected to a Ray cluster already"):
        evaluated(4, {}, workers=1, address="127.0.0.1:6379")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 0}, "workers must be at least 1, got 0"),
        ({"workers": "two"}, "workers must be a whole number of at least 1, got 'two'"),
        ({"gpus_per_worker": -1}, "from 0 to 1, or a whole one, got -1"),
        ({"gpus_per_worker": 1.5}, "from 0 to 1, or a whole one, got 1.5"),
        ({"cpus_per_worker": 0}, "cpus_per_worker must be at least 1"),
        ({"piece": 0}, "piece must be at least 1"),
        ({"address": ""}, "expected a Ray address or None, got ''"),
        ({"load": "digits"}, "load must be callable without arguments, got 'digits'"),
    ],
)
def test_options_that_are_none(options: dict, message: str) -> None:
    with pytest.raises(DiveFastError, match=re.escape(message)):
        RayOptions(**options)


def test_options_of_another_type(clf, tmp_path) -> None:
    with pytest.raises(DiveFastError, match="ray must be RayOptions or None, got 4"):
        evaluate(clf, digits(2), tmp_path / "run", **ASKED, ray=4)


class TestHandout:
    def test_small_pieces_at_the_end(self) -> None:
        handout = Handout(range(40), piece=8, workers=2)
        pieces = []
        while piece := handout.take(idle=False):
            pieces.append(piece)
        assert [i for piece in pieces for i in piece] == list(range(40))
        assert [len(piece) for piece in pieces[:3]] == [8, 8, 6]
        assert len(pieces[-1]) == 1 and not handout

    def test_an_image_that_kills_is_found_among_others(self) -> None:
        """Of those that die with it, none is given up but the one that is there the third time."""
        handout = Handout([5, 6, 7], piece=4, workers=1)
        given = [handout.take(idle=False)[0] for _ in range(3)]
        assert handout.lost(given) == []
        again = [handout.take(idle=False)[0] for _ in range(3)]
        assert again == [5, 6, 7] and handout.lost(again) == []
        assert handout.take(idle=False) == []  # it has others
        assert handout.take(idle=True) == [5] and handout.must_be_alone(5)
        assert handout.take(idle=True) == [6]
        assert handout.lost([6]) == [6]
        assert handout.take(idle=True) == [7] and not handout


class TestCommand:
    COMMAND = ("evaluate", "--data", "digits", "--strategy", "enumerate", "--probes", 4)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--ray", "nonsense"], "no Ray cluster at 'nonsense' .expected HOST:PORT"),
            (["--ray", "127.0.0.1:1"], "no Ray cluster at '127.0.0.1:1' .Connection refused"),
            (["--ray", "ray://host:1"], "'ray job submit' brings the command there"),
            (["--ray", "--workers", "0"], "whole number of at least 1, got '0'"),
            (["--workers", "2"], "--workers needs --ray"),
            (["--gpus-per-worker", "1"], "--gpus-per-worker needs --ray"),
            (["--ray", "--gpus-per-worker", "1.5"], "from 0 to 1, or a whole one"),
        ],
    )
    def test_refused(self, capsys, tmp_path, monkeypatch, options: list, message: str) -> None:
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        said = call(capsys, *self.COMMAND, *options, "--out", tmp_path / "run")
        assert_refused(said, message)
        assert not (tmp_path / "run").exists()

    def test_something_else_listens_there(self, capsys, tmp_path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as other:

            def answer() -> None:
                peer, _ = other.accept()
                peer.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                peer.close()

            threading.Thread(target=answer, daemon=True).start()
            address = f"127.0.0.1:{other.getsockname()[1]}"
            said = call(capsys, *self.COMMAND, "--ray", address, "--out", tmp_path / "run")
        assert_refused(said, "what listens there is not Ray")

    def test_killed_and_gone_on_with(self, cluster, clf, tmp_path, capsys) -> None:
        """Kill -9 of the driver: its cluster goes with it, its records stay."""
        out = tmp_path / "run"
        command = [*map(str, self.COMMAND), "--batch-size", "40", "--out", str(out)]
        driver = subprocess.Popen(
            [sys.executable, "-m", "dive_fast", *command, "--ray", "--workers", "1"],
            cwd=Path(__file__).parents[1],
            env={k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        end = time.monotonic() + 300
        results = out / "results.jsonl"
        while not (results.exists() and results.read_bytes().count(b"\n") >= 20):
            assert driver.poll() is None and time.monotonic() < end, driver.communicate()
            time.sleep(0.01)
        family = psutil.Process(driver.pid).children(recursive=True)
        assert any("raylet" in name(process) for process in family)
        driver.send_signal(signal.SIGKILL)
        driver.communicate()
        own = [process for process in family if not name(process).endswith("Agent")]
        _, alive = psutil.wait_procs(own, timeout=30)
        assert alive == []  # but two agents of Ray's, which need a minute to notice
        there = {r["id"]: r for r in map(json.loads, results.read_bytes().split(b"\n")[:-1])}
        assert 20 <= len(there) < 397
        # The module's cluster is the one that this process is connected to.
        said = call(capsys, *command, "--ray", "--workers", "1", "--json")
        assert said.code == 0, said.err
        assert json.loads(said.out)["n"] == 397
        found = lines(out)
        assert len(found) == len({r["id"] for r in found}) == 397
        assert {r["id"]: r for r in found}.items() >= there.items()


def test_ray_data(cluster, clf, tmp_path) -> None:
    """A pipeline of arrays, and of image files among which one is damaged."""
    from PIL import Image

    from dive_fast import RayClassifier

    data = digits(12)
    images = np.stack([example.load() for example in data.examples])
    expected = clf(list(images), seed=3)
    ds = cluster.data.from_items([{"image": image, "n": n} for n, image in enumerate(images)])
    options = {"model": "digits", "seed": 3, "device": "cpu"}
    rows = ds.map_batches(
        RayClassifier, fn_constructor_kwargs=options, concurrency=1, batch_size=5
    ).take_all()
    rows.sort(key=lambda row: row["n"])
    assert [row["label"] for row in rows] == [answer.label for answer in expected]
    assert [row["index"] for row in rows] == [answer.index for answer in expected]
    assert [row["evaluations"] for row in rows] == [answer.evaluations for answer in expected]
    np.testing.assert_allclose(
        [row["probability"] for row in rows], [a.probability for a in expected], atol=1e-5
    )
    assert {row["error"] for row in rows} == {""}
    for n in range(3):
        Image.fromarray(images[n]).save(tmp_path / f"{n}.png")
    (tmp_path / "1.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    ds = cluster.data.read_binary_files(str(tmp_path), include_paths=True)
    options["column"] = "bytes"
    rows = ds.map_batches(
        RayClassifier, fn_constructor_kwargs=options, concurrency=1, batch_size=5
    ).take_all()
    by_name = {Path(row["path"]).name: row for row in rows}
    assert by_name["0.png"]["label"] == expected[0].label
    assert by_name["2.png"]["label"] == expected[2].label
    bad = by_name["1.png"]
    assert bad["label"] == "" and bad["index"] == -1 and np.isnan(bad["probability"])
    assert bad["evaluations"] == 0 and "image" in bad["error"]
