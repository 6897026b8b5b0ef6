"""A prepared model: the same codes as quantising at load, in a folder that is whole or not there."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from node.__main__ import main
from node.config import ConfigError
from node.model.blocks.span import load_span
from node.model.checkpoint.architecture import ARCHITECTURES
from node.model.checkpoint.folder import HashMemo, ModelFolder, TensorEntry, open_folder
from node.model.checkpoint.info import memory_needed, read_info
from node.model.checkpoint.prepare import plan_files, prepare, size_of
from node.model.embed_and_head import load_embed_and_head
from node.model.weights.quantize import PackedLinear
from tests.model_fixtures import BLOCKS, TINY, save_tiny

torch.set_num_threads(1)


def opened(path: Path) -> ModelFolder:
    return open_folder(path, memo=HashMemo(path.parent / "hashes.json"))


def prepared(folder: ModelFolder, out: Path, **options) -> ModelFolder:
    prepare(folder, out, memo=HashMemo(out.parent / "hashes.json"), **options)
    return opened(out)


@pytest.fixture(scope="module", params=sorted(TINY))
def both(request, tmp_path_factory) -> tuple[ModelFolder, ModelFolder]:
    """A model of each family in several files, and the same prepared."""
    path = tmp_path_factory.mktemp(request.param)
    save_tiny(request.param, path / "model")
    folder = opened(path / "model")
    return folder, prepared(folder, path / "int8")


def test_a_prepared_model_is_bit_for_bit_what_is_quantised_at_load(both):
    folder, int8 = both
    at_load, at_once = load_span(folder, 1, BLOCKS, quantize="int8"), load_span(int8, 1, BLOCKS)
    expected, got = at_load.model.state_dict(), at_once.model.state_dict()
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert sum(isinstance(each, PackedLinear) for each in at_once.model.modules()) >= 4 * (BLOCKS - 1)


def test_its_embedding_norm_and_head_are_the_originals(both):
    folder, int8 = both
    expected, got = (
        load_embed_and_head(folder).model.state_dict(),
        load_embed_and_head(int8).model.state_dict(),
    )
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_it_has_the_originals_name_revision_and_sizes(both):
    folder, int8 = both
    assert (int8.name, int8.revision) == (folder.name, folder.revision)
    assert (folder.quantize, int8.quantize) == ("none", "int8")
    plain, info = read_info(folder), read_info(int8)
    assert (info.block_values, info.kv_values, info.end_values) == (
        plain.block_values, plain.kv_values, plain.end_values,
    )  # fmt: skip
    assert info.block_bytes() == plain.block_bytes("float32", "int8") < plain.block_bytes()
    assert memory_needed(info, 3, "float32", 10) == memory_needed(plain, 3, "float32", 10, "int8")


def test_the_bytes_that_are_reckoned_are_those_that_are_loaded(both):
    folder, _ = both
    info = read_info(folder)
    blocks = [load_span(folder, block, block + 1, quantize="int8") for block in range(BLOCKS)]
    assert info.block_bytes("float32", "int8") == max(
        sum(tensor.nbytes for tensor in span.model.state_dict().values()) for span in blocks
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "model"
    save_tiny("llama", path)
    return path


@pytest.fixture
def llama(saved, tmp_path) -> ModelFolder:
    return opened(Path(shutil.copytree(saved, tmp_path / "model")))


def test_each_file_keeps_its_name_and_its_tensors(llama, tmp_path):
    int8 = prepared(llama, tmp_path / "int8")
    for name, entry in llama.tensors.items():
        assert int8.tensors[name].file == entry.file
        kept = name in ("model.embed_tokens.weight", "lm_head.weight") or len(entry.shape) == 1
        assert int8.tensors[name].dtype == (entry.dtype if kept else "I8")
        scale = int8.tensors.get(f"{name}_scale")
        assert scale == (None if kept else TensorEntry(entry.file, "F32", entry.shape[:1]))


def test_small_files_are_copied_and_other_weights_are_not(llama, tmp_path):
    for name in ("tokenizer.json", "chat_template.jinja", "LICENSE", "pytorch_model.bin", ".hidden"):
        (llama.path / name).write_text(name)
    prepared(llama, tmp_path / "int8")
    names = {path.name for path in (tmp_path / "int8").iterdir()}
    assert {"tokenizer.json", "chat_template.jinja", "LICENSE", "config.json", "raceme.json"} <= names
    assert not names & {"pytorch_model.bin", ".hidden"}
    assert not [path for path in tmp_path.iterdir() if ".part" in path.name]


def test_every_file_is_in_the_manifest_so_that_damage_is_seen(llama, tmp_path):
    int8 = prepared(llama, tmp_path / "int8")
    listed = json.loads((int8.path / "raceme.json").read_text())["files"]
    assert {*listed, "raceme.json"} == {path.name for path in int8.path.iterdir()}
    shard = int8.path / llama.tensors["model.layers.0.mlp.up_proj.weight"].file
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    os.utime(shard, ns=(1, 1))
    with pytest.raises(ConfigError, match=r"is not the file that raceme\.json describes"):
        opened(int8.path)


def test_matrices_begin_where_vector_instructions_like_them(llama, tmp_path):
    int8 = prepared(llama, tmp_path / "int8")
    span = load_span(int8, 0, BLOCKS)
    packed = [each for each in span.model.modules() if isinstance(each, PackedLinear)]
    assert {each.weight.data_ptr() % 64 for each in packed} == {0}


@pytest.mark.parametrize(("dtype", "kind"), [(torch.bfloat16, "BF16"), (torch.float32, "F32")])
def test_what_is_not_quantised_can_be_kept_in_another_dtype(llama, tmp_path, dtype, kind):
    int8 = prepared(llama, tmp_path / "int8", dtype=dtype)
    floats = {entry.dtype for name, entry in int8.tensors.items() if not name.endswith("_scale")}
    assert floats == {"I8", kind}
    again = load_span(int8, 0, BLOCKS).model.state_dict()
    for name, tensor in load_span(llama, 0, BLOCKS, quantize="int8").model.state_dict().items():
        rounded = "norm" in name and tensor.is_floating_point()
        assert torch.equal(again[name], tensor.to(dtype).to(tensor.dtype) if rounded else tensor)


def test_bfloat16_checkpoints_are_quantised_from_what_they_hold(tmp_path):
    save_tiny("llama", tmp_path / "full").to(torch.bfloat16).save_pretrained(tmp_path / "model")
    folder = opened(tmp_path / "model")
    int8 = prepared(folder, tmp_path / "int8")
    expected = load_span(folder, 0, 2, quantize="int8").model.state_dict()
    got = load_span(int8, 0, 2).model.state_dict()
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert int8.tensors["model.norm.weight"].dtype == "BF16"


def test_a_folder_that_is_not_empty_is_left_alone(llama, tmp_path):
    (tmp_path / "int8").mkdir()
    (tmp_path / "int8" / "mine").write_text("mine")
    for out in (tmp_path / "int8", llama.path, llama.path / "config.json"):
        with pytest.raises(ConfigError, match="is there already; name a folder that is empty"):
            prepared(llama, out)
    assert (tmp_path / "int8" / "mine").read_text() == "mine"
    (tmp_path / "int8" / "mine").unlink()
    assert prepared(llama, tmp_path / "int8").quantize == "int8"


def test_a_prepared_model_is_not_prepared_again(llama, tmp_path):
    int8 = prepared(llama, tmp_path / "int8")
    with pytest.raises(ConfigError, match="is prepared already, in int8"):
        prepared(int8, tmp_path / "twice")
    with pytest.raises(ConfigError, match="is kept in int8, which cannot be made nf4"):
        load_span(int8, 0, 1, quantize="nf4")


def test_a_disk_that_fills_up_leaves_nothing_behind(llama, tmp_path, monkeypatch):
    real, calls = os.fsync, []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > 2:
            raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "shard"))
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(ConfigError, match="the disk is full"):
            prepared(llama, tmp_path / "int8")
    assert {path.name for path in tmp_path.iterdir()} <= {"model", "hashes.json"}
    assert prepared(llama, tmp_path / "int8").quantize == "int8"


def test_too_little_room_is_said_before_anything_is_written(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10, "total": 100}))
    with pytest.raises(ConfigError, match=r"has 10 bytes free, int8 needs \d+"):
        prepared(llama, tmp_path / "int8")
    assert not (tmp_path / "int8").exists()


def test_weights_that_are_no_numbers_are_refused_by_name(llama, tmp_path):
    from safetensors.torch import load_file, save_file

    name = "model.layers.1.mlp.up_proj.weight"
    file = llama.path / llama.tensors[name].file
    tensors = load_file(file)
    tensors[name][0, 0] = float("inf")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=f"{name}: NaN or infinity"):
        prepared(opened(llama.path), tmp_path / "int8")
    assert not (tmp_path / "int8").exists()


def test_only_floats_are_quantised():
    name = "model.layers.0.mlp.up_proj.weight"
    for dtype in ("F8_E4M3", "I32"):
        with pytest.raises(ConfigError, match=f"tensor {name} is {dtype}, only F64, F32, F16, BF16 can be"):
            plan_files({name: TensorEntry("a", dtype, (4, 4))}, ARCHITECTURES["llama"], None)
    with pytest.raises(ConfigError, match=r"tensor model\.norm\.weight is F4, which cannot be copied"):
        plan_files({"model.norm.weight": TensorEntry("a", "F4", (4,))}, ARCHITECTURES["llama"], None)


@pytest.mark.parametrize("stated", [7, "", "0" * 31, "Z" * 32])
def test_a_revision_that_is_none_is_refused(llama, tmp_path, stated):
    int8 = prepared(llama, tmp_path / "int8")
    config = json.loads((int8.path / "config.json").read_text()) | {"raceme_source_revision": stated}
    (int8.path / "raceme.json").unlink()
    (int8.path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="is damaged: its raceme_source_revision is"):
        opened(int8.path)


def test_progress_counts_the_bytes_that_are_written(llama, tmp_path):
    seen = []
    int8 = prepared(llama, tmp_path / "int8", progress=lambda *facts: seen.append(facts))
    counted = [(done, total) for what, done, total in seen if what == "preparing model"]
    assert counted[-1][0] == counted[-1][1]
    assert counted == sorted(counted)
    assert counted[-1][1] < size_of(int8.path) < counted[-1][1] + 60_000  # headers and small files


def test_the_command_writes_a_folder_and_says_how_to_serve_it(llama, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RACEME_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "int8"
    assert main(["prepare", str(llama.path), str(out), "--quantize", "int8", "--dtype", "bfloat16"]) == 0
    said = capsys.readouterr().out
    assert llama.revision in said
    assert f"python -m node {out}" in said
    assert opened(out).quantize == "int8"
    assert main(["prepare", str(llama.path), str(out)]) == 2
    assert "is there already" in capsys.readouterr().err
