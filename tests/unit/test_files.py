"""Files appear whole or not at all, and a name that somebody else took first leads nowhere."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import stat
from pathlib import Path

import pytest

from node.config import ConfigError, NetworkConfig
from node.main import Node, write_ready_file
from node.runtime.files import check_free_disk, disk_errors, free_disk_bytes, write_atomically

READY_FAULT = r"ready file .*ready\.json: No space left on device, \d+ bytes are free"

READY_FAULT = r"ready file .*ready\.json: No space left on device, \d+ bytes are free"


def full(descriptor: int) -> None:
    raise OSError(28, "No space left on device")


def test_a_write_that_fails_leaves_neither_a_short_file_nor_a_part(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", full)
    full_disk = r"the disk is full: writing .*/file failed with \d+ bytes free"
    with pytest.raises(ConfigError, match=full_disk), disk_errors(tmp_path):
        write_atomically(tmp_path / "file", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"


def test_a_ready_file_on_a_full_disk_is_named_with_the_bytes_that_are_free(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", full)
    config = NetworkConfig(ready_file=tmp_path / "ready.json")
    with pytest.raises(ConfigError, match=READY_FAULT):
        write_ready_file(config, node_of_nobody(), None)
    assert list(tmp_path.iterdir()) == []


def test_a_node_that_serves_goes_on_where_its_ready_file_cannot_be_written_anew(
    tmp_path, monkeypatch, caplog
):
    config = NetworkConfig(ready_file=tmp_path / "ready.json")
    write_ready_file(config, node_of_nobody(), None)
    before = (tmp_path / "ready.json").read_bytes()
    monkeypatch.setattr(os, "fsync", full)
    write_ready_file(config, node_of_nobody(), None, serving=True)
    assert re.search(READY_FAULT, caplog.text)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [before]


def node_of_nobody() -> Node:
    class Host:
        peer_id = "nobody"
        addresses = ()

    return Node(NetworkConfig(), Host(), None, None)  # type: ignore[arg-type]


def write_a_ready_file(path: Path) -> None:
    write_ready_file(NetworkConfig(ready_file=path), node_of_nobody(), None)


def write_a_file(path: Path) -> None:
    write_atomically(path, b"ours")


@pytest.mark.parametrize("write", [write_a_file, write_a_ready_file])
def test_a_link_under_the_files_name_is_replaced_and_not_followed(tmp_path, write):
    victim = tmp_path / "victim"
    victim.write_bytes(b"theirs")
    (tmp_path / "file").symlink_to(victim)
    write(tmp_path / "file")
    assert victim.read_bytes() == b"theirs"
    assert (tmp_path / "file").read_bytes() != b"theirs"
    assert not (tmp_path / "file").is_symlink()


@pytest.mark.parametrize("write", [write_a_file, write_a_ready_file])
def test_no_link_that_lies_there_beforehand_is_written_through(tmp_path, write, monkeypatch):
    victim = tmp_path / "victim"
    victim.write_bytes(b"theirs")
    for guess in (f".file.{os.getpid()}.part", ".file.part", ".file.guessed.part"):
        (tmp_path / guess).symlink_to(victim)
    write(tmp_path / "file")  # under a name that cannot be guessed
    assert victim.read_bytes() == b"theirs"
    monkeypatch.setattr(secrets, "token_hex", lambda size: "guessed")
    with pytest.raises((FileExistsError, ConfigError), match="File exists"):
        write(tmp_path / "file")
    assert victim.read_bytes() == b"theirs"


def test_others_may_read_a_file_as_far_as_the_umask_says(tmp_path):
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "file", b"")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


def test_the_free_bytes_of_a_folder_that_is_not_there_yet_are_those_of_the_one_above(tmp_path):
    assert free_disk_bytes(tmp_path / "not" / "there") > 0


GIB = 1 << 30


@pytest.mark.parametrize(
    ("total", "free", "needed", "spare"),
    [
        (100 * GIB, 5 * GIB, 3 * GIB, None),
        (100 * GIB, 5 * GIB, 3 * GIB + 1, 2 * GIB),
        (100 * GIB, GIB, 0, 2 * GIB),
        (10 * GIB, 3 * GIB, 2 * GIB, None),
        (10 * GIB, 3 * GIB, 2 * GIB + 1, GIB),
    ],
)
def test_what_is_fetched_leaves_two_gib_of_a_disk_free_or_a_tenth_of_a_small_one(
    monkeypatch, tmp_path, total, free, needed, spare
):
    usage = type("Usage", (), {"total": total, "free": free})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    if spare is None:
        check_free_disk(tmp_path, needed, "a model")
    else:
        said = f"has {free} bytes free, a model needs {needed} and leaves {spare} to others"
        with pytest.raises(ConfigError, match=said):
            check_free_disk(tmp_path, needed, "a model")
