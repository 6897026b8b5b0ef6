"""Shared adapters as folders of peft: the same content again, for every architecture, with the card."""

from __future__ import annotations

import base64
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from client.adapters.adapter import Adapter
from client.adapters.folder import load_adapter, new_adapter, save_adapter
from client.sharing.folder import check_new_folder, read_shareable, write_shared
from node.config import ConfigError
from node.model.checkpoint.source import resolve
from node.model.embed_and_head import EmbedAndHead, load_embed_and_head
from node.model.peft.cards import CARD_NAME, read_card, write_card
from node.model.peft.content import blob_sizes, tensors_of
from node.model.peft.folder import read_adapter, write_adapter
from node.model.peft.modules import ModelModules, model_modules
from tensor_codec.adapters import AdapterContent, LoraSite
from tests.model_fixtures import TINY, save_tiny, save_tiny_tokenizer
from tests.sharing_fixtures import LIMITS, signed


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> EmbedAndHead:
    path = tmp_path_factory.mktemp("shared") / "llama"
    save_tiny("llama", path)
    save_tiny_tokenizer(path)
    return load_embed_and_head(resolve(str(path), cache_dir=path))


def shaken(adapter: Adapter) -> AdapterContent:
    """The content of the adapter with every value away from where it begins."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return adapter.content()


def written(content: AdapterContent, modules: ModelModules, path: Path) -> AdapterContent:
    """The content through a folder of peft."""
    write_adapter(tensors_of(content, modules, "m"), path)
    return read_adapter(path, modules).content()


@pytest.mark.parametrize("variant", TINY)
def test_the_content_for_every_architecture_comes_through_a_folder(variant: str, tmp_path: Path):
    save_tiny(variant, tmp_path / "model")
    save_tiny_tokenizer(tmp_path / "model")
    folder = resolve(str(tmp_path / "model"), cache_dir=tmp_path)
    ends = load_embed_and_head(folder)
    own = shaken(new_adapter({"r": 2, "target_modules": "all-linear"}, ends))
    modules = model_modules(folder)
    assert [len(blob) for blob in own.blobs] == blob_sizes(own.manifest, modules)
    assert written(own, modules, tmp_path / "saved").id == own.id


CONFIGS: list[dict[str, Any]] = [
    {"r": 3, "lora_alpha": 7},
    {"r": 3, "lora_alpha": 7, "use_rslora": True},
    {"r": 2, "lora_alpha": 1, "layers_to_transform": [1]},
    {"r": 4, "target_modules": ["q_proj", "down_proj"], "rank_pattern": {"down_proj": 2}},
    {"r": 4, "target_modules": ["q_proj", "up_proj"], "rank_pattern": {"layers.0.self_attn.q_proj": 1}},
    {"r": 2, "alpha_pattern": {"v_proj": 5, "layers.1.self_attn.q_proj": 3.5}},
    {"r": 2, "target_modules": r".*\.[02]\..*(gate_proj|k_proj)"},
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_every_config_s_content_comes_through_a_folder(
    config: dict[str, Any], dtype: Any, llama: EmbedAndHead, tmp_path: Path
):
    own = shaken(new_adapter(config, llama, dtype=dtype))
    found = written(own, llama.modules, tmp_path)
    assert found.manifest == own.manifest
    assert found.id == own.id


def test_a_prefix_comes_through_a_folder(llama: EmbedAndHead, tmp_path: Path):
    own = shaken(new_adapter({"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 3}, llama))
    assert [len(blob) for blob in own.blobs] == blob_sizes(own.manifest, llama.modules)
    assert written(own, llama.modules, tmp_path).id == own.id


def test_a_fetched_folder_is_the_adapter_with_its_card(llama: EmbedAndHead, tmp_path: Path):
    adapter = new_adapter({"r": 2}, llama)
    own = shaken(adapter)
    write_shared(tmp_path / "got", own, signed(own), llama.modules, "m")
    assert sorted(each.name for each in (tmp_path / "got").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        CARD_NAME,
    ]
    assert read_card(tmp_path / "got", LIMITS) == signed(own)
    again = load_adapter(tmp_path / "got", llama)
    assert again.id == adapter.id == own.id
    assert read_shareable(tmp_path / "got", llama.modules).id == own.id


def test_a_card_is_what_is_signed_whatever_stands_beside_it(llama: EmbedAndHead, tmp_path: Path):
    own = shaken(new_adapter({"r": 2}, llama))
    write_card(tmp_path, signed(own))
    file = tmp_path / CARD_NAME
    said = json.loads(file.read_text())
    assert (said["full_name"], said["licence"]) == (f"story#{own.id[:16]}", "MIT")
    file.write_text(json.dumps({**said, "licence": "anything"}))
    found = read_card(tmp_path, LIMITS)
    assert found is not None
    assert found.card.licence == "MIT"
    wire = base64.b64decode(said["signed"])
    for bad in (7, "!", base64.b64encode(wire[:-1]).decode(), base64.b64encode(wire[:-1] + b"\0").decode()):
        file.write_text(json.dumps({**said, "signed": bad}))
        with pytest.raises(ConfigError, match="no signed card"):
            read_card(tmp_path, LIMITS)
    file.unlink()
    assert read_card(tmp_path, LIMITS) is None


def test_nothing_is_written_over(tmp_path: Path):
    check_new_folder(tmp_path)
    check_new_folder(tmp_path / "new")
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file"):
        with pytest.raises(ConfigError, match="not an empty folder"):
            check_new_folder(path)


def test_an_adapter_of_another_model_is_refused(llama: EmbedAndHead):
    own = shaken(new_adapter({"r": 2}, llama))
    shorter = replace(own.manifest, blocks=own.manifest.blocks[:-1])
    elsewhere = replace(own.manifest, revision="other")
    unknown = replace(own.manifest, blocks=((LoraSite("nobody", 1, 1.0),), *own.manifest.blocks[1:]))
    for manifest, says in ((shorter, "blocks"), (elsewhere, "revision other"), (unknown, "nobody")):
        with pytest.raises(ConfigError, match=says):
            blob_sizes(manifest, llama.modules)


def test_values_that_no_server_takes_are_refused(llama: EmbedAndHead):
    own = shaken(new_adapter({"r": 2}, llama, dtype="fp32"))
    nan = torch.tensor([math.nan]).numpy().tobytes() + own.blobs[0][4:]
    for kind in ("lora", "prefix"):
        content = own
        if kind == "prefix":
            content = shaken(
                new_adapter({"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 3}, llama, dtype="fp32")
            )
            nan = torch.tensor([math.nan]).numpy().tobytes() + content.blobs[0][4:]
        bad = AdapterContent(content.manifest, (nan, *content.blobs[1:]))
        with pytest.raises(ConfigError, match="NaN"):
            tensors_of(bad, llama.modules, "m")


def test_sites_that_no_config_describes_are_refused(llama: EmbedAndHead):
    own = shaken(new_adapter({"r": 2, "target_modules": ["q_proj", "v_proj"]}, llama))
    turned = tuple(tuple(reversed(block)) for block in own.manifest.blocks)
    with pytest.raises(ConfigError, match="no config of peft"):
        tensors_of(AdapterContent(replace(own.manifest, blocks=turned), own.blobs), llama.modules, "m")


def test_parts_outside_of_the_blocks_are_not_shared(llama: EmbedAndHead, tmp_path: Path):
    for number, config in enumerate(
        ({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2}, {"r": 2, "modules_to_save": ["lm_head"]})
    ):
        path = tmp_path / str(number)
        save_adapter(new_adapter(config, llama), path)
        with pytest.raises(ConfigError, match="not shared yet"):
            read_shareable(path, llama.modules)
