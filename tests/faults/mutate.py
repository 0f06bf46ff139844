"""Ways to damage a file."""

from __future__ import annotations

import copy
import io
import json
import math
import random
import zipfile
from argparse import Namespace
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch

Mutation = Callable[[bytes, random.Random], bytes]

# Written into JSON as they stand: some are numbers that no Python object prints as.
_RAW = (
    "1e400",
    "-1e400",
    "1" + "0" * 300,
    "-" + "9" * 310,
    "NaN",
    "Infinity",
    "1e-400",
    "01",
    "'x'",
)
_VALUES = (
    0, 1, -1, 2, 7, 77, 0.5, -0.5, 1e-12, 1e12, 10**6, 2**31, 2**53, 2**63, 2**64, True, False,
    None, "", " ", "77", "1.0", "true", "é", "e\u0301", "\x00", "\ud800", "x" * 5000,
    "../../etc/passwd", [], {}, [[]], [1], [1, 2, 3, 4], ["a"], [None], {"a": 1}, {"id": 1},
    [0.1] * 1000,
)  # fmt: skip


def damage_bytes(content: bytes, rng: random.Random) -> bytes:
    """A few bytes lost, turned, doubled or put in."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(data) + 1)
        length = rng.choice((1, 1, 2, 4, 16, 256, len(data)))
        kind = rng.choice(("cut", "flip", "noise", "zero", "drop", "double", "head"))
        end = min(at + length, len(data))
        if kind == "cut":
            del data[at:]
        elif kind == "flip" and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == "noise":
            data[at:end] = rng.randbytes(end - at)
        elif kind == "zero":
            data[at:end] = bytes(end - at)
        elif kind == "drop":
            del data[at:end]
        elif kind == "double":
            data[at:at] = data[at:end]
        else:  # headers are where most can go wrong
            spot = rng.randrange(min(len(data), 64) + 1)
            data[spot : spot + 2] = rng.randbytes(2)
    return bytes(data)


def damage_json(content: bytes, rng: random.Random) -> bytes:
    """Another value, a key too few or too many, somewhere; at times bytes."""
    if rng.random() < 0.15:
        return damage_bytes(content, rng)
    tree = json.loads(content)
    raw: list[str] = []
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        tree = _change_somewhere(tree, rng, raw)
    text = json.dumps(tree, ensure_ascii=rng.random() < 0.8)
    for number, value in enumerate(raw):
        text = text.replace(f'"raw {number}"', value)
    start = b"\xef\xbb\xbf" if rng.random() < 0.05 else b""
    return start + text.encode(errors="surrogatepass")


def damage_json_lines(content: bytes, rng: random.Random) -> bytes:
    """One record damaged; lines lost, doubled or joined."""
    lines = content.splitlines(keepends=True)
    at = rng.randrange(len(lines))
    kind = rng.choice(("json", "json", "json", "bytes", "drop", "double", "join"))
    if kind == "json":
        lines[at] = damage_json(lines[at], rng) + b"\n"
    elif kind == "bytes":
        return damage_bytes(content, rng)
    elif kind == "drop":
        del lines[at]
    elif kind == "double":
        lines.insert(rng.randrange(len(lines) + 1), lines[at])
    else:
        lines[at] = lines[at].rstrip(b"\n")
    return b"".join(lines)


def damage_safetensors(content: bytes, rng: random.Random) -> bytes:
    """The header's JSON, its length, or the numbers behind it."""
    if rng.random() < 0.3:
        return damage_bytes(content, rng)
    length = int.from_bytes(content[:8], "little")
    header, body = content[8 : 8 + length], content[8 + length :]
    if rng.random() < 0.7:
        header = damage_json(header, rng)
    else:
        values = np.frombuffer(body[: len(body) // 4 * 4], dtype="<f4").copy()
        spot = rng.randrange(len(values))
        values[spot] = rng.choice((np.nan, np.inf, -np.inf, 1e38, 0.0))
        body = values.tobytes()
    size = len(header) if rng.random() < 0.8 else rng.choice((0, 2**31, 2**63 - 1, length + 8))
    return size.to_bytes(8, "little") + header + body


def damage_npz(content: bytes, rng: random.Random) -> bytes:
    """Another dtype, shape or value of an array, an array lost, or bytes."""
    if rng.random() < 0.4:
        return damage_bytes(content, rng)
    with np.load(io.BytesIO(content)) as archive:
        arrays: dict[str, Any] = {name: archive[name] for name in archive.files}
    name = rng.choice(sorted(arrays))
    array = arrays[name]
    kind = rng.choice(("drop", "dtype", "shape", "value", "empty", "text", "other", "header"))
    if kind == "drop":
        del arrays[name]
    elif kind == "dtype":
        arrays[name] = array.astype(
            rng.choice(("f4", "f8", "i8", "u2", "?", "U8", "c16", "M8[s]", "S3"))
        )
    elif kind == "shape":
        arrays[name] = rng.choice(
            (array.ravel(), array[None], array[..., None], array[0], array[1:])
        )
    elif kind == "value":
        wide = array.astype(rng.choice(("f8", "i8")))
        wide.flat[rng.randrange(wide.size)] = rng.choice((-1, 300, 2**40))
        arrays[name] = wide
    elif kind == "empty":
        arrays[name] = array[:0]
    elif kind == "text":
        arrays[name] = np.array(rng.choice(("x", b"x", 3, np.nan)))
    elif kind == "other":
        arrays[name.upper()] = arrays.pop(name)
    file = io.BytesIO()
    np.savez(file, **arrays)
    return _damage_headers(file.getvalue(), rng) if kind == "header" else file.getvalue()


def damage_state(content: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """A checkpoint's weights lost, renamed, of another shape or kind; other things beside them."""
    state = content["state_dict"]
    for _ in range(rng.choice((1, 1, 2, 4))):
        name = rng.choice(sorted(state))
        weight = state.pop(name)
        kind = rng.choice(("drop", "rename", "shape", "dtype", "value", "object", "beside"))
        if kind == "rename":
            state[f"{name}_"] = weight
        elif kind == "shape":
            state[name] = rng.choice(
                (weight[None], weight.flatten(), weight[:0], weight[:1].mean())
            )
        elif kind == "dtype":
            state[name] = weight.to(rng.choice((torch.int64, torch.bool, torch.complex64)))
        elif kind == "value":
            state[name] = weight * rng.choice((math.nan, math.inf, 1e38))
        elif kind == "object":
            state[name] = rng.choice((None, 3, "text", [weight], {"a": weight}))
        elif kind == "beside":
            state[name] = weight
            beside = rng.choice((Path("a"), Namespace(lr=1), Fraction(1, 2), np.float64(3)))
            content[rng.choice(("hyper_parameters", "callbacks", "optimizer_states"))] = beside
    if rng.random() < 0.1:
        return rng.choice((state, {"state_dict": None}, {"model": state}, [state], {}))
    return content


def damage_text(content: bytes, rng: random.Random) -> bytes:
    """Lines in another order or form, another encoding, or bytes."""
    kind = rng.choice(
        ("bytes", "lines", "bom", "utf-16", "latin", "crlf", "separator", "quote", "nul")
    )
    text = content.decode()
    if kind == "lines":
        lines = text.splitlines()
        rng.shuffle(lines)
        return "\n".join(lines[: rng.randrange(len(lines) + 1)] * rng.choice((1, 2))).encode()
    if kind == "bytes":
        return damage_bytes(content, rng)
    if kind == "separator":
        return text.replace(",", rng.choice((";", "\t", " ", ",,"))).encode()
    if kind == "quote":
        spot = rng.randrange(len(text) + 1)
        return (
            text[:spot] + rng.choice(("'", '"', "[", "{", ":", "- ", "&a ", "*a")) + text[spot:]
        ).encode()
    return {
        "bom": b"\xef\xbb\xbf" + content,
        "utf-16": text.encode("utf-16"),
        "latin": ("é" + text).encode("latin-1"),
        "crlf": text.replace("\n", "\r\n").encode(),
        "nul": b"\x00" + content,
    }[kind]


def _damage_headers(content: bytes, rng: random.Random) -> bytes:
    """Of the arrays within an archive whose own sums are right."""
    found = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as there, zipfile.ZipFile(found, "w") as here:
        for name in there.namelist():
            data = there.read(name)
            here.writestr(name, damage_bytes(data[:128], rng) + data[128:])
    return found.getvalue()


def _change_somewhere(tree: Any, rng: random.Random, raw: list[str]) -> Any:
    """One change at a random place, which may be the root."""
    places = list(_places(tree))
    if not places or rng.random() < 0.02:
        return _new_value(tree, rng, raw)
    parent, key = rng.choice(places)
    kind = rng.choice(("value", "value", "value", "value", "drop", "add", "rename", "wrap", "swap"))
    if kind == "value":
        parent[key] = _new_value(parent[key], rng, raw)
    elif kind == "drop":
        del parent[key]
    elif kind == "wrap":
        parent[key] = [parent[key]]
    elif kind == "swap":
        other, there = rng.choice(places)
        parent[key] = copy.deepcopy(other[there])
    elif isinstance(parent, dict):
        new = f"{key}_" if kind == "rename" else rng.choice(("extra", "", "type", "num_layers"))
        parent[new] = parent.pop(key) if kind == "rename" else _new_value(None, rng, raw)
    else:
        parent.insert(key, _new_value(None, rng, raw))
    return tree


def _places(tree: Any, depth: int = 50):
    """(container, key) of everything in it. Long lists are like all over: their start is enough."""
    if not isinstance(tree, dict | list) or depth == 0:
        return
    for key in list(tree) if isinstance(tree, dict) else range(min(len(tree), 20)):
        yield tree, key
        yield from _places(tree[key], depth - 1)


def _new_value(old: Any, rng: random.Random, raw: list[str]) -> Any:
    kind = rng.random()
    if kind < 0.2:
        raw.append(rng.choice(_RAW))
        return f"raw {len(raw) - 1}"
    if kind < 0.4 and isinstance(old, int | float) and not isinstance(old, bool):
        return rng.choice(
            (-old, old + 1, old - 1, old * 1000, old * 10**6, str(old), float(old), [old])
        )
    if kind < 0.43:
        deep: Any = 1
        for _ in range(rng.choice((50, 200))):
            deep = [deep]
        return deep
    return json.loads(json.dumps(rng.choice(_VALUES)))
