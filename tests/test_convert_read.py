"""Weights out of checkpoints that also hold objects of any class: nothing is made or called."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import datetime
import enum
import functools
import logging
import os
import pathlib
import pickle
import struct
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from command import call
from ldm_reference import SMALL, make_state

from dive_fast import ModelError
from dive_fast.models.layout_to_image.convert_read import read_checkpoint

WEIGHTS = {"a.weight": torch.arange(6.0).view(2, 3), "b.bias": torch.tensor([1, 2])}


def assert_weights(path: Path) -> None:
    state = read_checkpoint(path)
    assert state.keys() == WEIGHTS.keys()
    for key, weight in WEIGHTS.items():
        assert torch.equal(state[key], weight) and state[key].dtype == weight.dtype


class AttributeDict(dict):
    """As lightning_fabric has it: a dict with attributes."""

    def __getattr__(self, key: str) -> object:
        return self[key]


class Items(list):
    """A list with attributes, and one that is made by a call."""

    def __reduce__(self) -> tuple:
        return (Items, (), {"parent": None}, iter([1, {"x": 2}]))


class Mapped(dict):
    def __reduce__(self) -> tuple:
        return (Mapped, (), None, None, iter([("x", Items())]))


class Slots:
    __slots__ = ("x",)

    def __init__(self) -> None:
        self.x = 3


class Outer:
    class Inner:
        def method(self) -> None: ...


class Made:
    """What ``__new__`` needs arguments for, by name too."""

    def __new__(cls, a: int, *, b: int) -> Made:
        return super().__new__(cls)

    def __getnewargs_ex__(self) -> tuple:
        return (1,), {"b": 2}


class Phase(enum.Enum):
    TRAIN = "train"


@dataclasses.dataclass
class Settings:
    rate: float = 1e-4
    phase: Phase = Phase.TRAIN


Pair = collections.namedtuple("Pair", "a b")  # noqa: PYI024 - as old code has it
OWN = (AttributeDict, Items, Mapped, Slots, Outer, Outer.Inner, Made, Phase, Settings, Pair)


def a_function() -> None: ...


@pytest.fixture
def foreign(monkeypatch: pytest.MonkeyPatch):
    """The classes above under names of modules that are not there when the file is read."""
    name = "lightning_fabric.utilities.data"
    with monkeypatch.context() as patch:
        for part in ("lightning_fabric", "lightning_fabric.utilities", name):
            patch.setitem(sys.modules, part, types.ModuleType(part))
        for kind in (*OWN, a_function):
            patch.setattr(kind, "__module__", name)
            setattr(sys.modules[name], kind.__name__, kind)
        yield patch


def hyper_parameters() -> dict:
    network = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return {
        "attributes": AttributeDict(lr=1e-4, nested=AttributeDict(depth=[1, 2])),
        "items": [Items(), Mapped(), Slots(), Made(1, b=2), Pair(1, 2), Settings()],
        "inner": [Outer.Inner(), Outer.Inner, Outer.Inner().method, a_function],
        "namespace": argparse.Namespace(batch=3, path=pathlib.PurePosixPath("/data")),
        "numpy": [np.float64(0.5), np.int32(7), np.arange(3), np.dtype("f4"), np.bool_(True)],
        "partial": functools.partial(torch.optim.Adam, lr=1e-3),
        "python": [{1, 2}, frozenset("ab"), 1j, slice(1), range(3), bytearray(b"x"), b"y", max],
        "collections": [collections.defaultdict(list, a=[1]), collections.Counter("aab")],
        "dates": [datetime.datetime(2024, 1, 1), datetime.timedelta(1)],
        "torch": [torch.device("cpu"), torch.Size([2]), torch.float16, torch.nn.ReLU()],
        "sparse": torch.eye(3).to_sparse(),
        "optimizer_states": [optimizer.state_dict()],
        "generator": torch.get_rng_state(),
        "callbacks": {Settings: {"best": 1}},
        AttributeDict: 5,
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_objects_of_any_class_are_skipped(tmp_path, foreign, caplog, protocol: int) -> None:
    path = tmp_path / "model.ckpt"
    content = {"hyper_parameters": hyper_parameters(), "state_dict": WEIGHTS, "epoch": 3}
    torch.save(content, path, pickle_protocol=protocol)
    foreign.undo()
    assert "lightning_fabric" not in sys.modules
    with caplog.at_level(logging.WARNING):
        assert_weights(path)
    (record,) = caplog.records
    text = record.getMessage()
    assert "holds hyper-parameters (lightning_fabric.utilities.data.AttributeDict, " in text
    assert text.endswith("more), which are skipped") and "lightning_fabric" not in sys.modules


def test_one_at_a_time_too(tmp_path, foreign, caplog) -> None:
    """What fails in a crowd might hide behind what fails first."""
    for key, value in hyper_parameters().items():
        caplog.clear()
        torch.save({"hyper_parameters": value, "state_dict": WEIGHTS}, tmp_path / "model.ckpt")
        assert_weights(tmp_path / "model.ckpt")
        assert len(caplog.records) <= 1, key


def test_convert_says_what_it_skips(tmp_path, foreign, capsys, caplog) -> None:
    content = {"state_dict": make_state(SMALL), "hyper_parameters": AttributeDict(lr=1e-4)}
    torch.save(content, tmp_path / "model.ckpt")
    foreign.undo()
    said = call(
        capsys, "convert", tmp_path / "model.ckpt", "--out", tmp_path / "out", "--latent-size", 8
    )
    assert said.code == 0, said.err
    expected = "(lightning_fabric.utilities.data.AttributeDict), which are skipped"
    assert expected in said.err + caplog.text
    assert (tmp_path / "out" / "model_index.json").exists()


def test_a_plain_checkpoint_is_read_without_a_word(tmp_path, caplog) -> None:
    module = torch.nn.Linear(3, 2)
    module.register_buffer("small", torch.ones(3).half())
    shared = torch.arange(12.0)
    content = {
        **module.state_dict(keep_vars=True),  # parameters
        "bf16": torch.ones(2, dtype=torch.bfloat16),
        "bool": torch.tensor([True, False]),
        "row": shared.view(3, 4)[1],
        "column": shared.view(3, 4).t(),
        "none": torch.empty(0, 3),
        "scalar": torch.tensor(4.0),
        "float8": torch.ones(2).to(torch.float8_e4m3fn),
    }
    torch.save(content, tmp_path / "model.pt")
    state = read_checkpoint(tmp_path / "model.pt")
    assert not caplog.records and state.keys() == content.keys()
    for key, value in content.items():
        assert torch.equal(state[key].float(), value.detach().float()), key
        assert state[key].dtype == value.dtype


def test_the_old_format_is_read_as_far_as_it_is_safe(tmp_path) -> None:
    old = {"_use_new_zipfile_serialization": False}
    torch.save({"state_dict": WEIGHTS}, tmp_path / "old.ckpt", **old)
    assert_weights(tmp_path / "old.ckpt")
    torch.save({"state_dict": WEIGHTS, "x": Slots()}, tmp_path / "objects.ckpt", **old)
    with pytest.raises(ModelError, match=r"holds the object .*Slots, and only weights are read"):
        read_checkpoint(tmp_path / "objects.ckpt")


class Call:
    """Pickled as a call."""

    def __init__(self, function, *arguments: object) -> None:
        self.reduced = (function, arguments)

    def __reduce__(self) -> tuple:
        return self.reduced


class State(Call):
    def __setstate__(self, state: object) -> None: ...

    def __reduce__(self) -> tuple:
        return (*self.reduced, {"x": 1})


@pytest.mark.parametrize("where", ["beside", "inside", "key"])
@pytest.mark.parametrize("protocol", [2, 4])
def test_nothing_runs(tmp_path, where: str, protocol: int) -> None:
    target = tmp_path / "made"
    source = f"import os; os.mkdir({str(target)!r})"
    attacks = [
        Call(os.mkdir, str(target)),
        Call(os.system, f"mkdir {target}"),
        Call(exec, source),
        Call(eval, f"__import__('os').mkdir({str(target)!r})"),
        Call(functools.partial(os.mkdir, str(target))),
        Call(Call(getattr, os, "mkdir"), str(target)),
        Call(Path(target).mkdir),
        Call(map, os.mkdir, [str(target)]),
        Call(list, Call(map, os.mkdir, [str(target)])),
        Call(torch.load, str(target)),
        Call(torch.save, {}, str(target)),
        Call(os.makedirs, str(target)),
        State(torch._utils._rebuild_tensor_v2, 1, 2, 3, 4),
        Call(torch._utils._rebuild_parameter, Call(os.mkdir, str(target))),
    ]
    for attack in attacks:
        content = {
            "beside": {"state_dict": WEIGHTS, "x": attack},
            "inside": {"state_dict": {**WEIGHTS, "x": attack}},
            "key": {attack: 1, "state_dict": WEIGHTS},
        }[where]
        path = tmp_path / "model.ckpt"
        try:
            torch.save(content, path, pickle_protocol=protocol)
        except (AttributeError, TypeError, pickle.PicklingError):
            continue  # not to be pickled like that
        try:
            state = read_checkpoint(path)
        except ModelError as error:
            assert "only weights are read" in str(error) or "cannot be read" in str(error)  # noqa: PT017
        else:
            assert state.keys() == WEIGHTS.keys()
        assert not target.exists(), attack.reduced


def rewritten(source: Path, target: Path, change) -> Path:
    """The file with other records: ``change(name, content)`` is the new content."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return target


def pickled(*parts: bytes) -> bytes:
    return b"\x80\x02" + b"".join(parts) + b"."


def storage(numel: bytes, key: bytes = b"0", kind: bytes = b"FloatStorage") -> bytes:
    """A storage, as torch's pickles name it."""
    text = lambda t: b"X" + struct.pack("<I", len(t)) + t  # noqa: E731
    return (
        b"(" + text(b"storage") + b"ctorch\n" + kind + b"\n" + text(key) + text(b"cpu") + numel
        + b"tQ"
    )  # fmt: skip


def tensor(numel: bytes, size: bytes, stride: bytes, offset: bytes = b"K\0", **named) -> bytes:
    return (
        b"}X\x01\0\0\0wctorch._utils\n_rebuild_tensor_v2\n("
        + storage(numel, **named) + offset + b"(" + size + b"t(" + stride + b"t\x89}tRs"
    )  # fmt: skip


def whole(n: int) -> bytes:
    return pickle.dumps(n, 2)[2:-1]


BOMBS = {
    "storage": tensor(whole(2**50), whole(2**50), b"K\1"),
    "beyond": tensor(whole(2), whole(3), b"K\1"),
    "expanded": tensor(whole(2), whole(2**40), b"K\0"),
    "offset": tensor(whole(2), whole(2), b"K\1", offset=whole(2**40)),
    "stride": tensor(whole(2), whole(2), whole(2**60)),
    "negative": tensor(whole(2), whole(2), whole(-1)),
    "negative size": tensor(whole(2), whole(-2), whole(1)),
    "negative numel": tensor(whole(-2), whole(2), whole(1)),
    "ranks": tensor(whole(2), whole(1) * 2, whole(1)),
    "text": tensor(b"X\x01\0\0\0x", whole(1), whole(1)),
    "no record": tensor(whole(2), whole(2), whole(1), key=b"../../7"),
    "memo": b"}r\xff\xff\xff\xff",
    "bytes": b"\x8e" + struct.pack("<Q", 2**60),
    "bytearray": b"\x96" + struct.pack("<Q", 2**40),
    "frame": b"\x95" + struct.pack("<Q", 2**62),
    "text8": b"\x8d" + struct.pack("<Q", 2**60),
    "long": b"\x8b" + struct.pack("<i", 2**30),
    "extension": b"\x82\x01",
    "empty": b"",
    "list": b"]",
}


@pytest.mark.parametrize("name", BOMBS)
def test_sizes_that_cannot_be_true(tmp_path, name: str) -> None:
    torch.save({"w": torch.zeros(2)}, tmp_path / "good.pt")
    bad = pickled(BOMBS[name])
    path = rewritten(
        tmp_path / "good.pt", tmp_path / "bad.pt",
        lambda record, content: bad if record.endswith("data.pkl") else content,
    )  # fmt: skip
    with pytest.raises(ModelError, match=r"cannot be read as a checkpoint|expected a state dict"):
        read_checkpoint(path)


def test_a_tensor_of_the_same_making_is_read(tmp_path) -> None:
    """The bombs above are refused for their sizes, not for how they are written."""
    torch.save({"w": torch.tensor([3.0, 4.0])}, tmp_path / "good.pt")
    again = pickled(tensor(whole(2), whole(2), whole(1)))
    path = rewritten(
        tmp_path / "good.pt", tmp_path / "same.pt",
        lambda record, content: again if record.endswith("data.pkl") else content,
    )  # fmt: skip
    assert torch.equal(read_checkpoint(path)["w"], torch.tensor([3.0, 4.0]))


def test_names_of_classes_are_shown_on_one_line(tmp_path, caplog) -> None:
    torch.save({"w": torch.tensor([3.0, 4.0])}, tmp_path / "good.pt")
    text = lambda t: b"X" + struct.pack("<I", len(t)) + t  # noqa: E731
    made = b"0".join([text(b"a\nb\x1b[2J") + text(b"C" * 500) + b"\x93", b""])
    named = pickled(made, tensor(whole(2), whole(2), whole(1)))
    path = rewritten(
        tmp_path / "good.pt", tmp_path / "named.pt",
        lambda record, content: named if record.endswith("data.pkl") else content,
    )  # fmt: skip
    assert torch.equal(read_checkpoint(path)["w"], torch.tensor([3.0, 4.0]))
    (record,) = caplog.records
    text = record.getMessage()
    assert r"(a\nb\x1b[2J.CCC" in text and "\n" not in text and "\x1b" not in text
    assert len(text) < len(str(path)) + 200


def test_records_that_are_packed_swapped_or_missing(tmp_path) -> None:
    torch.save({"w": torch.zeros(2000)}, tmp_path / "good.pt")
    with (
        zipfile.ZipFile(tmp_path / "good.pt") as old,
        zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(ModelError, match="record .* states .* bytes, which are not in the file"):
        read_checkpoint(tmp_path / "packed.pt")
    other = "big" if sys.byteorder == "little" else "little"
    path = rewritten(
        tmp_path / "good.pt", tmp_path / "swapped.pt",
        lambda record, content: other.encode() if record.endswith("byteorder") else content,
    )  # fmt: skip
    with pytest.raises(ModelError, match=f"its numbers are {other}-endian"):
        read_checkpoint(path)
    with zipfile.ZipFile(tmp_path / "other.ckpt", "w") as archive:
        archive.writestr("notes.txt", "hello")
    with pytest.raises(ModelError, match=r"has no data.pkl, which torch.save writes"):
        read_checkpoint(tmp_path / "other.ckpt")


def test_a_state_dict_of_a_class_of_its_own_is_named(tmp_path) -> None:
    torch.save({"state_dict": AttributeDict(WEIGHTS)}, tmp_path / "model.ckpt")
    with pytest.raises(ModelError, match=r"a state dict in .*, got test_.*AttributeDict"):
        read_checkpoint(tmp_path / "model.ckpt")
