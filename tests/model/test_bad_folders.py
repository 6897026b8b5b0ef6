"""What a folder may lack or hold instead: one line that names it, whichever end opens it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from client.terminal import _template
from node.config import ConfigError
from node.model.blocks.span import load_span
from node.model.checkpoint import source
from node.model.checkpoint.builtin import BUILTIN_MODEL
from node.model.checkpoint.folder import HashMemo, ModelFolder, model_name, open_folder
from node.model.checkpoint.info import read_info
from node.model.checkpoint.source import resolve
from node.model.embed_and_head import load_embed_and_head, open_tokenizer
from routing.view.records import Record
from tests.model_fixtures import save_tiny, save_tiny_tokenizer


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "model"
    save_tiny("llama", path)
    save_tiny_tokenizer(path)
    return path


@pytest.fixture
def model(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def opened(path: Path) -> ModelFolder:
    return open_folder(path, memo=HashMemo(path.parent / "hashes.json"))


def change(path: Path, values: dict[str, Any]) -> None:
    file = path / "config.json"
    changed = json.loads(file.read_text()) | values
    file.write_text(json.dumps({key: value for key, value in changed.items() if value is not ...}))


def refused(call, *arguments) -> str:
    with pytest.raises(ConfigError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "is damaged"),
        (b"{nope", "is damaged"),
        (b"[1]", "a JSON object is expected, not list"),
        (b"null", "a JSON object is expected, not NoneType"),
        ('{"model_type": "llama"}'.encode("utf-16"), "is damaged"),
        (b'{"model_type": "\xff"}', "is damaged"),
        (b"\xef\xbb\xbf{}", "is damaged"),
        (b"[" * 100_000, "is damaged"),
        (b"1" * 5000, "is damaged"),
    ],
)
def test_a_config_that_is_no_config_is_named(model, content, what):
    (model / "config.json").write_bytes(content)
    message = refused(opened, model)
    assert str(model / "config.json") in message
    assert what in message


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({"model_type": ...}, "model_type None is not supported"),
        ({"model_type": "mamba"}, "model_type 'mamba' is not supported"),
        ({"model_type": ["llama"]}, r"model_type ['llama'] is not supported"),
        ({"hidden_size": ...}, "has no hidden_size"),
        ({"hidden_size": None}, "has no hidden_size"),
        ({"hidden_size": "32"}, "hidden_size is '32', a whole number from 1"),
        ({"hidden_size": True}, "hidden_size is True, a whole number from 1"),
        ({"hidden_size": 10**30}, "hidden_size is 1000000"),
        ({"num_hidden_layers": 10**30}, "a whole number from 1 to 4096 is allowed"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0, a whole number from 1"),
        ({"num_hidden_layers": 7}, "has no tensor of block 6"),
        ({"max_position_embeddings": -1}, "max_position_embeddings is -1, a whole number from 1"),
        ({"vocab_size": 2.5}, "vocab_size is 2.5, a whole number from 1"),
    ],
)
def test_a_size_that_is_none_is_refused_from_the_config_alone(model, values, what):
    change(model, values)
    message = refused(lambda: read_info(opened(model)))
    assert what in message


@pytest.mark.parametrize(
    "values",
    [
        {"num_attention_heads": 0},
        {"num_attention_heads": 5},
        {"num_attention_heads": 10**12},
        {"num_attention_heads": "4"},
        {"num_key_value_heads": 3},
        {"num_key_value_heads": 0},
        {"head_dim": 7},
        {"intermediate_size": 40},
        {"hidden_size": 64},
        {"hidden_act": "what"},
        {"rms_norm_eps": "x"},
    ],
)
def test_sizes_that_do_not_go_together_are_refused_when_blocks_are_loaded(model, values):
    change(model, values)
    assert str(model) in refused(lambda: load_span(opened(model), 0, 1))


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("pytorch_model.bin", "it has pytorch_model.bin, and weights as safetensors are needed"),
        ("weights.safetensors", "it has weights.safetensors, and weights as safetensors are needed"),
        ("model.gguf", "it has model.gguf"),
        (None, "has no weights: neither"),
    ],
)
def test_weights_under_other_names_are_named(model, name, what):
    for file in (*model.glob("*.safetensors"), model / "model.safetensors.index.json"):
        file.unlink()
    if name is not None:
        (model / name).write_bytes(b"")
    assert what in refused(opened, model)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("x.gguf", "is a GGUF file"),
        ("x.safetensors", "is a file of weights and not a folder"),
        ("pytorch_model.bin", "in PyTorch's format and not a folder"),
        ("config.json", "is a file and not a folder"),
    ],
)
def test_a_file_that_is_named_as_a_model_is_told_what_it_is(tmp_path, name, what):
    (tmp_path / name).write_bytes(b"")
    message = refused(lambda: resolve(tmp_path / name, cache_dir=tmp_path))
    assert what in message
    assert "a model is named by its folder, with config.json" in message


def test_a_file_with_the_built_in_models_name_does_not_hide_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / BUILTIN_MODEL).write_bytes(b"")
    monkeypatch.setattr(source, "builtin_folder", lambda *_, **__: tmp_path / "nowhere")
    assert "there is no folder" in refused(lambda: resolve(BUILTIN_MODEL, cache_dir=tmp_path))


@pytest.mark.parametrize(
    "name", ["x" * 300, "x" * 5000, "a\0b", "~nobody-of-this-name/model", "a\nb\x1b[31m"]
)
def test_names_that_no_folder_has_are_refused_in_a_line(tmp_path, name):
    message = refused(lambda: resolve(name, cache_dir=tmp_path))
    assert message.isprintable()
    assert len(message) < 400


@pytest.mark.parametrize("name", ["x" * 150, "x" * 255, "ä" * 120, "a\nb", "a\x1b[31m", "名" * 80, "b\udcff"])
def test_a_folder_of_any_name_makes_a_record(saved, tmp_path, name):
    path = shutil.copytree(saved, tmp_path / name)
    found = opened(path).name
    assert found.isprintable()
    assert len(found.encode()) <= 96
    assert found[:1] == name[:1]
    record = Record(
        role="serve", state="online", name="n" * 64, version="1", model=found, revision="0" * 32, blocks=6,
        start=0, stop=6, dtype="float32", quantize="none", addresses=("/ip4/192.0.2.1/tcp/31337",) * 8, seq=1,
        ttl_seconds=90.0,
    )  # fmt: skip
    assert record.model == found
    assert len(found.encode()) + 600 <= 1024, "what else a record holds has room beside it"


def test_a_name_of_nothing_is_one_all_the_same():
    assert model_name("") == "model"
    assert model_name("SmolLM2-135M-Instruct") == "SmolLM2-135M-Instruct"


def tokenizer_files(path: Path) -> list[Path]:
    return [file for file in path.iterdir() if "token" in file.name]


def test_a_folder_without_tokenizer_says_so(model):
    for file in tokenizer_files(model):
        file.unlink()
    message = refused(lambda: load_embed_and_head(opened(model)).tokenizer)
    assert message.startswith(f"{model} has no tokenizer")


def test_settings_of_a_tokenizer_do_not_make_one(model):
    (model / "tokenizer.json").unlink()
    assert refused(open_tokenizer, model).startswith(f"{model} has no tokenizer")


@pytest.mark.parametrize("content", [b"", b"{}", b"nope", b"[]", b'{"model": {"type": "BPE"}}'])
def test_a_tokenizer_that_cannot_be_read_is_named(model, content):
    (model / "tokenizer.json").write_bytes(content)
    assert f"the tokenizer in {model} " in refused(open_tokenizer, model)


def test_code_that_a_tokenizer_would_bring_is_not_run(model):
    settings = {"auto_map": {"AutoTokenizer": ["a.B", "a.C"]}, "tokenizer_class": "B"}
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    assert "contains custom code" in refused(open_tokenizer, model)


def test_settings_that_are_no_settings_are_named(model):
    (model / "tokenizer_config.json").write_text("{nope")
    assert f"the tokenizer in {model} cannot be opened" in refused(open_tokenizer, model)


@pytest.mark.parametrize(
    "template", ["{% if %}", "{{ raise_exception('roles must alternate') }}", "{{ messages.what.more }}"]
)
def test_a_chat_template_that_does_not_work_is_one_line(model, template):
    tokenizer = open_tokenizer(model)
    tokenizer.chat_template = template
    message = refused(_template, tokenizer, [{"role": "user", "content": "hello"}])
    assert message.startswith(f"the chat template of {model} cannot be used: ")
