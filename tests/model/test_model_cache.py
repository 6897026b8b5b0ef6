"""The model cache within a bound: removed is what nobody uses, whatever dies in between."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import node.__main__
from node.config import ConfigError
from node.model.checkpoint.disk import model_cache
from node.model.checkpoint.disk.model_cache import ModelCache
from node.model.checkpoint.disk.plan import PARTIAL, Key
from node.model.checkpoint.disk.uses import Uses
from node.model.checkpoint.source import list_models, resolve
from tests.model.test_model_source import FakeHub
from tests.model_fixtures import save_tiny

ROOT = Path(__file__).resolve().parents[2]
COMMITS = ("a" * 40, "b" * 40)


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """The folder of the hub's cache, in which nothing lies yet."""
    import huggingface_hub.constants

    path = tmp_path / "hub-files"
    path.mkdir()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(path))
    return path


def ours(root: Path, name: str, size: int, used: float) -> Key:
    """A model of our own cache, used at this time."""
    folder = root / "models" / name / "1"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(bytes(size))
    key = Key("models", name, "1")
    ModelCache(root).hold(key).close()
    os.utime(root.joinpath("uses", *key, "used"), (used, used))
    return key


def theirs(root: Path, hub: Path, name: str, commit: str, files: dict[str, bytes], used: float) -> Key:
    """A revision in the hub's cache: blobs by content, links to them."""
    repository = hub / f"models--{name}"
    snapshot, blobs = repository / "snapshots" / commit, repository / "blobs"
    for folder in (snapshot, blobs, repository / "refs"):
        folder.mkdir(parents=True, exist_ok=True)
    (repository / "refs" / "main").write_text(commit)
    for file, content in files.items():
        blob = f"{len(content)}-{content[:1].hex()}"
        (blobs / blob).write_bytes(content)
        (snapshot / file).symlink_to(f"../../blobs/{blob}")
    key = Key("hub", name, commit)
    ModelCache(root).hold(key, snapshot).close()
    os.utime(root.joinpath("uses", *key, "used"), (used, used))
    return key


def known(root: Path) -> dict[str, int]:
    return {each.name: each.size for each in list_models(root) if each.size}


def test_the_longest_unused_model_makes_room_wherever_it_lies(tmp_path, hub):
    root = tmp_path / "cache"
    ours(root, "oldest", 1000, used=100)
    theirs(root, hub, "org--old", COMMITS[0], {"model.safetensors": bytes(1000)}, used=200)
    ours(root, "new", 1000, used=300)
    cache = ModelCache(root, 2500)
    key = Key("models", "mine", "1")
    lease = cache.hold(key)
    cache.make_room(key, lease, {"model.safetensors": 400})
    assert known(root) == {"org/old": 1000, "new": 1000, "mine": 400}
    cache.make_room(key, lease, {"model.safetensors": 1500})
    assert known(root) == {"new": 1000, "mine": 1500}
    assert not (hub / "models--org--old").exists()
    assert not (root / "models" / "oldest" / "1").exists()


def test_a_bound_that_is_too_small_removes_nothing_and_says_both_numbers(tmp_path, hub):
    root = tmp_path / "cache"
    ours(root, "old", 1000, used=100)
    cache = ModelCache(root, 2048)
    key = Key("models", "mine", "1")
    lease = cache.hold(key)
    with pytest.raises(
        ConfigError, match=r"--max-disk of 2.0 KiB is too small for mine: its files need 3.0 KiB"
    ):
        cache.make_room(key, lease, {"model.safetensors": 3072})
    assert known(root) == {"old": 1000}


def test_of_two_revisions_the_unused_one_goes_and_shared_files_stay(tmp_path, hub):
    root = tmp_path / "cache"
    shared, old, new = b"s" * 1000, b"o" * 500, b"n" * 600
    files = {"shared": shared, "model.safetensors": old}
    theirs(root, hub, "org--two", COMMITS[0], files, used=100)
    theirs(root, hub, "org--two", COMMITS[1], {**files, "model.safetensors": new}, used=200)
    cache = ModelCache(root, 1700)
    lease = cache.hold(Key("hub", "org--two", COMMITS[1]))
    cache.trim()
    assert cache.nbytes == 1600
    snapshot = hub / "models--org--two" / "snapshots" / COMMITS[1]
    assert (snapshot / "shared").read_bytes() == shared
    assert not snapshot.with_name(COMMITS[0]).exists()
    lease.close()


def test_revisions_that_other_programs_have_fetched_are_left_alone(tmp_path, hub):
    root = tmp_path / "cache"
    theirs(root, hub, "org--two", COMMITS[0], {"model.safetensors": b"o" * 500}, used=100)
    foreign = hub / "models--org--two" / "snapshots" / COMMITS[1]
    foreign.mkdir()
    (foreign / "model.safetensors").write_bytes(b"f" * 700)
    other = hub / "models--org--other" / "snapshots" / COMMITS[0]
    other.mkdir(parents=True)
    (other / "model.safetensors").write_bytes(b"x" * 900)
    cache = ModelCache(root, 1)
    assert cache.nbytes == 500
    cache.trim()
    assert cache.nbytes == 0
    assert (foreign / "model.safetensors").exists()
    assert (other / "model.safetensors").exists()


HOLD = """
import sys, time
from pathlib import Path
from node.model.checkpoint.disk.model_cache import ModelCache
from node.model.checkpoint.disk.plan import Key
lease = ModelCache(Path(sys.argv[1])).hold(Key("models", sys.argv[2], "1"))
lease.expect({"coming": 300})
print("held", flush=True)
time.sleep(60)
"""


@pytest.mark.process
def test_a_model_that_another_process_uses_stays_until_that_process_is_gone(tmp_path, hub):
    root = tmp_path / "cache"
    old = ours(root, "old", 1000, used=100)
    ours(root, "new", 1000, used=200)
    command = [sys.executable, "-c", HOLD, str(root), "old"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, text=True) as process:
        try:
            assert process.stdout.readline() == "held\n"
            cache = ModelCache(root, 1500)
            assert cache.nbytes == 2300  # with the bytes that the other is about to write
            cache.trim()
            assert known(root) == {"old": 1300}
            assert [each.in_use for each in list_models(root) if each.name == "old"] == [True]
            key = Key("models", "mine", "1")
            with pytest.raises(ConfigError, match=r"leaves no room for mine: .* are in use \(old\)"):
                cache.make_room(key, cache.hold(key), {"model.safetensors": 600})
        finally:
            process.send_signal(signal.SIGKILL)
    assert not Uses(root / "uses").is_used(old)
    last_used = next(each.last_used for each in list_models(root) if each.name == "old")
    assert time.time() - last_used < 60  # and not 100
    ModelCache(root, 999).trim()
    assert known(root) == {}


def test_a_model_of_this_process_stays_while_its_folder_lives(tmp_path, hub):
    root = tmp_path / "cache"
    save_tiny("llama", root / "models" / "tiny" / "1")
    folder = resolve(root / "models" / "tiny" / "1", cache_dir=root)
    cache = ModelCache(root, 1)
    cache.trim()
    assert folder.path.is_dir()
    del folder
    gc.collect()
    cache.trim()
    assert not (root / "models" / "tiny" / "1").exists()


def test_a_removal_that_was_killed_is_ended_by_the_next(tmp_path, hub, monkeypatch):
    root = tmp_path / "cache"
    ours(root, "old", 1000, used=100)
    key = theirs(root, hub, "org--half", COMMITS[0], {"model.safetensors": bytes(1000)}, used=200)

    class Killed(BaseException):
        pass

    def killed(*_, **__):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(Killed):
            ModelCache(root, 1500).trim()
    assert len(list((root / "models" / "old").iterdir())) == 1  # under another name, and no model any more
    with monkeypatch.context() as patch:
        patch.setattr(model_cache, "_remove_from_hub", killed)
        with pytest.raises(Killed):
            ModelCache(root, 1).trim()
    snapshot = hub / "models--org--half" / "snapshots" / COMMITS[0]
    (snapshot / "model.safetensors").unlink()  # as far as the removal came
    ModelCache(root, 1 << 30).trim()
    assert list((root / "models" / "old").iterdir()) == []
    assert not (hub / "models--org--half").exists()
    assert key not in Uses(root / "uses").keys()  # noqa: SIM118


def test_a_model_that_is_used_again_is_no_longer_about_to_leave(tmp_path, hub):
    root = tmp_path / "cache"
    key = ours(root, "old", 1000, used=100)
    Uses(root / "uses").leave(key)
    ModelCache(root).hold(key).close()
    ModelCache(root, 2000).trim()
    assert known(root) == {"old": 1000}


def test_what_a_download_that_ended_early_has_left_counts_and_goes(tmp_path, hub):
    root = tmp_path / "cache"
    theirs(root, hub, "org--part", COMMITS[0], {"config.json": b"{}"}, used=100)
    part = hub / "models--org--part" / "blobs" / "abc.incomplete"
    part.write_bytes(bytes(5000))
    cache = ModelCache(root, 1000)
    assert cache.nbytes == 5002
    cache.trim()
    assert part.exists()  # written a moment ago, maybe by another program
    os.utime(part, (100, 100))
    cache.trim()
    assert not part.exists()
    assert known(root) == {"org/part": 2}
    assert not [each for each in cache.known() if each.key.revision == PARTIAL]


def test_the_weights_of_a_hubs_model_make_room_before_they_are_fetched(tmp_path, hub):
    saved = tmp_path / "saved"
    save_tiny("llama", saved)
    weights = sum(path.stat().st_size for path in saved.glob("*.safetensors"))
    root = tmp_path / "cache"
    ours(root, "old", weights, used=100)
    fake = FakeHub(saved, tmp_path / "models--org--tiny" / "snapshots" / COMMITS[0])
    bound = weights + weights // 2
    folder = resolve("org/tiny", cache_dir=root, hub=fake, max_disk_bytes=bound)
    assert known(root)["old"] == weights
    folder.need({entry.file for entry in folder.tensors.values()})
    assert "old" not in known(root)
    with pytest.raises(ConfigError, match=r"--max-disk of .* is too small for org/tiny"):
        resolve("org/tiny", cache_dir=root, hub=fake, max_disk_bytes=weights // 2)


def test_a_cache_that_cannot_be_written_serves_and_refuses_a_bound(tmp_path, hub):
    root = tmp_path / "cache"
    root.write_text("a file where a folder is needed")
    key = Key("models", "mine", "1")
    ModelCache(root).hold(key).close()
    with pytest.raises(ConfigError, match="cannot write"):
        ModelCache(root, 1000).hold(key)


def test_the_command_lists_sizes_and_last_uses_and_bounds_the_cache(tmp_path, hub, monkeypatch, capsys):
    root = tmp_path / "cache"
    monkeypatch.setenv("RACEME_CACHE", str(root))
    ours(root, "old", 2048, used=100)
    theirs(root, hub, "org--new", COMMITS[0], {"model.safetensors": bytes(4096)}, used=1.7e9)
    lease = ModelCache(root).hold(Key("hub", "org--new", COMMITS[0]))
    assert node.__main__.main(["models", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["bytes"] == 6144
    old, new = (next(each for each in facts["models"] if each["name"] == name) for name in ("old", "org/new"))
    assert (old["bytes"], old["last_used"], old["in_use"], old["revision"]) == (2048, 100.0, False, "1")
    assert (new["bytes"], new["in_use"], new["revision"]) == (4096, True, COMMITS[0])
    assert node.__main__.main(["models"]) == 0
    out = capsys.readouterr().out
    assert f"cache: {root}, 6.0 KiB\n" in out
    assert f"  old (1): 2.0 KiB in {root}/models/old/1, used 1970-01-01" in out
    assert "  org/new (aaaaaaaa): 4.0 KiB in " in out
    assert "used now\n" in out
    lease.close()
    assert node.__main__.main(["models", "--max-disk", "5KiB"]) == 0
    out = capsys.readouterr().out
    assert "4.0 KiB, of at most 5.0 KiB\n" in out
    assert "old" not in out
