"""One set of weights in a folder: which is taken, and what is refused because nobody can tell."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command import assert_refused, call
from PIL import Image
from safetensors.torch import load_file, save_file
from weight_files import STEM, copied, shard, to_variant, write_header

from dive_fast import DiffusionClassifier, LayoutDetector, ModelError
from dive_fast.models import load_model, resolve

INDEX = f"{STEM}.safetensors.index.json"
CLASSES = ["cat", "dog"]


def equal(a, b) -> bool:
    """Whether two models have the same weights."""
    return a.identity() == b.identity()


def change_index(folder: Path, change: Callable[[dict], object]) -> None:
    content = json.loads((folder / INDEX).read_text())
    change(content["weight_map"])
    (folder / INDEX).write_text(json.dumps(content))


# -- what is read ----------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3])
def test_shards_are_read(n, dit_dir, tmp_path):
    directory = copied(dit_dir, tmp_path / "model")
    shard(directory / "transformer", n)
    assert equal(load_model(directory), load_model(dit_dir))


def test_shards_of_text_encoder_and_pickles_are_read(sd, tmp_path):
    directory = copied(sd, tmp_path / "model")
    shard(directory / "text_encoder", stem="model")
    shard(directory / "unet", suffix="bin")
    with pytest.raises(ModelError, match="unet holds pickled weights only .*-00001-of-00002.bin"):
        load_model(directory, classes=CLASSES)
    read = load_model(directory, classes=CLASSES, allow_pickle=True)
    assert equal(read, load_model(sd, classes=CLASSES))


def test_safetensors_come_before_pickles_and_full_precision_before_variants(dit_dir, tmp_path):
    directory = copied(dit_dir, tmp_path / "model")
    folder = directory / "transformer"
    to_variant(folder, keep=True)
    shard(folder, suffix="bin", keep=True)
    assert equal(load_model(directory), load_model(dit_dir))


@pytest.mark.parametrize(("sharded", "legacy"), [(False, False), (True, False), (True, True)])
def test_the_only_variant_is_read_as_float32(sharded, legacy, dit_dir, tmp_path):
    directory = copied(dit_dir, tmp_path / "model")
    folder = directory / "transformer"
    if sharded:
        save_file(
            {k: v.half() for k, v in load_file(folder / f"{STEM}.safetensors").items()},
            folder / f"{STEM}.safetensors",
        )
        shard(folder, variant="fp16", legacy=legacy)
    else:
        to_variant(folder)
    expected = {k: v.half().float() for k, v in weights_of(dit_dir).items()}
    for asked in (None, "fp16"):
        model = load_model(directory, variant=asked)
        assert {p.dtype for p in model.network.parameters()} == {torch.float32}
        found = model.network.state_dict()
        name = "pos_embed.proj.weight"
        assert torch.equal(found[name], expected[name])


def weights_of(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "transformer" / f"{STEM}.safetensors")


def test_a_variant_that_is_asked_for_is_taken_where_it_is(sd, tmp_path):
    """Parts without it are read in full precision, and parts with nothing else as it."""
    directory = copied(sd, tmp_path / "model")
    changed = to_variant(directory / "unet", keep=True)
    weights = load_file(changed)
    save_file(weights | {"conv_in.bias": weights["conv_in.bias"] + 1}, changed)
    to_variant(directory / "text_encoder", stem="model")
    plain = load_model(directory, classes=CLASSES)
    asked = DiffusionClassifier.from_pretrained(directory, classes=CLASSES, variant="fp16").model
    difference = asked.unet.conv_in.bias - plain.unet.conv_in.bias
    torch.testing.assert_close(difference, torch.ones_like(difference), atol=1e-3, rtol=0)


def test_a_detector_of_a_variant(layout_dir, tmp_path):
    directory = copied(layout_dir, tmp_path / "model")
    for folder in ("unet", "layout_encoder"):
        to_variant(directory / folder)
    for options in ({}, {"variant": "fp16"}):
        assert LayoutDetector.from_pretrained(directory, **options).names == ("one", "two", "three")


def test_variant_on_the_command_line(dit_dir, tmp_path, capsys):
    directory = copied(dit_dir, tmp_path / "model")
    to_variant(directory / "transformer")
    Image.new("L", (8, 8)).save(tmp_path / "image.png")
    arguments = ("classify", tmp_path / "image.png", "--probes", 2, "--model", directory)
    assert call(capsys, *arguments, "--variant", "fp16").code == 0
    assert call(capsys, *arguments).code == 0
    said = call(capsys, *arguments, "--variant", "bf16")
    assert_refused(said, "expected weights of the variant 'bf16' in .*, got 'fp16' only")
    said = call(capsys, *arguments, "--variant", "../fp16")
    assert_refused(said, "expected the name of a variant such as 'fp16', got '../fp16'")


# -- what is refused -------------------------------------------------------------------------------


def test_variants_that_are_not_there(dit_dir, tmp_path):
    with pytest.raises(ModelError, match="the variant 'fp16' in .*, got full precision only"):
        load_model(dit_dir, variant="fp16")
    with pytest.raises(ModelError, match="the variant 'fp16' in .*digits, got full precision only"):
        load_model("digits", variant="fp16")
    for name in (7, "", "a b", ["fp16"]):
        with pytest.raises(ModelError, match="expected the name of a variant such as 'fp16', got"):
            resolve(dit_dir, variant=name)
    directory = copied(dit_dir, tmp_path / "model")
    to_variant(directory / "transformer", "non_ema", keep=True)
    to_variant(directory / "transformer", "fp16")
    message = r"of full precision in .*, got the variants 'fp16', 'non_ema' only \(variant='fp16'"
    with pytest.raises(ModelError, match=message):
        load_model(directory)
    assert load_model(directory, variant="non_ema").latent_shape == (1, 8, 8)


def beside_shards(folder: Path) -> None:
    """A new single file beside old shards: diffusers takes the old ones."""
    shard(folder, keep=True)


def beside_index(folder: Path) -> None:
    for path in shard(folder, keep=True):
        path.unlink()


def other_count(folder: Path) -> None:
    shard(folder, 3, keep=True)
    shard(folder, 2)


def two_names(folder: Path) -> None:
    shard(folder, variant="fp16", keep=True)
    shard(folder, variant="fp16", legacy=True)


def beside_variant_shards(folder: Path) -> None:
    shard(folder, variant="fp16", keep=True)
    to_variant(folder)


def one_missing(folder: Path) -> None:
    shard(folder, 3)[1].unlink()


def all_missing(folder: Path) -> None:
    for path in shard(folder):
        path.unlink()


def no_index(folder: Path) -> None:
    shard(folder)
    (folder / INDEX).unlink()


def too_many(folder: Path) -> None:
    first = shard(folder)[0]
    save_file({"x": torch.zeros(1)}, folder / first.name.replace("00001-of", "00003-of"))


def indexed(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        shard(folder)
        change_index(folder, change)

    return apply


def index_of(content: object) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        shard(folder)
        (folder / INDEX).write_text(json.dumps(content))

    return apply


FIRST, SECOND = (f"{STEM}-0000{i}-of-00002.safetensors" for i in (1, 2))
SETS: dict[str, tuple[Callable[[Path], None], str]] = {
    "a single file beside shards": (
        beside_shards,
        f"transformer holds two sets of weights, {STEM}.safetensors and {FIRST}",
    ),
    "a single file beside an index": (
        beside_index,
        f"two sets of weights, {STEM}.safetensors and {INDEX}",
    ),
    "two counts": (
        other_count,
        f"two sets of weights, {STEM}-00001-of-00002.safetensors and {STEM}-00001-of-00003",
    ),
    "two names": (two_names, "two sets of weights, .*-00002.fp16.safetensors and .*fp16-00001-of"),
    "a variant twice": (beside_variant_shards, f"two sets of weights, {STEM}.fp16.safetensors and"),
    "a shard missing": (one_missing, "expected 3 shards of .*, but number 2 is missing"),
    "all shards missing": (
        all_missing,
        f"expected the shards that {INDEX} in .* names, found none",
    ),
    "no index": (no_index, "expected an index .* beside the shards"),
    "a shard too many": (too_many, f"expected 2 shards .*, got {STEM}-00003-of-00002.safetensors"),
    "another file in the index": (
        indexed(lambda m: m.update({min(m): "../other.safetensors"})),
        f"{INDEX} names the file '../other.safetensors', expected {FIRST} and {SECOND}",
    ),
    "one file in the index": (
        indexed(lambda m: m.update(dict.fromkeys(m, FIRST))),
        f"{INDEX} does not name the file {SECOND}",
    ),
    "swapped in the index": (
        indexed(lambda m: m.update({min(m): SECOND})),
        f"{INDEX} says that .* is in {SECOND}, where it is not",
    ),
    "absent from the index": (
        indexed(lambda m: m.pop(min(m))),
        f"{INDEX} does not say that .* is in {FIRST}",
    ),
    "absent from the shards": (
        indexed(lambda m: m.update(extra=FIRST)),
        f"{INDEX} says that extra is in {FIRST}, where it is not",
    ),
    "an index without a map": (index_of({}), f"weight_map in .*{INDEX} must map weights to"),
    "a map of numbers": (index_of({"weight_map": {"a": 7}}), "weight_map in .* must map weights"),
    "an index of nothing": (index_of([]), f"{INDEX} must hold a JSON object, got list"),
}


@pytest.mark.parametrize(("change", "message"), SETS.values(), ids=SETS)
def test_sets_that_are_not_one(change, message, dit_dir, tmp_path):
    directory = copied(dit_dir, tmp_path / "model")
    change(directory / "transformer")
    with pytest.raises(ModelError, match=message):
        load_model(directory)


def test_two_sets_of_a_text_encoder(sd, tmp_path):
    directory = copied(sd, tmp_path / "model")
    shard(directory / "text_encoder", stem="model", keep=True)
    message = "text_encoder holds two sets of weights, model.safetensors and model-00001-of-00002"
    with pytest.raises(ModelError, match=message):
        load_model(directory, classes=CLASSES)


def test_two_sets_of_pickles(dit_dir, tmp_path):
    directory = copied(dit_dir, tmp_path / "model")
    folder = directory / "transformer"
    torch.save(weights_of(directory), folder / f"{STEM}.bin")
    shard(folder, suffix="bin")
    message = f"two sets of weights, {STEM}.bin and {STEM}-00001-of-00002.bin"
    with pytest.raises(ModelError, match=message):
        load_model(directory, allow_pickle=True)


# -- what a header may say -------------------------------------------------------------------------


def entry(start: int, stop: int, shape: list[int], dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


HEADERS: dict[str, tuple[object, str]] = {
    "no JSON": (b"{" * 100, "is truncated or damaged"),
    "a list": (b"[1]", "is truncated or damaged"),
    "overlapping": ({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, "is truncated or damaged"),
    "beyond the file": ({"a": entry(0, 4000, [1000])}, "is truncated or damaged"),
    "of another size": ({"a": entry(0, 12, [2])}, "is truncated or damaged"),
    "a negative shape": ({"a": entry(0, 12, [-3])}, "is truncated or damaged"),
    "an unknown type": ({"a": entry(0, 12, [3], "X9")}, "is truncated or damaged"),
    "twice": (
        b'{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,12]},'
        b'"a":{"dtype":"F32","shape":[3],"data_offsets":[0,12]}}',
        "is truncated or damaged: a name stands there twice",
    ),
}


@pytest.mark.parametrize(("header", "message"), HEADERS.values(), ids=HEADERS)
def test_damaged_headers(header, message, dit_dir, tmp_path):
    directory = copied(dit_dir, tmp_path / "model")
    write_header(directory / "transformer" / f"{STEM}.safetensors", header, bytes(12))
    with pytest.raises(ModelError, match=message):
        load_model(directory)


def test_a_header_longer_than_its_file(dit_dir, tmp_path):
    directory = copied(dit_dir, tmp_path / "model")
    path = directory / "transformer" / f"{STEM}.safetensors"
    for length in (2**63, 1000):
        write_header(path, {}, length=length)
        message = (
            f"truncated or damaged: its header should have {length} bytes, but the file has 10"
        )
        with pytest.raises(ModelError, match=message):
            load_model(directory)


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (torch.int32, "I32"),
        (torch.int8, "I8"),
        (torch.float8_e4m3fn, "F8_E4M3"),
        (torch.complex64, "C64"),
        (torch.bool, "BOOL"),
    ],
)
def test_weights_that_are_no_floats(dtype, name, dit_dir, tmp_path):
    directory = copied(dit_dir, tmp_path / "model")
    weights = weights_of(directory)
    weights["proj_out_2.bias"] = weights["proj_out_2.bias"].to(dtype)
    save_file(weights, directory / "transformer" / f"{STEM}.safetensors")
    with pytest.raises(ModelError, match=f"expected weights of BF16, .*proj_out_2.bias of {name}"):
        load_model(directory)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_weights_of_other_floats_are_read(dtype, dit_dir, tmp_path):
    directory = copied(dit_dir, tmp_path / "model")
    weights = {name: value.to(dtype) for name, value in weights_of(directory).items()}
    save_file(weights, directory / "transformer" / f"{STEM}.safetensors")
    bias = load_model(directory).network.proj_out_2.bias
    assert torch.equal(bias, weights["proj_out_2.bias"].float())


def test_a_pickle_that_claims_more_than_it_holds(dit_dir, tmp_path):
    directory = copied(dit_dir, tmp_path / "model")
    path = directory / "transformer" / f"{STEM}.bin"
    weights = weights_of(directory)
    weights["proj_out_2.bias"] = torch.zeros(1).expand(4)
    torch.save(weights, path)
    path.with_suffix(".safetensors").unlink()
    with pytest.raises(ModelError, match="must hold dense tensors by name, .*'proj_out_2.bias'"):
        load_model(directory, allow_pickle=True)


# -- what lies beside ------------------------------------------------------------------------------
