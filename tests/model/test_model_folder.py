"""A model's folder: each fault has its own line, and the same content has the same revision."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest

from node.config import ConfigError
from node.model.blocks.span import load_span
from node.model.checkpoint.folder import (
    MANIFEST_FILE,
    HashMemo,
    TensorEntry,
    open_folder,
    read_header,
    revision_of,
    sha256_of,
    weight_files,
)
from tests.model_fixtures import save_tiny


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "model"
    save_tiny("llama", path)
    return path


@pytest.fixture
def model(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


@pytest.fixture
def memo(tmp_path) -> HashMemo:
    return HashMemo(tmp_path / "cache" / "hashes.json")


def shard_of(model: Path, tensor: str) -> Path:
    index = json.loads((model / "model.safetensors.index.json").read_text())
    return model / index["weight_map"][tensor]


def test_a_missing_folder_is_refused(tmp_path, memo):
    with pytest.raises(ConfigError, match=r"there is no folder .*nowhere"):
        open_folder(tmp_path / "nowhere", memo=memo)


def test_a_folder_without_a_config_is_refused(model, memo):
    (model / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        open_folder(model, memo=memo)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe"])
def test_a_damaged_config_is_refused(model, memo, content):
    (model / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"config\.json is damaged"):
        open_folder(model, memo=memo)


def test_a_folder_without_weights_is_refused(model, memo):
    (model / "model.safetensors.index.json").unlink()
    with pytest.raises(ConfigError, match="has no weights"):
        open_folder(model, memo=memo)


def test_a_file_that_cannot_be_read_is_refused(model, memo, monkeypatch):
    shard = shard_of(model, "model.norm.weight")
    real = Path.open

    def guarded(self, *args, **kwargs):
        if self == shard:
            raise PermissionError(13, "Permission denied", str(self))
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", guarded)  # root reads everything, so a mode would not do
    with pytest.raises(ConfigError, match=f"cannot read .*{shard.name}: Permission denied"):
        open_folder(model, memo=memo)


def test_a_missing_shard_is_refused_by_name(model, memo):
    shard = shard_of(model, "model.norm.weight")
    shard.unlink()
    with pytest.raises(ConfigError, match=f"has no {shard.name}"):
        open_folder(model, memo=memo)


def test_a_tensor_that_is_not_in_the_shard_of_the_index_is_refused_by_name(model, memo):
    path = model / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.layers.9.extra"] = shard_of(model, "model.norm.weight").name
    path.write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=r"tensor model.layers.9.extra is missing from"):
        open_folder(model, memo=memo)


@pytest.mark.parametrize("name", ["../config.json", "a/b.safetensors", "model.bin"])
def test_an_index_that_leads_out_of_the_folder_is_refused(model, name):
    path = model / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"x": name}}))
    with pytest.raises(ConfigError, match="is not the name of a weight file"):
        weight_files(model)


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1])
def test_a_truncated_file_is_refused_wherever_it_ends(model, memo, keep):
    shard = shard_of(model, "model.norm.weight")
    content = shard.read_bytes()
    shard.write_bytes(content[:keep])
    with pytest.raises(ConfigError, match=rf"{shard.name} is (truncated|damaged)"):
        open_folder(model, memo=memo)
    if keep == -1:
        with pytest.raises(
            ConfigError, match=f"{len(content) - 1} bytes, its header promises {len(content)}"
        ):
            read_header(shard)


def header(text: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    "content",
    [
        header(b"{not json}") + b"\0" * 64,
        header(b"[1, 2]") + b"\0" * 64,
        header(b'{"a": {"dtype": "F32", "shape": [2]}}') + b"\0" * 64,
        header(b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 9]}}') + b"\0" * 64,
        header(b'{"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, -8]}}') + b"\0" * 64,
        header(b'{"a": {"dtype": "F32", "shape": "2", "data_offsets": [0, 8]}}') + b"\0" * 64,
        header(b'{"a": 7}') + b"\0" * 64,
        (1 << 63).to_bytes(8, "little") + b"\0" * 64,
        (1).to_bytes(8, "little") + b"{" + b"\0" * 64,
    ],
)
def test_a_damaged_header_is_refused(tmp_path, content):
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"model.safetensors is damaged"):
        read_header(file)


def test_a_header_gives_each_tensors_file_type_and_shape(model):
    shard = shard_of(model, "model.norm.weight")
    assert read_header(shard)["model.norm.weight"] == TensorEntry(shard.name, "F32", (32,))


def test_the_revision_is_a_hash_of_config_and_weights_and_of_nothing_else(model, memo, tmp_path):
    folder = open_folder(model, memo=memo)
    files = ["config.json", *sorted(path.name for path in model.glob("*.safetensors"))]
    lines = "".join(f"{name} {hashlib.sha256((model / name).read_bytes()).hexdigest()}\n" for name in files)
    assert folder.revision == hashlib.blake2b(lines.encode(), digest_size=16).hexdigest()
    copy = Path(shutil.copytree(model, tmp_path / "elsewhere"))
    (copy / "README.md").write_text("another file")
    (copy / "generation_config.json").write_text("{}")
    assert open_folder(copy, memo=memo).revision == folder.revision
    (copy / "config.json").write_text((copy / "config.json").read_text() + "\n")
    assert open_folder(copy, memo=memo).revision != folder.revision


def test_the_revision_does_not_depend_on_the_order_of_files():
    assert revision_of({"a": "1", "b": "2"}) == revision_of({"b": "2", "a": "1"})
    assert revision_of({"a": "1", "b": "2"}) != revision_of({"a": "2", "b": "1"})


def test_a_file_is_hashed_once_until_it_changes(model, memo, monkeypatch):
    read = []

    def note(path, progress):
        read.append(path.name)
        return sha256_of(path, progress)

    monkeypatch.setattr("node.model.checkpoint.folder.sha256_of", note)
    first = open_folder(model, memo=memo).revision
    assert len(read) == len(list(model.glob("*.safetensors"))) + 1
    read.clear()
    assert open_folder(model, memo=memo).revision == first
    assert not read
    shard = shard_of(model, "model.norm.weight")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    os.utime(shard, ns=(1, 1))
    assert open_folder(model, memo=memo).revision != first
    assert read == [shard.name]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"x": 7}'])
def test_a_damaged_memo_of_hashes_costs_time_only(model, memo, content):
    first = open_folder(model, memo=memo).revision
    memo.path.write_bytes(content)
    assert open_folder(model, memo=memo).revision == first


def test_a_cache_that_cannot_be_written_costs_time_only(model, tmp_path):
    (tmp_path / "file").write_text("in the way")
    memo = HashMemo(tmp_path / "file" / "hashes.json")
    assert open_folder(model, memo=memo).revision == open_folder(model, memo=memo).revision


def write_manifest(model: Path, name: str = "tiny") -> dict:
    files = {
        path.name: {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "size": path.stat().st_size}
        for path in model.iterdir()
    }
    manifest = {"format": 1, "name": name, "files": files}
    (model / MANIFEST_FILE).write_text(json.dumps(manifest))
    return manifest


def test_a_manifest_changes_no_revision_and_names_the_model(model, memo):
    plain = open_folder(model, memo=memo)
    write_manifest(model)
    described = open_folder(model, memo=memo)
    assert (plain.name, described.name) == ("model", "tiny")
    assert plain.revision == described.revision


@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "model-00002-of-00007.safetensors"]
)
def test_a_file_that_differs_from_the_manifest_is_refused_by_name(model, memo, name):
    if name.endswith(".safetensors"):
        name = shard_of(model, "model.norm.weight").name
    write_manifest(model)
    open_folder(model, memo=memo)
    content = bytearray((model / name).read_bytes())
    content[-2] = ord(" ") if name.endswith(".json") else content[-2] ^ 1
    (model / name).write_bytes(content + (b"}" if name.endswith(".json") else b""))
    os.utime(model / name, ns=(1, 1))
    with pytest.raises(ConfigError, match=f"{name} is not the file that {MANIFEST_FILE} describes"):
        open_folder(model, memo=memo)


def test_a_file_of_the_manifest_that_is_missing_is_refused_by_name(model, memo):
    write_manifest(model)
    (model / "generation_config.json").unlink()
    with pytest.raises(ConfigError, match=r"has no generation_config.json, which raceme.json lists"):
        open_folder(model, memo=memo)


@pytest.mark.parametrize("files", [None, [], {"../x": {"sha256": "0"}}, {"config.json": {}}])
def test_a_damaged_manifest_is_refused(model, memo, files):
    (model / MANIFEST_FILE).write_text(json.dumps({"files": files}))
    with pytest.raises(ConfigError, match=r"raceme.json is damaged"):
        open_folder(model, memo=memo)


def test_a_shard_that_changed_after_it_was_opened_is_refused(model, memo):
    folder = open_folder(model, memo=memo)
    shard = shard_of(model, "model.layers.1.mlp.up_proj.weight")
    shutil.copy(shard_of(model, "model.embed_tokens.weight"), shard)
    with pytest.raises(ConfigError, match=f"{shard.name} no longer holds tensor"):
        load_span(folder, 1, 2)
    shard.unlink()
    with pytest.raises(ConfigError, match=f"has no {shard.name}"):
        load_span(folder, 1, 2)
