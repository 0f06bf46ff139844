"""Images read ahead by other processes: the same, in the same order, and nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from reads import Entry, Number, Picture, alive, damaged, gone, impossible, odd, unreadable

from dive_fast import DiffusionClassifier
from dive_fast.data import open_dataset, reading
from dive_fast.data.digits import load_digits
from dive_fast.data.images import from_bytes
from dive_fast.data.reading import (
    Pixels,
    _dumps,
    _no_interrupt,
    as_readers,
    how_many,
    images_ahead,
    load,
    read_ahead,
)
from dive_fast.errors import DataError, DiveFastError, ImageError, RunError
from dive_fast.evaluation import evaluate, read_records

linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


@pytest.mark.parametrize("readers", [0, 2])
def test_everything_comes_in_order(readers: int) -> None:
    # The first takes longest: others are ready before it.
    reads = [Number(i, 0.2 if i == 0 else 0.0) for i in range(9)]
    items = [(f"key {i}", read) for i, read in enumerate(reads)]
    items.insert(4, ("bad", unreadable))
    found = list(read_ahead(items, readers))
    assert [key for key, _ in found] == [key for key, _ in items]
    (_, error) = found.pop(4)
    assert isinstance(error, ImageError)
    assert str(error) == "x.png: expected an image, got none."
    assert [value.item() for _, (value, _) in found] == list(range(9))
    pids = {pid for _, (_, pid) in found}
    assert (pids == {os.getpid()}) == (readers == 0)
    assert len(pids) <= max(1, readers)


def test_few_are_read_ahead_of_time() -> None:
    taken = []

    def items():
        for i in range(20):
            taken.append(i)
            yield i, Number(i)

    for readers, ahead in ((0, 3), (1, 3)):
        taken.clear()
        with closing(read_ahead(items(), readers, ahead=ahead)) as images:
            for key, _ in images:
                assert len(taken) <= key + 1 + (ahead if readers else 0)
                if key == 5:
                    break


def test_as_many_ahead_as_there_is_room_for() -> None:
    # Grey 28 x 28, RGB of 512 and of 1024 and of 4096 pixels a side.
    sizes = (28 * 28, 3 * 512**2, 3 * 1024**2, 3 * 4096**2)
    assert [images_ahead(n) for n in sizes] == [32, 32, 10, 2]


@linux
def test_readers_end_with_the_run() -> None:
    images = read_ahead([(i, Number(i)) for i in range(50)], 2)
    pids = {pid for _, (_, pid) in (next(images) for _ in range(4))}
    assert all(alive(pid) for pid in pids)
    images.close()
    assert gone(pids)


@linux
def test_a_killed_reader_is_told() -> None:
    with closing(read_ahead([(i, Number(i)) for i in range(50)], 1)) as images:
        _, (_, pid) = next(images)
        os.kill(pid, signal.SIGKILL)
        start = time.monotonic()
        with pytest.raises(RunError, match=r"read images ahead was killed.* --readers 0\.$"):
            for _ in images:
                pass
        assert time.monotonic() - start < 60


@linux
def test_readers_are_told_to_end_without_a_lock(monkeypatch) -> None:
    """One that is killed cannot hold it then."""
    started = []
    start = reading._start
    monkeypatch.setattr(
        reading, "_start", lambda *given: started.append(start(*given)) or started[0]
    )
    images = read_ahead([(i, Number(i)) for i in range(50)], 2)
    pids = {pid for _, (_, pid) in (next(images) for _ in range(4))}
    flag = started[0]._workers_done_event
    assert isinstance(flag, reading._Flag) and not flag.is_set()
    started.clear()
    images.close()
    assert flag.is_set() and gone(pids, within=4.0)  # of themselves: torch ends others after 5 s


@pytest.mark.parametrize("readers", [0, 1])
def test_errors_that_are_not_one_image(readers: int) -> None:
    with pytest.raises(DataError, match=r"^the data set is damaged\.$"):
        list(read_ahead([(0, damaged)], readers))
    with pytest.raises(KeyError, match="a mistake"):
        list(read_ahead([(0, impossible)], readers))


def test_warnings_come_here() -> None:
    with pytest.warns(UserWarning, match="^an odd image$"):
        assert list(read_ahead([("x", odd)], 1)) == [("x", 7)]


def test_images_come_whole() -> None:
    """In shared memory, and are those that were read."""
    for mode in ("L", "RGB", "RGBA"):
        ((_, image),) = read_ahead([(0, Picture(mode))], 1)
        assert image.mode == mode
        assert image.tobytes() == Picture(mode)().tobytes()


def test_what_many_share_is_sent_once() -> None:
    numbers = list(range(100_000))
    assert len(_dumps(Entry(numbers, 4), (numbers,))) < 200
    items = [(i, Entry(numbers, i)) for i in (99_999, 3)]
    assert [value for _, value in read_ahead(items, 1, shared=(numbers,))] == [99_999, 3]


def test_what_does_not_pickle() -> None:
    for items, shared in ([[(0, lambda: 1)], ()], [[(0, Number(0))], (lambda: 1,)]):
        with pytest.raises(DiveFastError, match=r"^readers need data that pickle, got .*readers=0"):
            list(read_ahead(items, 1, shared=shared))


@pytest.mark.parametrize(
    ("share", "rest", "free", "readers"),
    [
        (0.5, 100.0, 8.0, 4),
        (0.5, 100.0, 3.1, 2),
        (0.5, 100.0, 2.0, 1),
        (0.5, 100.0, 1.2, 0),  # it is the network's
        (0.5, 100.0, 0.0, 0),
        (0.5, 100.0, None, 0),
        (0.1, 100.0, 8.0, 0),  # the network hardly waits
        (0.5, 10.0, 8.0, 0),  # over before they have started
    ],
)
def test_how_many_pay(share: float, rest: float, free: float | None, readers: int) -> None:
    assert how_many(share, rest, free) == readers


def test_few_images_are_read_here() -> None:
    found = read_ahead([(i, Number(i)) for i in range(20)], None, total=20)
    assert {pid for _, (_, pid) in found} == {os.getpid()}
    assert len(list(read_ahead([(0, Number(0))], None))) == 1


def test_readers_start_where_reading_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dive_fast.data.reading.FIRST_SECONDS", 0.05)
    monkeypatch.setattr("dive_fast.data.reading.free_cores", lambda: 2.0)
    items = [(i, Number(i, 0.01)) for i in range(14)]
    found = list(read_ahead(items, None, total=100_000))
    assert [value.item() for _, (value, _) in found] == list(range(14))
    pids = [pid for _, (_, pid) in found]
    assert pids[0] == os.getpid() != pids[-1]


@pytest.mark.parametrize("bad", [-1, 1.5, "two", True])
def test_no_number_of_readers(bad: object) -> None:
    with pytest.raises(DiveFastError, match="readers"):
        as_readers(bad)


def test_no_readers_beside_the_workers_of_ray() -> None:
    assert [as_readers(n, on_ray=True) for n in (0, None, "auto")] == [0, None, None]
    with pytest.raises(DiveFastError, match=r"^the workers of Ray read .* no readers, got 2\.$"):
        as_readers(2, on_ray=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 digits by class as PNG files, and one that is none."""
    folder = tmp_path_factory.mktemp("digits")
    images, labels = load_digits("train")
    for i, (image, label) in enumerate(zip(images[:24], labels[:24], strict=True)):
        (folder / str(label)).mkdir(exist_ok=True)
        Image.fromarray(np.asarray(image)).save(folder / str(label) / f"{i}.png")
    (folder / "3" / "z.png").write_bytes(b"nothing")
    return folder


def test_pixels_are_those_of_the_classifier(folder: Path) -> None:
    classifier = DiffusionClassifier.from_pretrained("digits")
    data = open_dataset(folder, classifier.names)
    channels, size, _ = classifier.model.image_shape
    pixels = from_bytes(Pixels(partial(load, data.examples, 5), size, channels)())
    expected = classifier.encode(data.examples[5].load())[0]
    assert torch.equal(classifier.encode_pixels(pixels[None])[0], expected)


def test_the_same_answers_with_readers(folder: Path, tmp_path: Path) -> None:
    classifier = DiffusionClassifier.from_pretrained("digits")
    data = open_dataset(folder, classifier.names)
    asked = {"strategy": "enumerate", "probes": 4}
    runs = []
    for readers in (0, 2):
        summary = evaluate(classifier, data, tmp_path / str(readers), readers=readers, **asked)
        assert (summary.n, summary.failed) == (24, 1)
        runs.append(read_records(tmp_path / str(readers)))
    one, two = runs
    assert one.keys() == two.keys()
    for key in one:
        assert one[key].get("index") == two[key].get("index")
        assert one[key].get("error") == two[key].get("error")
        if "error" not in one[key]:
            assert one[key]["probability"] == pytest.approx(two[key]["probability"], rel=1e-3)


@linux
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_readers_end_with_their_command(folder: Path, tmp_path: Path, how: signal.Signals) -> None:
    """Ctrl-C goes to the whole group of processes, a kill to one; nobody is left."""
    out = tmp_path / "run"
    command = [sys.executable, "-m", "dive_fast", "evaluate", "--data", str(folder)]
    command += ["--out", str(out), "--readers", "2", "--strategy", "enumerate", "--probes", "300"]
    with open(tmp_path / "told", "w") as told:
        process = subprocess.Popen(command, stderr=told, start_new_session=True)
    results = out / "results.jsonl"
    end = time.monotonic() + 120
    while not (results.exists() and results.stat().st_size) and time.monotonic() < end:
        time.sleep(0.05)
    group = {pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if alive(pid)}
    group = {pid for pid in group if _session(pid) == process.pid}
    (os.killpg if how == signal.SIGINT else os.kill)(process.pid, how)
    assert process.wait(timeout=60) == (130 if how == signal.SIGINT else -how)
    assert len(group) >= 3
    assert gone(group)
    if how == signal.SIGINT:  # after a kill Python's own tracker of resources may say something
        told = (tmp_path / "told").read_text().splitlines()
        interrupted = f"dive-fast: interrupted; run again to go on from {out}."
        assert [line for line in told if "z.png" not in line] == [interrupted]


def _session(pid: int) -> int:
    try:
        return os.getsid(pid)
    except OSError:
        return -1


def test_an_interrupt_waits_until_readers_have_started() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), _no_interrupt():
        signal.raise_signal(signal.SIGINT)
        done.append(True)
    assert done
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
