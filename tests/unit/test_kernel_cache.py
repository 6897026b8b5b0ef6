"""The folder of compiled kernels: its key, its owner, its bound."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

numba = pytest.importorskip("numba")

from node.model.weights import kernel_cache  # noqa: E402  # it imports numba

ROOT = kernel_cache.HERE.parents[1]
NAMES = [f"{number:032x}" for number in range(kernel_cache.KEPT_KEYS + 3)]


def test_other_sources_and_other_compilers_have_another_key():
    given = ([b"one", b"two"], ["numba 1", "x86"])
    assert kernel_cache.key_of(*given) == kernel_cache.key_of(*given)
    others = [
        ([b"one", b"two "], given[1]),
        ([b"onet", b"wo"], given[1]),
        (given[0], ["numba 2", "x86"]),
        (given[0], ["numba 1", "arm"]),
    ]
    assert len({kernel_cache.key_of(*each) for each in (given, *others)}) == 5


def test_a_changed_source_has_another_key_and_a_copy_the_same(tmp_path: Path, monkeypatch):
    for name in kernel_cache.SOURCES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((kernel_cache.HERE / name).read_bytes())
    monkeypatch.setattr(kernel_cache, "HERE", tmp_path)
    assert kernel_cache.key.__wrapped__() == kernel_cache.key()
    for name in kernel_cache.SOURCES:
        before = kernel_cache.key.__wrapped__()
        (tmp_path / name).write_bytes(b"#" + (tmp_path / name).read_bytes())
        assert kernel_cache.key.__wrapped__() != before


def test_every_module_with_compiled_code_is_part_of_the_key():
    found = {
        path
        for path in (ROOT / "node").rglob("*.py")
        if re.search(r"^(from|import) (numba|llvmlite)", path.read_text(), re.MULTILINE)
    }
    constants = {kernel_cache.HERE / "weights/panels/order.py"}  # that compiled code has
    assert found - {kernel_cache.HERE / "weights/kernel_cache.py"} | constants == {
        kernel_cache.HERE / name for name in kernel_cache.SOURCES
    }


def test_the_folder_is_below_numba_s_variable_or_in_the_cache_of_models(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(numba.config, "CACHE_DIR", "/a/b")
    assert kernel_cache.root() == Path("/a/b")
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    monkeypatch.setenv("RACEME_CACHE", str(tmp_path))
    assert kernel_cache.root() == tmp_path / "kernels"
    monkeypatch.setenv("RACEME_CACHE", "~nobody-of-this-name/x")
    assert kernel_cache.root() is None
    assert kernel_cache.folder(None, NAMES[0]) is None


def test_a_new_folder_is_its_owner_s_alone(tmp_path: Path):
    before = os.umask(0)
    try:
        made = kernel_cache.folder(tmp_path / "kernels", NAMES[0])
    finally:
        os.umask(before)
    assert [each.stat().st_mode & 0o777 for each in (made, made.parent)] == [0o700, 0o700]
    assert kernel_cache.folder(tmp_path / "kernels", NAMES[0]) == made


def test_a_folder_of_others_is_not_used(tmp_path: Path, monkeypatch, caplog):
    made = kernel_cache.folder(tmp_path, NAMES[0])
    made.chmod(0o770)
    assert kernel_cache.folder(tmp_path, NAMES[0]) is None
    assert "others may write there (mode 770)" in caplog.text
    made.chmod(0o700)
    (tmp_path / NAMES[1]).symlink_to(made)
    assert kernel_cache.folder(tmp_path, NAMES[1]) is None
    assert "this is no folder" in caplog.text
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert kernel_cache.folder(tmp_path, NAMES[0]) is None
    assert f"belongs to user {os.getuid()}" in caplog.text


def test_where_nothing_can_be_written_there_is_no_folder(tmp_path: Path, monkeypatch):
    (tmp_path / "file").touch()
    assert kernel_cache.folder(tmp_path / "file", NAMES[0]) is None
    assert kernel_cache.folder(tmp_path, NAMES[0]) is not None
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # a read-only file system: root may write
    assert kernel_cache.folder(tmp_path, NAMES[0]) is None


def test_the_folders_unused_for_longest_are_removed_when_another_one_is_made(tmp_path: Path):
    (tmp_path / "rates").mkdir()
    for age, name in enumerate(NAMES):
        (tmp_path / name).mkdir(mode=0o700)
        (tmp_path / name / "kernel.nbc").touch()
        os.utime(tmp_path / name, (1e9 - 1000 * age,) * 2)
    assert kernel_cache.folder(tmp_path, NAMES[-1]) is not None  # a use is noted, and nothing is removed
    assert len(list(tmp_path.iterdir())) == len(NAMES) + 1
    kernel_cache.folder(tmp_path, "f" * 32)
    left = {"rates", "f" * 32, NAMES[-1], *NAMES[: kernel_cache.KEPT_KEYS - 2]}
    assert {each.name for each in tmp_path.iterdir()} == left
