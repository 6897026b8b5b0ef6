"""The three sources of a model, and that the same content has the same revision from each."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from node.config import ConfigError
from node.model.blocks.span import load_span
from node.model.checkpoint.builtin import BUILTIN_MODEL, BUILTIN_VERSION
from node.model.checkpoint.folder import HashMemo, TensorEntry, open_folder, read_header
from node.model.checkpoint.hub import Hub, Listing, Unreachable
from node.model.checkpoint.source import cache_dir, list_models, resolve
from tests.model_fixtures import save_tiny

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "model"
    save_tiny("llama", path)
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class FakeHub(Hub):
    """A hub in a folder: `remote` is what it has, `path` what was fetched from it."""

    def __init__(self, remote: Path, path: Path, online: bool = True) -> None:
        self.remote, self.path, self.online = remote, path, online
        self.fetched: list[str] = []

    def _ask(self) -> None:
        if not self.online:
            raise Unreachable("no route")

    def listing(self, model, revision):
        self._ask()
        return Listing(COMMIT, {path.name: sha256(path) for path in self.remote.glob("*.safetensors")})

    def small_files(self, model, commit):
        self._ask()
        self.path.mkdir(parents=True, exist_ok=True)
        for path in self.remote.glob("*.json"):
            shutil.copy(path, self.path)
        return self.path

    def tensors(self, model, commit):
        self._ask()
        found: dict[str, TensorEntry] = {}
        for path in self.remote.glob("*.safetensors"):
            found |= read_header(path)
        return found

    def fetch(self, model, commit, file):
        self._ask()
        self.fetched.append(file)
        shutil.copy(self.remote / file, self.path)

    def local(self, model, revision):
        return self.path if self.path.is_dir() else None


def test_the_cache_is_where_the_environment_says():
    assert cache_dir({"RACEME_CACHE": "/a/b", "XDG_CACHE_HOME": "/c"}) == Path("/a/b")
    assert cache_dir({"XDG_CACHE_HOME": "/c"}) == Path("/c/raceme")
    assert cache_dir({"XDG_CACHE_HOME": "relative"}) == Path.home() / ".cache/raceme"
    assert cache_dir({}) == Path.home() / ".cache/raceme"


def test_a_local_folder_is_a_model(saved, tmp_path):
    folder = resolve(saved, cache_dir=tmp_path)
    assert folder.path == saved
    assert folder.name == "model"
    folder.need({entry.file for entry in folder.tensors.values()})


@pytest.mark.parametrize("name", ["no-such-model", "a/b/c", "./nowhere", "../x/y", "/nowhere/model"])
def test_a_name_that_is_nothing_is_refused_with_what_is_allowed(tmp_path, name):
    with pytest.raises(ConfigError, match=f"there is no folder .*org/name, built in is {BUILTIN_MODEL}"):
        resolve(name, cache_dir=tmp_path)


def test_a_revision_is_for_the_hub_only(saved, tmp_path):
    for model in (saved, BUILTIN_MODEL, None):
        with pytest.raises(ConfigError, match="a revision can be chosen for a model of the hub only"):
            resolve(model, cache_dir=tmp_path, revision="main")


def test_a_model_of_the_hub_is_planned_without_its_weights_and_has_the_folders_revision(saved, tmp_path):
    hub = FakeHub(saved, tmp_path / "snapshots" / COMMIT)
    folder = resolve("org/tiny", cache_dir=tmp_path / "cache", hub=hub)
    local = resolve(saved, cache_dir=tmp_path / "cache")
    assert hub.fetched == []
    assert folder.name == "org/tiny"
    assert (folder.revision, folder.tensors) == (local.revision, local.tensors)


def test_only_the_shards_of_the_span_are_fetched_from_the_hub_and_once(saved, tmp_path):
    hub = FakeHub(saved, tmp_path / "snapshots" / COMMIT)
    folder = resolve("org/tiny", cache_dir=tmp_path / "cache", hub=hub)
    load_span(folder, 2, 3)
    assert set(hub.fetched) == {e.file for n, e in folder.tensors.items() if ".layers.2." in n}
    assert len(hub.fetched) < len({entry.file for entry in folder.tensors.values()})
    before = list(hub.fetched)
    load_span(folder, 2, 3)
    assert hub.fetched == before


def test_who_was_online_once_starts_offline_with_the_shards_of_its_span(saved, tmp_path):
    path = tmp_path / "snapshots" / COMMIT
    online = resolve("org/tiny", cache_dir=tmp_path / "cache", hub=FakeHub(saved, path))
    load_span(online, 2, 3)
    offline = resolve("org/tiny", cache_dir=tmp_path / "cache", hub=FakeHub(saved, path, online=False))
    assert offline.revision == online.revision
    load_span(offline, 2, 3)
    with pytest.raises(ConfigError, match=r"the hub did not send model-.* of org/tiny: no route"):
        load_span(offline, 0, 6)


def test_a_hub_that_does_not_answer_and_an_empty_cache_are_refused(saved, tmp_path):
    hub = FakeHub(saved, tmp_path / "snapshots" / COMMIT, online=False)
    with pytest.raises(ConfigError, match="org/tiny is not in the hub's cache, and the hub: no route"):
        resolve("org/tiny", cache_dir=tmp_path / "cache", hub=hub)


def test_a_shard_that_is_not_what_the_hub_lists_is_refused_by_name(saved, tmp_path):
    class Lying(FakeHub):
        def fetch(self, model, commit, file):
            super().fetch(model, commit, file)
            with (self.path / file).open("r+b") as out:
                out.seek(-1, os.SEEK_END)
                out.write(b"\x55")

    folder = resolve(
        "org/tiny", cache_dir=tmp_path / "cache", hub=Lying(saved, tmp_path / "snapshots" / COMMIT)
    )
    with pytest.raises(ConfigError, match=r"model-.*safetensors is not the file that the hub lists"):
        load_span(folder, 2, 3)


def test_a_full_disk_while_fetching_is_one_clear_line(saved, tmp_path):
    class Full(FakeHub):
        def fetch(self, model, commit, file):
            raise OSError(28, "No space left on device", str(self.path / file))

    hub = Full(saved, tmp_path / "snapshots" / COMMIT)
    folder = resolve("org/tiny", cache_dir=tmp_path / "cache", hub=hub)
    with pytest.raises(
        ConfigError, match=r"the disk is full: writing .*safetensors failed with \d+ bytes free"
    ):
        load_span(folder, 2, 3)


def test_a_disk_that_is_nearly_full_is_not_filled_and_what_is_there_is_served(saved, tmp_path, monkeypatch):
    hub = FakeHub(saved, tmp_path / "snapshots" / COMMIT)
    folder = resolve("org/tiny", cache_dir=tmp_path / "cache", hub=hub)
    load_span(folder, 0, 2)
    before = list(hub.fetched)
    usage = type("Usage", (), {"total": 100 << 30, "free": (2 << 30) - 1})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ConfigError, match=r"bytes free, model-.*safetensors needs \d+ and leaves 2147483648"):
        load_span(folder, 4, 6)
    assert hub.fetched == before
    load_span(folder, 0, 2)


def hub_cache(saved: Path, root: Path, leave_out: str = "") -> Path:
    """The layout of the hub's own cache: blobs by hash, snapshots of links to them."""
    repository = root / "models--org--tiny"
    snapshot, blobs = repository / "snapshots" / COMMIT, repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    for path in saved.iterdir():
        if path.name != leave_out:
            blob = (
                sha256(path) if path.suffix == ".safetensors" else hashlib.sha1(path.read_bytes()).hexdigest()
            )
            shutil.copy(path, blobs / blob)
            (snapshot / path.name).symlink_to(f"../../blobs/{blob}")
    return snapshot


OFFLINE = """
import sys
from pathlib import Path
from node.config import ConfigError
from node.model.checkpoint.source import resolve
try:
    folder = resolve("org/tiny", cache_dir=Path(sys.argv[1]))
    print(folder.revision, folder.path.name, "torch" in sys.modules)
except ConfigError as error:
    print("ConfigError:", error)
"""


def run_offline(cache: Path, hub: Path) -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(hub), "HF_HOME": str(hub)}
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, str(cache)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        cwd=Path(__file__).parents[2],
        check=True,
    )
    return done.stdout.strip()


def test_the_hubs_own_cache_serves_offline_with_the_folders_revision_and_without_torch(saved, tmp_path):
    hub_cache(saved, tmp_path / "hub")
    local = open_folder(saved, memo=HashMemo(tmp_path / "hashes.json"))
    assert run_offline(tmp_path / "cache", tmp_path / "hub") == f"{local.revision} {COMMIT} False"
    memo = json.loads((tmp_path / "cache" / "hashes.json").read_text())
    assert len(memo) == 1  # the config alone: blobs are named by their hash


def test_the_hubs_own_cache_without_a_shard_is_refused_by_name(saved, tmp_path):
    shard = sorted(saved.glob("*.safetensors"))[1].name
    hub_cache(saved, tmp_path / "hub", leave_out=shard)
    answer = run_offline(tmp_path / "cache", tmp_path / "hub")
    assert answer.startswith(f"ConfigError: the hub's cache has org/tiny without {shard}")


def test_an_empty_hub_cache_offline_is_refused(tmp_path):
    answer = run_offline(tmp_path / "cache", tmp_path / "hub")
    assert answer.startswith("ConfigError: org/tiny is not in the hub's cache")


def test_the_list_of_models_has_the_built_in_one_first_and_those_of_the_hub(saved, tmp_path):
    (first,) = list_models(tmp_path)
    assert (first.name, first.path, first.size) == (BUILTIN_MODEL, None, 0)
    resolve("org/tiny", cache_dir=tmp_path, hub=FakeHub(saved, tmp_path / "snapshots" / COMMIT))
    fetched = tmp_path / "models" / BUILTIN_MODEL / BUILTIN_VERSION
    shutil.copytree(saved, fetched)
    builtin, hub = list_models(tmp_path)
    assert builtin.path == fetched
    assert builtin.size == sum(file.stat().st_size for file in saved.iterdir())
    assert hub.name == "org/tiny"
