"""Files that are replaced: whole or as they were."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from dive_fast.core.files import leftovers, replacing


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def umask() -> None:
    before = os.umask(0o027)
    yield
    os.umask(before)


def test_a_new_file_has_the_permissions_of_any_new_file(tmp_path: Path, umask: None) -> None:
    with replacing(tmp_path / "new") as file:
        file.write(b"con")
        file.write(b"tent")
        assert not (tmp_path / "new").exists()
    assert (tmp_path / "new").read_bytes() == b"content"
    assert mode(tmp_path / "new") == 0o640
    assert os.listdir(tmp_path) == ["new"]


def test_an_old_file_keeps_its_permissions(tmp_path: Path) -> None:
    path = tmp_path / "old"
    path.write_bytes(b"before")
    path.chmod(0o604)
    with replacing(path) as file:
        file.write(b"after")
        assert path.read_bytes() == b"before"
    assert path.read_bytes() == b"after" and mode(path) == 0o604


@pytest.mark.parametrize("error", [OSError, RuntimeError, KeyboardInterrupt])
def test_an_error_leaves_what_was_there(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"before")
    with pytest.raises(error), replacing(path) as file:
        file.write(b"half")
        raise error
    assert path.read_bytes() == b"before" and os.listdir(tmp_path) == ["file"]


def test_two_writers_at_once(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with replacing(path) as first, replacing(path) as second:
        first.write(b"first")
        second.write(b"second")
        assert len(leftovers(path)) == 2
    assert path.read_bytes() == b"first"  # it ends last
    assert leftovers(path) == []


def test_leftovers_are_of_one_file_alone(tmp_path: Path) -> None:
    for name in ("a.json", ".a.json.x.tmp", ".a.json.swp", ".b.json.x.tmp", "a.json.x.tmp"):
        (tmp_path / name).touch()
    assert [p.name for p in leftovers(tmp_path / "a.json")] == [".a.json.x.tmp"]


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "none" / "file"):
        pass
