"""The operator's adapters: read at the start, named for everybody, and each fault is one line."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch

from client.adapters.adapter import Adapter
from client.adapters.folder import new_adapter, save_adapter
from node.config import ConfigError
from node.model.checkpoint.folder import ModelFolder
from node.model.checkpoint.hub import Hub, Unreachable
from node.model.checkpoint.source import resolve
from node.model.embed_and_head import EmbedAndHead, load_embed_and_head
from node.serving.adapters.own import MAX_NAME, MAX_OWN, name_of, own_adapters
from tensor_codec.limits import Limits
from tests.model_fixtures import save_tiny, save_tiny_tokenizer

LORA = {"r": 2, "target_modules": ["q_proj", "down_proj"]}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelFolder, EmbedAndHead]:
    path = tmp_path_factory.mktemp("own") / "llama"
    save_tiny("llama", path)
    save_tiny_tokenizer(path)
    folder = resolve(str(path), cache_dir=path)
    return folder, load_embed_and_head(folder)


def saved(ends: EmbedAndHead, path: Path, **fields: Any) -> Adapter:
    adapter = new_adapter({**LORA, **fields}, ends)
    with torch.no_grad():
        for each in adapter.parameters():
            each.add_(torch.randn_like(each) * 0.1)
    save_adapter(adapter, path)
    return adapter


class OneAdapter(Hub):
    """A hub with one adapter, in this folder; None: the hub does not answer."""

    def __init__(self, path: Path | None) -> None:
        self.path = path

    def adapter(self, name: str, revision: str | None, files: Collection[str]) -> Path:
        assert set(files) == {"adapter_config.json", "adapter_model.safetensors"}
        if self.path is None:
            raise Unreachable("offline mode is on")
        return self.path


def refusal(model: ModelFolder, *named: object, hub: Hub | None = None, limits: Limits | None = None) -> str:
    with pytest.raises(ConfigError) as error:
        own_adapters([str(each) for each in named], model, limits or Limits(), hub)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_an_adapter_of_an_operator_is_the_client_s_of_the_same_folder(llama, tmp_path):
    model, ends = llama
    mine = saved(ends, tmp_path / "poems")
    (own,) = own_adapters([str(tmp_path / "poems")], model, Limits())
    assert own.name == "poems"
    assert (own.id, own.manifest, tuple(own.blobs)) == (mine.id, mine.manifest, mine.blobs())
    (fetched,) = own_adapters(["somebody/verses-1.5"], model, Limits(), OneAdapter(tmp_path / "poems"))
    assert (fetched.name, fetched.id) == ("verses-1.5", mine.id)
    assert own_adapters([], model, Limits()) == []


def test_a_name_fits_into_a_record(monkeypatch, tmp_path):
    assert name_of("folder/of my/German Poëms!") == "German-Po-ms"
    assert name_of("x" * 100) == "x" * MAX_NAME
    assert name_of("folder/") == "folder"
    monkeypatch.chdir(tmp_path)
    assert name_of(".") == name_of(str(tmp_path))
    with pytest.raises(ConfigError, match="has no name"):
        name_of("folder/…")


def test_what_a_client_computes_is_left_to_clients(llama, tmp_path):
    model, ends = llama
    saved(ends, tmp_path / "head", modules_to_save=["lm_head"])
    assert "parts outside of the blocks" in refusal(model, tmp_path / "head")
    save_adapter(
        new_adapter({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3}, ends), tmp_path / "soft"
    )
    assert "parts outside of the blocks" in refusal(model, tmp_path / "soft")
    save_adapter(
        new_adapter({"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 3}, ends), tmp_path / "prefix"
    )
    assert "of kind prefix, servers compute lora" in refusal(model, tmp_path / "prefix")


def test_each_fault_of_a_folder_is_one_line(llama, tmp_path):
    model, ends = llama
    saved(ends, tmp_path / "good")
    assert "is no folder of an adapter" in refusal(model, tmp_path / "missing")
    assert "cannot open '~nobody-of-this-name/x'" in refusal(model, "~nobody-of-this-name/x")
    assert "has no adapter_config.json" in refusal(model, tmp_path)
    config = tmp_path / "good" / "adapter_config.json"
    fields = json.loads(config.read_text())
    config.write_text(json.dumps({**fields, "use_dora": True}))
    assert "use_dora is True: the magnitudes of DoRA are not computed" in refusal(model, tmp_path / "good")
    config.write_text(json.dumps(fields))
    weights = tmp_path / "good" / "adapter_model.safetensors"
    weights.rename(weights.with_name("adapter_model.bin"))
    assert "a pickle, which can run code and is never opened" in refusal(model, tmp_path / "good")


def test_an_adapter_of_another_base_model_is_refused_by_the_shape_that_differs(llama, tmp_path):
    model, _ = llama
    save_tiny("qwen3", tmp_path / "qwen3")
    save_tiny_tokenizer(tmp_path / "qwen3")
    other = load_embed_and_head(resolve(str(tmp_path / "qwen3"), cache_dir=tmp_path))
    save_adapter(new_adapter(LORA, other), tmp_path / "other")
    said = refusal(model, tmp_path / "other")
    assert "lora_B of model.layers.0.self_attn.q_proj is [64, 2], [32, 2] is needed" in said


def test_the_limits_of_guests_hold_for_operators_too(llama, tmp_path):
    model, ends = llama
    adapter = saved(ends, tmp_path / "poems")
    assert "rank 2 at 'down_proj', 1..1 is allowed" in refusal(
        model, tmp_path / "poems", limits=Limits(max_adapter_rank=1)
    )
    with torch.no_grad():
        adapter.parameters()[0].fill_(2.0**17)
    save_adapter(adapter, tmp_path / "large")
    assert "holds 131072.0, finite values up to 10000 are allowed" in refusal(model, tmp_path / "large")


def test_the_hub_s_silence_is_one_line(llama):
    model, _ = llama
    said = refusal(model, "somebody/verses", hub=OneAdapter(None))
    assert said == "somebody/verses is not in the hub's cache, and the hub: offline mode is on"


def test_more_adapters_than_a_record_names_and_equal_names_are_refused(llama, tmp_path):
    model, ends = llama
    assert f"{MAX_OWN} are allowed" in refusal(model, *["any"] * (MAX_OWN + 1))
    for folder in ("one", "two"):
        saved(ends, tmp_path / folder / "poems")
    paths = [tmp_path / folder / "poems" for folder in ("one", "two")]
    assert "two adapters have the name poems" in refusal(model, *paths)
